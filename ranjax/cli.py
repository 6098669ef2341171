"""What the programs share: flags, messages, exit codes, files written whole."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ranjax.errors import exit_with_message as exit_with_message

TUNABLES = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Restarts the program, once, with an allocator that asks for huge pages.

    XLA on a CPU allocates the memory for a step's large arrays at each step, and mapping it in pages of 4 KiB costs
    a fifth to a third of a training step (`benchmarks/README.md`). glibc reads the setting when a program starts; the
    process keeps its number. Nothing happens on other systems, or where GLIBC_TUNABLES is set, even if it is empty.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start(main: Callable[[], None], huge_pages: bool = True) -> None:
    """Runs a program."""
    if huge_pages:
        restart_with_huge_pages()
    main()


def options(kind: type, argv: list[str] | None, program: str) -> Any:
    """The options of a program, read from its flags."""
    import tyro

    return tyro.cli(kind, args=argv, prog=program)


def lazy(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562) for names that are imported when first used."""

    def getattr_(name: str) -> Any:
        if name in names:
            return getattr(import_module(names[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all: until the new one is complete, the old one stays."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
