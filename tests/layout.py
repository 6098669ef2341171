"""The imports of the package, floor by floor: `python -m tests.layout` from the root of the project."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ranjax"
# From the ground up: a room imports from those before it only, and from none beside it on the same line.
ORDER = (
    ("errors", "choices"),
    ("cli", "device", "sharding"),
    ("saved",),
    ("kernels", "data", "figure"),
    ("scan",),
    ("cell",),
    ("solvers",),
    ("layer", "baselines", "output", "torchrecurrent"),
    ("block",),
    ("lm", "nnx"),
    ("sampling", "interpret", "training"),
    ("weights", "attribution", "memory", "config"),
    ("train", "evaluate", "generate", "explain", "export", "compare"),
)
CORE = (
    "kernels",
    "sharding",
    "scan",
    "cell",
    "solvers",
    "layer",
    "baselines",
    "output",
    "torchrecurrent",
    "block",
    "nnx",
    "lm",
    "sampling",
    "interpret",
    "weights",
    "attribution",
    "memory",
)
RENDERING = "interpret.render"  # needs more


def modules() -> dict[str, Path]:
    """The modules by their names, `ranjax` left out; that of the public names imports all of them, lazily."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


@cache
def imports(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The imports anywhere in a module, those for types included: of the package's modules, and of other packages."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in named:
            if full.split(".")[0] != "ranjax":
                others.add(full.split(".")[0])
                continue
            parts = full.split(".")[1:]
            while parts and ".".join(parts) not in modules():  # a name in a module
                parts.pop()
            if parts:
                ours.add(".".join(parts))
            else:
                others.add(full)  # a public name of the package, which stands above all of it
    return frozenset(ours - {name}), frozenset(others)


def room(name: str) -> str:
    """The folder or the file that a module is."""
    return name.split(".")[0]


def arrows() -> Iterator[tuple[str, str]]:
    """Every import of one module by another of a different room."""
    for name in modules():
        for imported in imports(name)[0]:
            if room(imported) != room(name):
                yield name, imported


@cache
def floor(of: str) -> int:
    """The number of floors that a room stands on, itself included."""
    return 1 + max((floor(room(below)) for above, below in arrows() if room(above) == of), default=0)


@cache
def height(name: str) -> int:
    """The same, module by module."""
    return 1 + max((height(below) for below in imports(name)[0]), default=0)


def main() -> None:
    rooms = sorted({room(name) for name in modules()}, key=lambda name: (-floor(name), name))
    for number in range(max(map(floor, rooms)), 0, -1):
        for name in (name for name in rooms if floor(name) == number):
            below = sorted({room(imported) for above, imported in arrows() if room(above) == name})
            print(f"{number:3}  {name:10} -> {', '.join(below) or 'nothing'}")
    pairs = {(room(above), room(below)) for above, below in arrows()}
    print(f"{len(modules())} modules in {len(rooms)} rooms, {max(map(floor, rooms))} floors, {len(pairs)} arrows")
    print(
        f"module by module: {max(map(height, modules()))} floors, {sum(len(imports(n)[0]) for n in modules())} arrows"
    )


if __name__ == "__main__":
    main()
