"""Runs side by side: `python -m ranjax.compare RUN RUN --out picture.png`.

From Python: `ranjax.compare.read_runs([...])`, then `table(runs)` and `draw(runs, path)`.
"""

import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.errors import UserError

if TYPE_CHECKING:
    from ranjax.training.comparison import Compared as Compared
    from ranjax.training.comparison import draw as draw
    from ranjax.training.comparison import read_runs as read_runs
    from ranjax.training.comparison import table as table

__getattr__ = cli.lazy(
    __name__, dict.fromkeys(("Compared", "draw", "read_runs", "table"), "ranjax.training.comparison")
)


@dataclass(frozen=True)
class Options:
    """Prints a table of runs, and draws their validations."""

    runs: tuple[str, ...]
    """The --out directories of two or more runs."""
    out: str | None = None
    """A figure (.png) to write: validation over epochs and over minutes. One that exists is replaced."""


def checked_out(given: Options) -> Path | None:
    """The path of --out. Raises a UserError if it is not that of a figure."""
    if given.out is None:
        return None
    out = Path(os.path.expanduser(given.out))
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png (a figure); got {out}.")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UserError(f"--out must be a file in a directory that exists; got {out}.")
    return out


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        given = cli.options(Options, argv, "python -m ranjax.compare", positional=True)
        out = checked_out(given)
        from ranjax.training.comparison import draw, read_runs, table, warn_if_not_comparable

        runs = read_runs(given.runs)
        print(table(runs, shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf))
        warn_if_not_comparable(runs)
        if out is not None:
            try:
                draw(runs, out)
            except OSError as error:
                raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
            print(f"written: {out}")


if __name__ == "__main__":
    cli.start(main)
