"""Trainings in a row, in slices if need be: what the programs in `experiments/` share."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranjax.errors import UserError, exit_with_message, flag
from ranjax.cli import restart_with_huge_pages
from harness.table import Table

LONGEST = 1_000_000  # minutes, about two years


@dataclass(frozen=True)
class Options:
    """What every study takes."""

    data_dir: str | None = None
    """Folder of the data sets; without it WikiText and text8 are downloaded."""
    runs: str = "runs"
    """Folder that keeps the runs while the study lasts."""
    minutes: float | None = None
    """Stop after so many minutes, saved; the same command goes on."""
    out: str | None = None
    """Folder of the table and its pictures; without it the study's own, whose rows are not trained for again."""


def run(main: Callable[[Any, Table], None], flags: type[Options], folder: Path) -> None:
    """Runs a study with the flags of its command line, and ends it after `--minutes`.

    Args:
      main: the study, given its options and the table it fills.
      flags: what its options are.
      folder: of its table and pictures, where `--out` names no other.
    """
    import tyro

    restart_with_huge_pages()
    with exit_with_message():
        options = tyro.cli(flags)
        for name, given in vars(options).items():
            if given == ():
                raise UserError(f"{flag(name)} must be followed by at least one name.")
        with budget(options.minutes):
            out, runs = (Path(os.path.expanduser(path)) for path in (options.out or folder, options.runs))
            table = Table(out, runs, options.data_dir)
            try:
                main(options, table)
            except (KeyboardInterrupt, SystemExit):
                print("The study was stopped; the same command goes on with it.", flush=True)
                raise


def rounds(seeds: int) -> list[list[int]]:
    """The seeds that are trained side by side: all of them on a GPU or TPU, one after another on a CPU."""
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {seeds}.")
    import jax

    return [[seed] for seed in range(seeds)] if jax.default_backend() == "cpu" else [list(range(seeds))]


@contextmanager
def budget(minutes: float | None) -> Iterator[None]:
    """Ends the program after so many minutes, what is being trained saved, as Ctrl-C does."""
    if minutes is not None and not 0 < minutes <= LONGEST:
        raise UserError(f"--minutes must be above 0 and at most {LONGEST}; got {minutes}.")
    if minutes is None:
        yield
        return

    def end(number, _):  # between two trainings; one has its own answer to SIGTERM
        signal.setitimer(signal.ITIMER_REAL, 1)  # again, if the garbage collector's callback loses this one
        raise SystemExit(128 + number)

    handlers = {signal.SIGTERM: end, signal.SIGALRM: lambda *_: signal.raise_signal(signal.SIGTERM)}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
