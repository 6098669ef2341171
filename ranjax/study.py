"""Trainings in a row and the table they fill: what the studies in `experiments/` share.

A study is a program that asks a `Table` for the row of one training after another. A row that is there is returned, one
that is not is trained for; so a study that was cut off goes on when it is called again.
"""

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranjax.config import Config
from ranjax.errors import UserError
from ranjax.train import train


@dataclass(frozen=True)
class Options:
    """What every study takes."""

    data_dir: str | None = None
    """Folder of the data sets; without it they are downloaded."""
    runs: str = "runs"
    """Folder that keeps the runs while the study lasts."""
    minutes: float | None = None
    """Stop after so many minutes, saved; the same command goes on."""


class Table:
    """The rows of a study, one a training, in a file of JSON lines.

    Args:
      path: the file; made with the first row.
      options: where the data and the runs are.
    """

    def __init__(self, path: Path, options: Options):
        self.path, self.options = path, options
        self.rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

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
        for row in self.rows:
            if _settings(row["config"]) == _settings(config) and labels.items() <= row.items():
                return row
        name = [*map(str, labels.values()), _name(config)]
        print(f"== {', '.join(name)}", flush=True)
        name = "-".join(re.sub(r"[^\w.]+", "-", part) for part in name)
        out = Path(self.options.runs).resolve() / name
        where = {"out": str(out), "resume": out.exists(), "data_dir": self.options.data_dir}
        self.rows.append(labels | _row(train(dataclasses.replace(config, **where))) | measure(out))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        return self.rows[-1]


@contextmanager
def budget(minutes: float | None) -> Iterator[None]:
    """Ends what is being trained after so many minutes, saved, as Ctrl-C does."""
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes must be above 0; got {minutes}.")
    if minutes is None:
        yield
        return
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _settings(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Settings that make a difference to a result; those that are not in a saved row are at their defaults."""
    if isinstance(config, dict):
        saved: dict[str, Any] = {**config, "features": tuple(config["features"])}
        config = Config(**saved)
    return dataclasses.asdict(dataclasses.replace(config, out=None, resume=False, data_dir=None))


def _name(config: Config) -> str:
    """The settings that tell runs of one model apart, in a line."""
    return f"{config.epochs} epochs, dropout {config.dropout:g}, rate {config.learning_rate:g}, seed {config.seed}"


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """What a row says of a training's `result.json`."""
    config = _settings(result["config"])
    names = "cell", "gates", "activation", "seed", "dropout", "learning_rate"
    row = {"dataset": result["dataset"], **{name: config[name] for name in names}}
    row |= {name: result[name] for name in ("test_perplexity", "valid_perplexity", "test_bits", "tokens_per_second")}
    row |= {"tokens": result["test_tokens"], "parameters": result["parameters"], "seconds": result["training_seconds"]}
    return (
        row | {"device": result["device"], "date": result["date"]} | {"config": config, "versions": result["versions"]}
    )
