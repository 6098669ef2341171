"""The command line of a study: a sequence of trainings that can be stopped and continued."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.table import Table
from ranjax import cli
from ranjax.errors import UserError, flag

LONGEST = 1_000_000  # minutes, about two years


@dataclass(frozen=True)
class Options:
    """The options of every study."""

    data_dir: str | None = None
    """Folder of the data sets; without it WikiText and text8 are downloaded."""
    runs: str = "runs"
    """Folder of the runs, needed until the study is complete."""
    minutes: float | None = None
    """Time limit. The current run is saved; the same command continues the study."""
    out: str | None = None
    """Folder of the table and its pictures. If not given, the study's own folder, whose recorded runs are skipped."""


def run(main: Callable[[Any, Table], None], kind: type[Options], folder: Path, argv: list[str] | None = None) -> None:
    """Runs a study from the command line.

    SIGINT, SIGTERM and the end of `--minutes` stop it: the current run is saved first.

    Args:
      main: the study, a function of its options and of the table that it fills.
      kind: the type of its options.
      folder: of its table and pictures, unless `--out` names another.
      argv: the flags; None for those of the process.

    Raises:
      SystemExit: 1 after an error that the message explains, 128 plus the signal's number after a stop.
    """
    with cli.exit_with_message():
        options = cli.options(kind, argv, f"python experiments/{folder.name}/run.py")
        _check(options)
        out, runs = (Path(os.path.expanduser(path)) for path in (options.out or folder, options.runs))
        with cli.stopping(options.minutes) as stop:
            try:
                main(options, Table(out, runs, options.data_dir, stop))
            except cli.Stopped:
                print("The study was stopped; the same command goes on with it.", flush=True)
                raise


def seeds(number: int) -> range:
    """The seeds 0, 1, ... of `--seeds`.

    Raises:
      UserError: for a number below 1.
    """
    if number < 1:
        raise UserError(f"--seeds must be at least 1; got {number}.")
    return range(number)


def _check(options: Options) -> None:
    """Raises a UserError for an empty list of names, or a time limit out of its range."""
    for name, value in vars(options).items():
        if value == ():
            raise UserError(f"{flag(name)} must be followed by at least one name.")
    if options.minutes is not None and not 0 < options.minutes <= LONGEST:
        raise UserError(f"--minutes must be above 0 and at most {LONGEST}; got {options.minutes}.")
