"""What is tried to break trainings and programs: `python benchmarks/robustness.py` writes results/ and prints a table.

Trainings are killed at random moments and resumed, bits are flipped in the files of a run, the system refuses writes,
programs and functions are called wrongly. A trial holds if nothing is lost, no answer is wrong, and every refusal is
one line. `docs/robustness.md` says what each of them does.
"""

import datetime
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import robustness_calls
import robustness_trials
import timing
import tyro
from robustness_runs import Outcome, Place, Process, called, limited, not_refused

from ranjax import cli
from ranjax.training.report import device, versions

Trial = Literal["kills", "flips", "writes", "calls"]


@dataclass(frozen=True)
class Options:
    """What is tried to break trainings and programs."""

    kills: int = 200
    """Number of kills of a training, at least."""
    flips: int = 500
    """Number of bits flipped in the files of a run."""
    writes: int = 20
    """Number of refused writes."""
    calls: str = "all"
    """Number of wrong calls, drawn from the table, or all."""
    seed: int = 0
    """Of all that is drawn. When a kill meets a program depends on the machine, too."""
    only: Annotated[tuple[Trial, ...], tyro.conf.UseAppendAction] = ()
    """These trials alone; all if not given. May be repeated."""
    jobs: int = 2
    """Trainings that are killed side by side."""
    out: Path = Path(__file__).parent / "results"
    """Folder of the results."""
    table: tuple[Path, ...] = ()
    """Prints the table of these results, and tries nothing."""


class Tally:
    """Counts outcomes by what was tried."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, outcome: Outcome) -> None:
        """Counts it; the first example of each kind of failure is kept."""
        new = {"trial": outcome.trial, "kind": outcome.kind, "tried": 0, "held": 0, "failures": {}}
        row = self._rows.setdefault(outcome[:2], new)
        row["tried"] += 1
        row["held"] += outcome.failure is None
        if outcome.failure is not None:
            failure = row["failures"].setdefault(outcome.failure, {"count": 0, "example": outcome.example})
            failure["count"] += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        order = list(dict.fromkeys(trial for trial, _ in self._rows))
        return [self._rows[key] for key in sorted(self._rows, key=lambda key: (order.index(key[0]), key[1]))]

    @property
    def counts(self) -> tuple[int, int]:
        """How many were tried, and how many held."""
        return sum(row["tried"] for row in self.rows), sum(row["held"] for row in self.rows)


def calls(place: Place, number: str, seed: int) -> Iterator[Outcome]:
    """The wrong calls of the table, or so many of each half of it."""
    run, out = place.reference.run, place.new()
    (place.directory / "empty").mkdir(exist_ok=True)
    lines = list(robustness_calls.command_lines())
    python = list(robustness_calls.python_calls(run, place.text, out))
    if number != "all":
        draw = random.Random(f"{seed} call")
        lines, python = (draw.sample(table, min(len(table), -(-int(number) // 2))) for table in (lines, python))
    for line in lines:
        yield _called(line, place, out)
    for call in python:
        yield _called_from_python(call)
        shutil.rmtree(out, ignore_errors=True)


def _called(call: robustness_calls.Call, place: Place, out: Path) -> Outcome:
    known = {"text": place.text, "run": place.reference.run, "out": out, "place": place.directory}
    argv = [word.format(**known) if "{" in word else word for word in call.argv]
    answer = Process(call.program, argv).answer() if call.alone else called(call.program, argv)
    failure = not_refused(answer, call.named.format(**known))
    if out.exists():
        failure = failure or "a run was begun"
        shutil.rmtree(out)
    example = f"{' '.join(call.argv)!r:.150}: {answer}"
    return Outcome("wrong calls", call.program, failure, example)


def _called_from_python(call: robustness_calls.PythonCall) -> Outcome:
    failure, example = "accepted", call.text
    try:
        with limited(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            call.call()
    except (ValueError, TypeError) as error:
        failure = None if call.named.lower() in str(error).lower() else "an error that does not name the argument"
        example = f"{call.text}: {type(error).__name__}: {error!s:.200}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        failure, example = f"a {type(error).__name__}", f"{call.text}: {error!s:.200}"
    return Outcome("wrong calls", "from Python", failure, example)


def trials(place: Place, options: Options) -> Iterator[Outcome]:
    """All that is asked for."""
    every: dict[str, Callable[[], Iterator[Outcome]]] = {
        "kills": lambda: robustness_trials.kills(place, options.kills, options.seed, options.jobs),
        "flips": lambda: robustness_trials.flips(place, options.flips, options.seed),
        "writes": lambda: robustness_trials.writes(place, options.writes, options.seed),
        "calls": lambda: calls(place, options.calls, options.seed),
    }
    for name in options.only or every:
        yield from every[name]()


def table(found: dict[str, Any]) -> str:
    """The counts of a result file in Markdown, failures below."""
    lines = [f"{found['device']}, {found['date']}, jax {found['versions']['jax']}, seed {found['seed']}:", ""]
    lines += ["| tried | how | tried | held |", "| --- | --- | --- | --- |"]
    lines += ["| {trial} | {kind} | {tried} | {held} |".format(**row) for row in found["rows"]]
    tried, held = (sum(row[name] for row in found["rows"]) for name in ("tried", "held"))
    lines += [f"| all | | {tried} | {held} |", ""]
    for row in found["rows"]:
        for failure, of in row["failures"].items():
            lines.append(f"- {row['trial']}, {row['kind']}: {failure} ({of['count']}). First: `{of['example']}`")
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.table:
        print("\n".join(table(json.loads(path.read_text())) for path in options.table))
        return
    stamp = {"device": device(), "date": datetime.date.today().isoformat()}
    stamp |= {"versions": versions(), "seed": options.seed}
    tally = Tally()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for outcome in trials(Place(Path(folder)), options):
            tally.add(outcome)
            if outcome.failure is not None:
                print(f"{outcome.trial}, {outcome.kind}: {outcome.failure}: {outcome.example}", file=sys.stderr)
    path = timing.write(options.out, "robustness", stamp, tally.rows)
    print(table(json.loads(path.read_text())))
    tried, held = tally.counts
    if held < tried:
        raise SystemExit(1)


def remember_compilations(folder: str) -> None:
    """What is compiled for many trials in this process is compiled once."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        remember_compilations(cache)
        main(cli.options(Options, None, "python benchmarks/robustness.py"))
