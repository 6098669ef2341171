"""The table that a study fills, a row for each training.

A study asks a `Table` for the row of one training after another. A row that is there is returned, one that is not is
trained for; so a study that was cut off goes on when it is called again.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ranjax.training.config import Config, normalised
from ranjax.data import load_corpus
from ranjax.errors import DivergedError, UserError, refusals
from ranjax.evaluate import MOST
from ranjax.training.report import device, versions
from ranjax.train import train_together

EVERY_EPOCH = ("valid_perplexities", "train_perplexities")


class Table:
    """The rows of a study, one a training, in `results.jsonl`.

    Args:
      folder: where it is, and the study's pictures beside it.
      runs: folder that keeps the runs while the study lasts.
      data_dir: folder of the data sets; without it WikiText and text8 are downloaded.

    Raises:
      UserError: a line of the file is not a row in JSON.
    """

    def __init__(self, folder: Path, runs: Path, data_dir: str | None = None):
        self.folder, self.runs, self.data_dir = folder, runs, data_dir
        self.path = self.folder / "results.jsonl"
        self.rows = _read(self.path)
        if self.rows:
            print(f"{len(self.rows)} rows are in {self.path}: not trained for again (--out DIR: a table of its own)")

    def row(
        self, config: Config, measure: Callable[[Path], dict[str, Any]] = lambda run: {}, **labels: str | int
    ) -> dict[str, Any]:
        """The row of one training: from the table, or trained now.

        Args:
          config: its settings; `data_dir`, `out` and `resume` are the table's to choose.
          measure: what else the row says of a trained run, from its directory.
          labels: what the study calls it, such as its part and its model; together with the settings they tell one
            row from another.
        """
        return self.rows_of_seeds(config, [config.seed], measure, **labels)[0]

    def rows_of_seeds(
        self,
        config: Config,
        seeds: Iterable[int],
        measure: Callable[[Path], dict[str, Any]] = lambda run: {},
        **labels: str | int,
    ) -> list[dict[str, Any]]:
        """The same of several seeds; those that are not in the table are trained side by side.

        One that diverges has a row too, without perplexities. Side by side it ends them all: they are then trained one
        after another.
        """
        config = normalised(config)
        configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
        self.rows = _read(self.path)
        missing = list(dict.fromkeys(config for config in configs if self._found(config, labels) is None))
        if missing:
            self._check_text(config)
            self.folder.mkdir(parents=True, exist_ok=True)
        runs = [self._run(config, labels) for config in missing]
        try:
            results = train_together(runs) if runs else []
            rows = [_row(result) | measure(run.directory) for result, run in zip(results, runs, strict=True)]
        except DivergedError as error:
            if len(runs) > 1:
                return [self.row(config, measure, **labels) for config in configs]
            print(f"diverged: {error}", flush=True)
            rows = [_row(_without_figures(runs[0]))]
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")  # an editor may leave it so
        with refusals(self.path, "the same command goes on"), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + "".join(json.dumps(labels | row) + "\n" for row in rows))
        self.rows = _read(self.path)  # another program may have added some
        return [row for config in configs if (row := self._found(config, labels))]

    def best(self, config: Config, name: str, values: Sequence, short: dict[str, Any], **labels: Any) -> Any:
        """The value of a setting with the lowest validation perplexity.

        Where that is the lowest or the highest of the learning rates, its half or its double is tried too, and so on
        for three times at most.

        Args:
          config: the other settings.
          name: of the setting.
          values: what is tried, the lowest first.
          short: what a trial has different, such as fewer epochs.
          labels: of the trials' rows.
        """
        values = list(values)
        for _ in range(4):
            tried = [dataclasses.replace(config, **{name: one}, **short) for one in values]
            losses = [value(self.row(one, **labels), "valid_perplexity") for one in tried]
            best = values[losses.index(min(losses))]
            if name != "learning_rate" or best not in (values[0], values[-1]):
                break
            values = [best / 2, *values] if best == values[0] else [*values, 2 * best]
        return best

    def _check_text(self, config: Config) -> None:
        """Raises a UserError where the rows of this data set are of another text."""
        corpus = load_corpus(config.dataset, self.data_dir, config.tokenizer)
        tokens = len(corpus.test) - 1
        for row in self.rows:
            settings, told = _settings(row["config"]), row.get("tokens")
            of = settings["dataset"], settings["tokenizer"]
            if of == (config.dataset, config.tokenizer) and told not in (None, tokens):
                raise UserError(
                    f"the rows of {config.dataset} in {self.path} are of another text: {told} test tokens, "
                    f"where {corpus.source} has {tokens} (the embedded corpora change with the version of Python). "
                    "Give --out DIR for a table of its own."
                )

    def _found(self, config: Config, labels: dict[str, Any]) -> dict[str, Any] | None:
        of = (row for row in self.rows if labels.items() <= row.items())
        return next((row for row in of if _settings(row["config"]) == _settings(config)), None)

    def _run(self, config: Config, labels: dict[str, Any]) -> Config:
        """The settings of the run that is to be, or to go on."""
        parts = [*map(str, labels.values()), _name(config)]
        print(f"== {', '.join(parts)}", flush=True)
        name = "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts)
        out = self.runs.resolve() / name
        where = {"out": str(out), "resume": out.exists(), "data_dir": self.data_dir}
        return dataclasses.replace(config, **where)


def value(row: dict[str, Any], name: str) -> float:
    """A figure of a row, such as `"valid_perplexity"`: infinite if it diverged."""
    found = row[name]
    return math.inf if found is None else found


def chosen(rows: Iterable[dict[str, Any]], **labels: str | int) -> list[dict[str, Any]]:
    """The rows of these labels, of all seeds, with the settings that came out best with seed 0.

    Example:
      >>> from harness.table import chosen
      >>> tried = [(0, 0.1, 109.0), (0, 0.4, None), (1, 0.1, 112.0)]  # None: it diverged
      >>> rows = [{"config": {"features": [8], "seed": s, "dropout": d}, "valid_perplexity": p} for s, d, p in tried]
      >>> [row["valid_perplexity"] for row in chosen(rows)]
      [109.0, 112.0]
    """
    of = [(_settings(row["config"]), row) for row in rows if labels.items() <= row.items()]
    first = [(settings, row) for settings, row in of if settings["seed"] == 0]
    if not first:
        return []
    best, _ = min(first, key=lambda pair: value(pair[1], "valid_perplexity"))
    return [row for settings, row in of if settings | {"seed": 0} == best]


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, if it is there."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            config = row.get("config") if isinstance(row, dict) else None
            if not isinstance(config, dict) or "features" not in config:
                raise ValueError("it has no settings")
            if unknown := config.keys() - vars(Config()).keys():
                raise ValueError(f"this version does not know its settings {', '.join(sorted(unknown))}")
        except ValueError as error:  # neither JSON nor UTF-8 is one too
            began = line[:40].decode(errors="replace")
            raise UserError(
                f"line {number} of {path} must be the JSON of one row; got {began!r} ({error}). If it was cut off "
                "while it was written, delete it: its run is still in the folder of runs, and writes it again."
            ) from None
        rows.append(row)
    return rows


def _settings(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Settings that make a difference to a result; those that are not in a saved row are at their defaults."""
    if isinstance(config, dict):
        saved: dict[str, Any] = {**config, "features": tuple(config["features"])}
        config = Config(**saved)
    return dataclasses.asdict(dataclasses.replace(config, out=None, resume=False, data_dir=None))


