"""Linear recurrences, solver against solver: `python benchmarks/scan.py` writes results/ and prints a table.

For each shape: milliseconds of the forward pass, of the backward pass alone, and of the whole gradient; the effective
bandwidth relative to that of a copy measured in the same rounds (three words an element forward, five backward);
temporary memory in arrays of the size of the inputs; seconds of compilation; and the largest deviation from a float64
loop.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import timing
from jax import Array, lax

from ranjax import cli, linear_recurrence
from ranjax.figure import blank_figure

RESULTS = Path(__file__).parent / "results"
MAIN = (8, 1024, 512)  # batch, time, features
PLAIN = ("sequential", "associative", "chunked")


@dataclasses.dataclass(frozen=True)
class Options:
    """Linear recurrences, solver against solver.

    Attributes:
      solvers: of `ranjax.linear_recurrence`. None: those in plain JAX, and the kernel on an accelerator.
      lengths: numbers of steps.
      widths: numbers of features.
      elements: of an array, about; the batch follows from it. The shape 8 x 1024 x 512 always comes first.
      longest_loop: the largest number of steps for `lax.scan`.
      seconds: time limit of the rounds of one shape.
      out: folder of the results.
    """

    solvers: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = (64, 256, 1024, 4096, 16384, 65536)
    widths: tuple[int, ...] = (64, 512, 2048)
    elements: int = 2**22
    longest_loop: int = 2**16
    seconds: float = 10.0
    out: Path = RESULTS

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Batch, time, features; without shapes that exceed twice the elements with batch 1."""
        rest = [(time, features) for time in self.lengths for features in self.widths]
        batches = [max(1, min(64, self.elements // (time * features))) for time, features in rest]
        grid = [(batch, *shape) for batch, shape in zip(batches, rest, strict=True)]
        return [MAIN, *(shape for shape in grid if shape != MAIN and math.prod(shape) <= 2 * self.elements)]


def plain_scan(decay: Array, inputs: Array, initial: Array) -> Array:
    """The recurrence as one writes it by hand, in its natural layout: time first."""

    def step(h, ab):
        h = ab[0] * h + ab[1]
        return h, h

    return lax.scan(step, initial, (decay, inputs))[1]


def moved_scan(decay: Array, inputs: Array, initial: Array) -> Array:
    """`plain_scan` on arrays with the batch first."""
    return jnp.swapaxes(plain_scan(jnp.swapaxes(decay, 0, 1), jnp.swapaxes(inputs, 0, 1), initial), 0, 1)


def plain_associative_scan(decay: Array, inputs: Array, initial: Array) -> Array:
    """The parallel recurrence as one writes it by hand."""

    def compose(earlier, later):
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    product, states = lax.associative_scan(compose, (decay, inputs), axis=1)
    return product * initial[:, None] + states


class Rival:
    """A solver of the recurrence, compiled for arrays of one shape."""

    def __init__(self, solve: Callable, arrays: tuple[Array, ...], weight: Array, time_first: bool = False):
        if time_first:
            arrays, weight = (*(jnp.swapaxes(a, 0, 1) for a in arrays[:2]), arrays[2]), jnp.swapaxes(weight, 0, 1)
        self.time_first, self.arrays, self.weight = time_first, arrays, weight
        begin = time.perf_counter()
        self.forward = jax.jit(solve).lower(*arrays).compile()
        self.gradient = jax.jit(lambda g, *a: jax.vjp(solve, *a)[1](g)).lower(weight, *arrays).compile()
        self.compile_seconds = time.perf_counter() - begin
        chain = jax.jit(lambda *a: jax.vjp(solve, *a)[1])(*arrays)
        self.calls = {
            "forward": timing.repeated(solve, arrays),
            "backward": timing.repeated(lambda chain, g: chain(g), (chain, weight)),
            "gradient": timing.repeated(lambda g, *a: jax.vjp(solve, *a)[1](g), (weight, *arrays)),
        }

    def memory(self) -> float:
        """Temporary memory of the gradient, in arrays of the size of the inputs."""
        return round(self.gradient.memory_analysis().temp_size_in_bytes / self.arrays[1].nbytes, 2)

    def deviation(self, states: np.ndarray, gradient: np.ndarray) -> float:
        """The largest of the states and of the gradient of the inputs, relative to their largest values."""
        ours = [np.asarray(self.forward(*self.arrays)), np.asarray(self.gradient(self.weight, *self.arrays)[1])]
        ours = [a.swapaxes(0, 1) for a in ours] if self.time_first else ours
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, (states, gradient), strict=True))


def reference(arrays: tuple[Array, ...], weight: Array) -> tuple[np.ndarray, np.ndarray]:
    """States, and gradient of the inputs, by a loop in float64."""
    decay, inputs, h = (np.asarray(a, np.float64) for a in arrays)
    states, gradient = np.zeros_like(inputs), np.zeros_like(inputs)
    for t in range(inputs.shape[1]):
        h = states[:, t] = decay[:, t] * h + inputs[:, t]
    h = np.zeros_like(h)
    for t in reversed(range(inputs.shape[1])):
        gradient[:, t] = h + np.asarray(weight[:, t], np.float64)
        h = decay[:, t] * gradient[:, t]
    return states, gradient


def measure(batch: int, time: int, features: int, options: Options) -> list[dict]:
    """The rows of one shape."""
    rivals, expected, inputs = contest((batch, time, features), options)
    calls = {("copy", "forward"): timing.repeated(lambda x: x + 1, (inputs,))}
    calls |= {(name, part): call for name, rival in rivals.items() for part, call in rival.calls.items()}
    times = timing.alternate({key: run for key, (run, _) in calls.items()}, seconds=options.seconds)
    times = {key: timing.summary(found, calls[key][1]) for key, found in times.items()}
    words = inputs.nbytes / 1e6
    copied = 2 * words / times["copy", "forward"]["median_ms"]  # GB/s
    rows = []
    for name, rival in rivals.items():
        parts = {part: times[name, part] for part in ("forward", "backward", "gradient")}
        row = {"name": name, "batch": batch, "time": time, "features": features}
        row |= {f"{part}_ms": round(t["median_ms"], 4) for part, t in parts.items()}
        row |= {f"{part}_least_ms": round(t["least_ms"], 4) for part, t in parts.items()}
        row |= {
            "copy_gb_s": round(copied, 2),
            "forward_over_copy": round(3 * words / parts["forward"]["median_ms"] / copied, 3),
            "backward_over_copy": round(5 * words / parts["backward"]["median_ms"] / copied, 3),
            "temporaries": rival.memory(),
            "compile_s": round(rival.compile_seconds, 2),
            "deviation": rival.deviation(*expected[name]),
            "rounds": parts["gradient"]["rounds"],
        }
        rows.append(row)
    return rows


def contest(shape: tuple[int, int, int], options: Options) -> tuple[dict, dict, Array]:
    """The solvers by name, the float64 results expected of each, and an array of the shape."""
    rng = np.random.default_rng(0)
    decay = jnp.asarray(rng.uniform(0.5, 1.0, shape), jnp.float32)
    inputs, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    initial = jnp.asarray(rng.normal(size=(shape[0], shape[2])), jnp.float32)
    arrays = decay, inputs, initial
    rivals = {
        f"ranjax, {solver}": Rival(lambda *a, s=solver: linear_recurrence(*a, solver=s), arrays, weight)
        for solver in options.solvers
    }
    if shape[1] <= options.longest_loop:
        rivals["autodiff of lax.scan"] = Rival(moved_scan, arrays, weight)
        rivals["the same, time first"] = Rival(plain_scan, arrays, weight, time_first=True)
    rivals["autodiff of associative_scan"] = Rival(plain_associative_scan, arrays, weight)
    expected = dict.fromkeys(rivals, reference(arrays, weight))
    positive = np.asarray(decay), np.abs(np.asarray(inputs)), np.asarray(weight)  # some use logarithms
    others = peers.built(*positive)
    if others:
        expected |= dict.fromkeys(others, reference((*positive[:2], np.zeros(initial.shape)), weight))
    return rivals | others, expected, inputs


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Nanoseconds an element of the whole gradient, over the length, one panel for each number of features."""
    widths = sorted({row["features"] for row in rows})
    figure = blank_figure(4 * len(widths) + 3, 4)
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for panel, features in zip(panels, widths, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            points = sorted(
                (row["time"], 1e6 * row["gradient_ms"] / (row["batch"] * row["time"] * features))
                for row in rows
                if row["name"] == name and row["features"] == features
            )
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(xscale="log", yscale="log", xlabel="length", title=f"{features} features")
    panels[0].set_ylabel("gradient, ns an element")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    if options.solvers is None:
        kernel = () if jax.default_backend() == "cpu" else ("pallas",)
        options = dataclasses.replace(options, solvers=PLAIN + kernel)
    stamp, rows = timing.stamp(), []
    for shape in options.shapes:
        found = measure(*shape, options)
        rows += found
        print("batch {}, time {}, features {}".format(*shape), flush=True)
        for row in found:
            print(
                "  {name:30} forward {forward_ms:9.3f} ms ({forward_over_copy:.2f} of a copy)  backward "
                "{backward_ms:9.3f} ms ({backward_over_copy:.2f})  gradient {gradient_ms:9.3f} ms  temporaries "
                "{temporaries}  compile {compile_s:5.2f} s  deviation {deviation:.1e}".format(**row),
                flush=True,
            )
        path = timing.write(options.out, "scan", stamp | {"solvers": options.solvers}, rows)
    draw(rows, path.with_suffix(".png"), f"{stamp['device']}, {stamp['date']}, jax {stamp['jax']}")


if __name__ == "__main__":
    cli.start(lambda: main(cli.options(Options, None, "python benchmarks/scan.py")), huge_pages=True)
