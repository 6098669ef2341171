"""Trainings in a row and the table they fill: what the studies in `experiments/` share.

A study is a program that asks a `Table` for the row of one training after another. A row that is there is returned, one
that is not is trained for; so a study that was cut off goes on when it is called again.
"""

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranjax.config import Config
from ranjax.errors import UserError
from ranjax.train import train_together


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
        return self.rows_of_seeds(config, [config.seed], measure, **labels)[0]

    def rows_of_seeds(
        self,
        config: Config,
        seeds: Iterable[int],
        measure: Callable[[Path], dict[str, Any]] = lambda run: {},
        **labels: str | int,
    ) -> list[dict[str, Any]]:
        """The same of several seeds; those that are not in the table are trained side by side.

        Where that fails they are trained one after another: the seeds before the one that fails have their rows.
        """
        configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
        missing = [config for config in configs if self._found(config, labels) is None]
        runs = [self._run(config, labels) for config in missing]
        try:
            results = train_together(runs) if runs else []
        except UserError:
            if len(runs) == 1:
                raise
            return [self.row(config, measure, **labels) for config in configs]
        for result, run in zip(results, runs, strict=True):
            self.rows.append(labels | _row(result) | measure(run.directory))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        return [row for config in configs if (row := self._found(config, labels))]

    def _found(self, config: Config, labels: dict[str, Any]) -> dict[str, Any] | None:
        of = (row for row in self.rows if labels.items() <= row.items())
        return next((row for row in of if _settings(row["config"]) == _settings(config)), None)

    def _run(self, config: Config, labels: dict[str, Any]) -> Config:
        """The settings of the run that is to be, or to go on."""
        name = [*map(str, labels.values()), _name(config)]
        print(f"== {', '.join(name)}", flush=True)
        name = "-".join(re.sub(r"[^\w.]+", "-", part) for part in name)
        out = Path(self.options.runs).resolve() / name
        where = {"out": str(out), "resume": out.exists(), "data_dir": self.options.data_dir}
        return dataclasses.replace(config, **where)


def rounds(seeds: int) -> list[list[int]]:
    """The seeds that are trained side by side: all of them on a GPU or TPU, one after another on a CPU."""
    import jax

    return [[seed] for seed in range(seeds)] if jax.default_backend() == "cpu" else [list(range(seeds))]


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
    row |= {"side_by_side": result["side_by_side"]}
    return (
        row | {"device": result["device"], "date": result["date"]} | {"config": config, "versions": result["versions"]}
    )
