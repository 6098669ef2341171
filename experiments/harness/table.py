"""The table of a study: one row for each training.

A study asks a `Table` for the row of each of its trainings. A recorded row is returned, a missing one is trained for.
A study that was stopped is therefore continued by running it again.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ranjax.cli import Stop, refusals
from ranjax.data import load_corpus
from ranjax.errors import DivergedError, UserError
from ranjax.training.config import Config, normalised
from ranjax.training.loss import Constraint, unconstrained
from ranjax.training.metrics import MOST
from ranjax.training.report import device, versions
from ranjax.training.run import train

EVERY_EPOCH = ("valid_perplexities", "train_perplexities")
FIGURES = (
    "test_perplexity",
    "valid_perplexity",
    "test_bits",
    "tokens_per_second",
    "test_tokens",
    "parameters",
    "training_seconds",
    *EVERY_EPOCH,
)

Measure = Callable[[Path], dict[str, Any]]  # further values of a row, from the directory of its run


def nothing_more(run: Path) -> dict[str, Any]:
    """The usual measure: a row has no further values."""
    return {}


class Table:
    """The rows of a study, one for each training, in `results.jsonl`.

    Args:
      folder: of the table; the study's pictures are beside it.
      runs: folder of the runs, needed until the study is complete.
      data_dir: folder of the data sets; without it WikiText and text8 are downloaded.
      stop: read before and during each training. None: each training listens for signals itself.

    Raises:
      UserError: for a line of the file that is not the JSON of a row.
    """

    def __init__(self, folder: Path, runs: Path, data_dir: str | None = None, stop: Stop | None = None):
        self.folder, self.runs, self.data_dir, self.stop = folder, runs, data_dir, stop
        self.path = self.folder / "results.jsonl"
        self.rows = _read(self.path)
        if self.rows:
            print(f"Recorded runs are skipped: {len(self.rows)} rows in {self.path} (--out DIR for another table)")

    def row(
        self,
        config: Config,
        measure: Measure = nothing_more,
        constrain: Constraint = unconstrained,
        **labels: str | int,
    ) -> dict[str, Any]:
        """The row of one training: the recorded one, or that of a run trained now.

        A training that diverges has a row too, without figures.

        Args:
          config: the settings; the table chooses `data_dir`, `out` and `resume`.
          measure: further values of the row, from the directory of the finished run. They replace those of the same
            name.
          constrain: see `ranjax.training.run.train`. It must be the same for all trainings with the same labels.
          labels: what identifies the row beside the settings, such as the names of the study and of the model.

        Raises:
          UserError: for bad settings; where other rows of the data set were computed on another text.
          Stopped: after a signal, or at the end of the time limit; the run is saved.
        """
        config = normalised(config)
        self.rows = _read(self.path)  # another program may have added some
        recorded = self._recorded(config, labels)
        if recorded is not None:
            return recorded
        if self.stop is not None:
            self.stop.check()
        self._check_text(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._append(labels | self._trained(self._run(config, labels), measure, constrain))
        self.rows = _read(self.path)
        recorded = self._recorded(config, labels)
        assert recorded is not None
        return recorded

    def best(self, config: Config, name: str, values: Sequence, short: dict[str, Any], **labels: Any) -> Any:
        """The value of a setting with the lowest validation perplexity.

        If that is the lowest or the highest of the learning rates, its half or its double is tried too, at most three
        times.

        Args:
          config: the other settings.
          name: of the setting.
          values: the values to try, in ascending order.
          short: settings of the trials only, such as fewer epochs.
          labels: of the rows of the trials.
        """
        values = list(values)
        for _ in range(4):
            trials = [dataclasses.replace(config, **{name: one}, **short) for one in values]
            losses = [value(self.row(trial, **labels), "valid_perplexity") for trial in trials]
            best = values[losses.index(min(losses))]
            if name != "learning_rate" or best not in (values[0], values[-1]):
                break
            values = [best / 2, *values] if best == values[0] else [*values, 2 * best]
        return best

    def _trained(self, config: Config, measure: Measure, constrain: Constraint) -> dict[str, Any]:
        """The row of a training that runs now, without its labels."""
        try:
            result = train(config, constrain=constrain, stop=self.stop)
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            return _row(_without_figures(config))
        return _row(result) | measure(config.directory)

    def _append(self, row: dict[str, Any]) -> None:
        """Adds a row to the file, on a line of its own even if an editor left the last line without an end."""
        unfinished = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with refusals(self.path, "the same command goes on"), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * unfinished + json.dumps(row) + "\n")

    def _check_text(self, config: Config) -> None:
        """Raises a UserError if the rows of this data set were computed on another text."""
        corpus = load_corpus(config.dataset, self.data_dir, config.tokenizer)
        tokens = len(corpus.test) - 1
        for row in self.rows:
            settings, recorded = _settings(row["config"]), row.get("tokens")
            same = (settings["dataset"], settings["tokenizer"]) == (config.dataset, config.tokenizer)
            if same and recorded not in (None, tokens):
                raise UserError(
                    f"the rows of {config.dataset} in {self.path} are of another text: {recorded} test tokens, "
                    f"where {corpus.source} has {tokens} (the embedded corpora change with the version of Python). "
                    "Give --out DIR for a table of its own."
                )

    def _recorded(self, config: Config, labels: dict[str, Any]) -> dict[str, Any] | None:
        """The row with these labels and settings, if there is one."""
        expected = _settings(config)
        for row in self.rows:
            if labels.items() <= row.items() and _settings(row["config"]) == expected:
                return row
        return None

    def _run(self, config: Config, labels: dict[str, Any]) -> Config:
        """The settings of a run to begin, or to continue."""
        parts = [*map(str, labels.values()), _name(config)]
        print(f"== {', '.join(parts)}", flush=True)
        name = "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts)
        out = self.runs.resolve() / name
        return dataclasses.replace(config, out=str(out), resume=out.exists(), data_dir=self.data_dir)


def value(row: dict[str, Any], name: str) -> float:
    """A figure of a row, such as `"valid_perplexity"`; infinite if the training diverged."""
    figure = row[name]
    return math.inf if figure is None else figure


def chosen(rows: Iterable[dict[str, Any]], **labels: str | int) -> list[dict[str, Any]]:
    """The rows with these labels, of all seeds, whose settings have the lowest validation perplexity with seed 0.

    Example:
      >>> from harness.table import chosen
      >>> tried = [(0, 0.1, 109.0), (0, 0.4, None), (1, 0.1, 112.0)]  # None: it diverged
      >>> rows = [{"config": {"features": [8], "seed": s, "dropout": d}, "valid_perplexity": p} for s, d, p in tried]
      >>> [row["valid_perplexity"] for row in chosen(rows)]
      [109.0, 112.0]
    """
    labelled = [(_settings(row["config"]), row) for row in rows if labels.items() <= row.items()]
    first = [(settings, row) for settings, row in labelled if settings["seed"] == 0]
    if not first:
        return []
    best, _ = min(first, key=lambda pair: value(pair[1], "valid_perplexity"))
    return [row for settings, row in labelled if settings | {"seed": 0} == best]


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            config = row.get("config") if isinstance(row, dict) else None
            if not isinstance(config, dict) or "features" not in config:
                raise ValueError("it has no settings")
            if unknown := config.keys() - vars(Config()).keys():
                raise ValueError(f"this version does not know its settings {', '.join(sorted(unknown))}")
        except ValueError as error:  # also of bytes that are not JSON, or not UTF-8
            began = line[:40].decode(errors="replace")
            raise UserError(
                f"line {number} of {path} must be the JSON of one row; got {began!r} ({error}). If it was cut off "
                "while it was written, delete it: its run is still in the folder of runs, and writes it again."
            ) from None
        rows.append(row)
    return rows


def _settings(config: Config | dict[str, Any]) -> dict[str, Any]:
    """The settings that affect a result; those missing from a recorded row are at their defaults."""
    if isinstance(config, dict):
        saved: dict[str, Any] = {**config, "features": tuple(config["features"])}
        config = Config(**saved)
    elsewhere = {"out": None, "resume": False, "data_dir": None, "track": (), "profile_dir": None}
    return dataclasses.asdict(dataclasses.replace(config, **elsewhere))


def _name(config: Config) -> str:
    """One line with the settings in which the runs of one model differ."""
    return f"{config.epochs} epochs, dropout {config.dropout:g}, rate {config.learning_rate:g}, seed {config.seed}"


def _without_figures(config: Config) -> dict[str, Any]:
    """The result of a training that diverged."""
    about = {"dataset": config.dataset, "config": dataclasses.asdict(config)}
    about |= {"device": device(), "date": date.today().isoformat(), "versions": versions()}
    return dict.fromkeys(FIGURES) | about


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """The row of a training, from its `result.json`."""
    config = _settings(result["config"])
    row = {"dataset": result["dataset"]}
    row |= {name: config[name] for name in ("cell", "gates", "activation", "seed", "dropout", "learning_rate")}
    row |= {name: _finite(result[name]) for name in ("test_perplexity", "valid_perplexity")}
    row |= {name: [_finite(perplexity) for perplexity in result[name] or ()] for name in EVERY_EPOCH}
    row |= {name: result[name] for name in ("test_bits", "tokens_per_second")}
    row |= {"tokens": result["test_tokens"], "parameters": result["parameters"], "seconds": result["training_seconds"]}
    row |= {name: result[name] for name in ("device", "date")}
    return row | {"config": config, "versions": result["versions"]}


def _finite(perplexity: float | None) -> float | None:
    """None for a perplexity too large to be written."""
    return None if perplexity == MOST else perplexity