def _name(config: Config) -> str:
    """The settings that tell runs of one model apart, in a line."""
    return f"{config.epochs} epochs, dropout {config.dropout:g}, rate {config.learning_rate:g}, seed {config.seed}"


def _without_figures(config: Config) -> dict[str, Any]:
    """The result of a training that diverged."""
    names = "test_perplexity valid_perplexity test_bits tokens_per_second test_tokens parameters training_seconds"
    about = {"dataset": config.dataset, "config": dataclasses.asdict(config), "side_by_side": 1}
    about |= {"device": device(), "date": date.today().isoformat(), "versions": versions()}
    return dict.fromkeys([*names.split(), *EVERY_EPOCH]) | about


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """What a row says of a training's `result.json`."""
    config = _settings(result["config"])
    row = {"dataset": result["dataset"]}
    row |= {name: config[name] for name in ("cell", "gates", "activation", "seed", "dropout", "learning_rate")}
    row |= {name: _finite(result[name]) for name in ("test_perplexity", "valid_perplexity")}
    row |= {name: [_finite(perplexity) for perplexity in result[name] or ()] for name in EVERY_EPOCH}
    row |= {name: result[name] for name in ("test_bits", "tokens_per_second")}
    row |= {"tokens": result["test_tokens"], "parameters": result["parameters"], "seconds": result["training_seconds"]}
    row |= {name: result[name] for name in ("side_by_side", "device", "date")}
    return row | {"config": config, "versions": result["versions"]}


def _finite(perplexity: float | None) -> float | None:
    """None for one beyond all figures."""
    return None if perplexity == MOST else perplexity
