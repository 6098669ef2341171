"""The flags of the program `train`, as a `Config` and a `Cluster`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ranjax import cli
from ranjax.choices import Resume
from ranjax.errors import UserError, flag
from ranjax.training.config import (
    PRESETS,
    Config,
    Count,
    Preset,
    Size,
    goes_on,
    load_config,
    normalised,
    recipe,
)

RESUME_WORDS = "True", "False", "auto"


@dataclass(frozen=True)
class _Start:
    """What the defaults of the other flags are: those of a preset, of the run that goes on, or of the data set."""

    preset: Preset | None = None
    dataset: str = Config.dataset
    cell: str = Config.cell
    block: str | None = None
    gates: str | None = None
    out: str | None = None
    resume: Resume = False


@dataclass(frozen=True)
class Cluster:
    """One of several processes that train together, each started with the same flags but for `process`.

    On a TPU pod and under SLURM the other flags are found; elsewhere all of them are given.
    """

    distributed: bool = False
    """Train in several processes, started with the same flags each; the first one writes to --out."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached; needed where neither a TPU pod nor SLURM says it."""
    processes: Size | None = None
    """How many processes there are, with --coordinator."""
    process: Count | None = None
    """Which of them this is, from 0, with --coordinator."""


@dataclass(frozen=True)
class Flags(Cluster, Config):
    __doc__ = Config.__doc__

    preset: Preset | None = None
    """Settings of a paper; flags given explicitly win over it. From Python: ranjax.config.PRESETS."""


def parse(argv: list[str] | None = None) -> Config:
    """Reads the flags; their defaults are a preset, the settings that --resume finds, or the recipe of the data set."""
    program = "python -m ranjax.train"
    argv = _with_values(sys.argv[1:] if argv is None else argv)
    start, _ = cli.options(_Start, argv, program, return_unknown_args=True, add_help=False)
    default = PRESETS[start.preset] if start.preset else recipe(start.dataset, start.cell, start.block, start.gates)
    begun = normalised(Config(dataset=start.dataset, cell=start.cell, out=start.out, resume=start.resume))
    if not start.preset and goes_on(begun):
        default = replace(load_config(begun.directory), out=str(begun.directory))
    flags = vars(cli.options(Flags, argv, program, default=Flags(**vars(default))))
    config = normalised(Config(**{name: flags[name] for name in vars(default)}))
    if start.preset and config.block != "plain":
        raise UserError(
            f"--block {config.block} cannot go with --preset {start.preset}, whose settings are those of plain layers. "
            "Leave one of them out."
        )
    for name, schedule in (("warmup", "cosine"), ("decay", "decay"), ("decay_after", "decay")):
        taken = name == "warmup" and config.optimizer == "schedule_free"
        if config.schedule != schedule and not taken and getattr(config, name) != getattr(default, name):
            got = f"{getattr(config, name)} with {config.schedule}"
            raise UserError(f"{flag(name)} is for --schedule {schedule}; got {got}.")
    return config


def parse_cluster(argv: list[str] | None = None) -> Cluster:
    """Reads the flags of a process that is one of several."""
    found, _ = cli.options(Cluster, argv, "python -m ranjax.train", return_unknown_args=True, add_help=False)
    given = found.coordinator, found.processes, found.process
    if any(one is not None for one in given) and (None in given or not found.distributed):
        raise UserError("--coordinator, --processes and --process are given all together, with --distributed.")
    if None not in given and not 0 <= found.process < found.processes:
        raise UserError(f"--process must be from 0 to --processes - 1, {found.processes - 1}; got {found.process}.")
    return found


def _with_values(argv: Sequence[str]) -> list[str]:
    """The flags with a value of --resume where it has none, which tyro has no way to leave out of more than two."""
    words = ["--resume=False" if word == "--no-resume" else word for word in argv]
    return [
        "--resume=True" if word == "--resume" and after not in RESUME_WORDS else word
        for word, after in pairwise([*words, ""])
    ]
