"""What a run reports: a progress bar or plain lines, `metrics.jsonl`, `result.json`, `loss.png`."""

import json
import math
import os
import platform
import shlex
import time
import zlib
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from ranjax.cli import on_terminal, refusals, warn, write_whole
from ranjax.data import Corpus
from ranjax.data.vocabulary import unknown
from ranjax.errors import UserError
from ranjax.figure import blank_figure, write_figure
from ranjax.saved import Schema, is_count, is_number, is_text, parse_object, read_json
from ranjax.training.config import ITERATING, Config, kept
from ranjax.training.cost import Cost
from ranjax.training.folder import SameFolder
from ranjax.training.metrics import Evaluation, perplexity, shown
from ranjax.training.step import TrainState
from ranjax.training.track import Tracking

LOG_SECONDS = 15.0
ROW: Schema = {"step": is_count, "epoch": is_number, "train_perplexity": is_number}
# What is read of a finished training's result, where it is written again.
RESULT: Schema = {
    "valid_perplexities": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "train_perplexities": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "device": is_text,
    "devices": is_count,
    "date": is_text,
    "versions": lambda value: isinstance(value, dict),
}


class Report:
    """Follows one process of a run.

    Args:
      directory: of the run.
      config: its settings.
      windows: steps an epoch.
      first_step: where this process begins; what an earlier one logged beyond it is dropped.
      validated: epochs whose validation has been saved by then; what an earlier one logged of others is dropped.
      devices: how many it trains on.
      cost: of a step, which the rows with a speed have beside it; None where it is not known.

    Attributes:
      steps: how many this process has reported.
      at: the last of them.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        windows: int,
        first_step: int,
        validated: int,
        devices: int = 1,
        cost: Cost | None = None,
    ):
        self.directory, self.config, self.windows = directory, config, windows
        self.devices, self._cost = devices, cost
        self._same = SameFolder(directory)
        self.steps, self.at = 0, first_step
        before = read_rows(directory / "metrics.jsonl")
        self._tracking = Tracking(config.track, directory, kept(config), before)
        self._rows = [
            row
            for row in before
            if row["step"] <= first_step and ("valid_perplexity" not in row or row["epoch"] <= validated)
        ]
        with refusals(directory / "metrics.jsonl"):
            for left in directory.glob(".*.new"):  # by a program that was killed
                left.unlink()
            write_whole(directory / "metrics.jsonl", "".join(map(_line, self._rows)))
        self._console = Console(force_terminal=None if on_terminal() else False)  # whatever FORCE_COLOR says
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        columns = "{task.description}", BarColumn(None), "{task.fields[status]}", TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console, disable=not self._live)
        total = config.epochs * windows
        self._task = self._bar.add_task("epoch 1", total=total, completed=first_step, status="compiling")
        self._logged = time.monotonic()

    def __enter__(self) -> "Report":
        if self.at < self.config.epochs * self.windows:
            self._tracking.open()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._tracking.close()

    def progress(self, state: TrainState, steps: int, seconds: float) -> None:
        """After a burst of steps: the bar, and now and then a row and a line."""
        self.steps, self.at = self.steps + steps, int(state.step)
        speed = steps * self.config.batch_size * self.config.steps / seconds
        so_far = _so_far(state)
        status = f"{speed:,.0f} tokens/s, perplexity {shown(so_far)}"
        heading = f"epoch {int(state.epoch) + 1}/{self.config.epochs}"
        self._bar.update(self._task, advance=steps, description=heading, status=status)
        if time.monotonic() - self._logged > LOG_SECONDS or int(state.step) % self.windows == 0:
            self._logged = time.monotonic()
            done = int(state.step) / self.windows - int(state.epoch)
            cost = {} if self._cost is None else self._cost.row(steps / seconds)
            self._row(state, train_perplexity=so_far, tokens_per_second=speed, **cost)
            if not self._live:
                print(f"{heading} {done:4.0%}: {status}", flush=True)

    def epoch(self, state: TrainState, evaluation: Evaluation) -> None:
        """After a validation."""
        train = _so_far(state)
        self._row(state, train_perplexity=train, valid_perplexity=evaluation.perplexity)
        skipped = f", {int(state.bad)} steps skipped" if int(state.bad) else ""
        self._console.print(
            f"epoch {int(state.epoch)}: train {shown(train)}, valid {shown(evaluation.perplexity)}, "
            f"{float(state.seconds) / 60:.1f} minutes of training{skipped}",
            highlight=False,
            soft_wrap=True,
        )

    def interrupted(self) -> None:
        """After a wish to stop, the state being saved."""
        self._bar.stop()
        out = shlex.quote(str(self.directory))
        print(f"Stopped after step {self.at}, saved. Go on with: python -m ranjax.train --out {out} --resume")

    def result(self, corpus: Corpus, state: TrainState, test: Evaluation) -> dict[str, Any]:
        """Ends the run: `result.json`, `loss.png` and the last line."""
        timed = int(state.timed) * self.config.batch_size * self.config.steps
        epochs = [row for row in self._rows if "valid_perplexity" in row]
        valid = [row["valid_perplexity"] for row in epochs]
        result = {
            "dataset": corpus.name,
            "source": corpus.source,
            "test_perplexity": test.perplexity,
            "valid_perplexity": self._best(valid, perplexity(float(state.best))),
            "valid_perplexities": valid,
            "train_perplexities": [row["train_perplexity"] for row in epochs],
            "test_tokens": test.tokens,
            "test_nats": test.nats,
            "test_bits": test.bits,
            "tokens_per_second": timed / float(state.seconds) if int(state.timed) else None,
            "training_seconds": float(state.seconds),
            "skipped_steps": int(state.bad),
            "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
            "config": kept(self.config),
        } | self._process(valid)
        self._same.check()
        if not (self.directory / "result.json").exists():
            self._tracking.open()
        with refusals(self.directory):
            write_whole(self.directory / "result.json", json.dumps(result, indent=2) + "\n")
            if epochs:
                draw_loss(self._rows, self.windows, self.directory / "loss.png")
        self._tracking.close(result)
        line = test.line(corpus.vocabulary.unit, unknown(corpus.vocabulary, corpus.test[1:]))  # as of `ranjax.evaluate`
        print(f"test: {line}; saved in {self.directory}")
        return result

    def _best(self, valid: list[float], tested: float) -> float:
        """The lowest validation, with all its digits where its row has not been deleted."""
        lowest = min(valid, default=tested)
        return lowest if math.isclose(lowest, tested, rel_tol=1e-4) else tested

    def _process(self, valid_perplexities: list[float]) -> dict[str, Any]:
        """Device, date and versions of the process that ended a training with these validations.

        That is this one or, if it has only read a finished training again, one before; where the rows have all been
        deleted, its `result.json` is the only record of the curves.
        """
        computes = {"device": device(self.devices), "devices": self.devices}
        now = computes | {"date": date.today().isoformat(), "versions": versions()}
        if self.steps:
            return now
        try:
            saved = read_json(self.directory / "result.json", RESULT)
        except UserError:  # missing or damaged: it is written again
            return now
        if valid_perplexities not in ([], saved["valid_perplexities"]):
            return now
        return {name: saved[name] for name in RESULT}

    def _row(self, state: TrainState, **values: float) -> None:
        row = {"step": int(state.step), "epoch": int(state.step) / self.windows, **values}
        if self.config.solver in ITERATING:
            row["mean_iterations"] = float(state.iterations) / ((int(state.step) - 1) % self.windows + 1)
        row |= {"skipped_steps": int(state.bad), "training_seconds": float(state.seconds)}
        self._rows.append(row)
        path = self.directory / "metrics.jsonl"
        self._same.check()
        with refusals(path), path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self._tracking.row(row)


def _so_far(state: TrainState) -> float:
    """The perplexity of the epoch so far, in training."""
    return perplexity(float(state.loss) / max(int(state.tokens), 1))


def draw_loss(rows: list[dict[str, float]], windows: int, path: Path) -> None:
    """Perplexity against epochs: of the epoch so far in training, and of each validation."""
    figure = blank_figure(6.4, 4.0)
    axes = figure.subplots()
    train = [(row["epoch"], row["train_perplexity"]) for row in rows]
    valid = [(row["epoch"], row["valid_perplexity"]) for row in rows if "valid_perplexity" in row]
    axes.plot(*zip(*train, strict=True), color="0.6", label="train, the epoch so far")
    axes.plot(*zip(*valid, strict=True), "o-", color="C0", label="valid")
    axes.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    write_figure(figure, path)


class Silent:
    """What a process that is not the first has in place of a `Report`."""

    def __init__(self, *_: Any):
        self.steps = 0

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def progress(self, _: TrainState, steps: int, __: float) -> None:
        self.steps += steps

    def epoch(self, *_: Any) -> None:
        pass

    def interrupted(self) -> None:
        pass

    def result(self, *_: Any) -> dict[str, Any]:
        return {}


def device(number: int = 1) -> str:
    """What computes, for whoever compares times.

    Args:
      number: of the devices that do.
    """
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return f"{number} x {kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those it may use
    return "1 CPU core" if cores == 1 else f"{cores} CPU cores"


def versions() -> dict[str, str]:
    """Python and the packages a result depends on."""
    names = "ranjax", "jax", "flax", "optax", "numpy"
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # ranjax run from its sources, not installed
        return "not installed"


def _line(row: dict[str, float]) -> str:
    """A row as a line of `metrics.jsonl`, with its checksum."""
    return json.dumps(row | {"crc32": _checksum(row)}) + "\n"


def _checksum(row: dict[str, float]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a run so far. One that is damaged is left out, with a warning where no kill has cut it short."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_object(line.rstrip("\n"), ROW)
            if not all(map(is_number, row.values())):
                raise ValueError("it holds what is no number")
            if row.pop("crc32", None) not in (None, _checksum(row)):
                raise ValueError("it does not fit its checksum")
            rows.append(row)
        except ValueError as error:
            if line.endswith("\n"):
                warn(f"line {number} of {path} is left out: {error}.")
    return rows
