"""Runs side by side: what each is, how far it is, how good and how fast; as a table and as a picture."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from ranjax.cli import printable, warn
from ranjax.data import is_named
from ranjax.data.vocabulary import Vocabulary, load_vocabulary
from ranjax.errors import UserError, check_path
from ranjax.figure import blank_figure, write_figure
from ranjax.saved import is_text, read_json, read_sealed
from ranjax.training.config import Config, load_config
from ranjax.training.exported import RESULT
from ranjax.training.folder import absolute
from ranjax.training.metrics import shown
from ranjax.training.model import TENSORS
from ranjax.training.report import read_rows
from ranjax.training.size import kind_of, parameter_count

HEADINGS = (
    "run", "data set", "tokens of", "cell", "parameters", "epochs", "trained on", "valid", "test", "minutes",
    "tokens/s", "device",
)  # fmt: skip
LEFT = "run", "data set", "tokens of", "cell", "device"  # columns of text
# Okabe and Ito 2008, which the colour-blind can tell apart, without yellow; markers and lines differ, too.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
MARKERS, LINES = "os^Dv<>P", ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Compared:
    """What is known of a run, finished or not.

    Attributes:
      name: of its directory; its path, where another has that name.
      config: its settings.
      vocabulary: its tokens.
      texts: what identifies its validation and test texts.
      rows: of `metrics.jsonl`.
      result: of a run that is finished, the content of `result.json`.
      device: that it was trained on.
    """

    name: str
    config: Config
    vocabulary: Vocabulary
    texts: str
    rows: list[dict[str, float]]
    result: dict[str, Any] | None
    device: str

    @cached_property
    def curve(self) -> list[tuple[float, float, float]]:
        """Epochs, minutes of training and perplexity at each validation."""
        rows = [row for row in self.rows if "valid_perplexity" in row]
        return [(row["epoch"], row.get("training_seconds", math.nan) / 60, row["valid_perplexity"]) for row in rows]

    @property
    def label(self) -> str:
        return self.name if self.result else f"{self.name} (unfinished)"

    def cells(self) -> tuple[str, ...]:
        """Its row of the table, one text for each of `HEADINGS`."""
        config, last = self.config, self.rows[-1] if self.rows else {}
        best = min((perplexity for *_, perplexity in self.curve), default=None)
        speeds = [row["tokens_per_second"] for row in self.rows if "tokens_per_second" in row]
        speed = (self.result or {}).get("tokens_per_second") or (speeds[-1] if speeds else None)
        return (
            self.name,
            config.dataset if is_named(config.dataset) else Path(config.dataset).name,
            f"{self.vocabulary.tokenizer}, {len(self.vocabulary):,}",
            kind_of(config),
            f"{parameter_count(config, len(self.vocabulary)):,}",
            f"{last.get('epoch', 0):.3g} of {config.epochs}",
            f"{last.get('step', 0) * config.batch_size * config.steps:,}",
            self._figure(best),
            self._figure(self.result["test_perplexity"]) if self.result else "unfinished",
            f"{last.get('training_seconds', 0) / 60:.1f}",
            "-" if speed is None else f"{speed:,.0f}",
            self.device,
        )

    def _figure(self, perplexity: float | None) -> str:
        if perplexity is None:
            return "-"
        bits = self.vocabulary.unit and f"{math.log2(perplexity):.3f} bits/{self.vocabulary.unit}"
        return bits or shown(perplexity)


def read_runs(directories: Sequence[str | Path]) -> list[Compared]:
    """What is known of some runs; nothing of them is changed.

    Args:
      directories: the `--out` directories of two runs or more, also of some that are being trained.

    Raises:
      UserError: for fewer than two, for one twice, and for a directory that is no run.
    """
    for directory in directories:
        check_path("directories", directory)
    paths = [absolute(directory) for directory in directories]
    if len(set(paths)) < max(2, len(paths)):
        got = ", ".join(map(str, directories)) or "none"
        raise UserError(f"give the --out directories of two or more runs, each once; got {got}.")
    names = [path.name for path in paths]
    given = zip(paths, directories, names, strict=True)
    return [_read(path, name if names.count(name) == 1 else str(directory)) for path, directory, name in given]


def _read(path: Path, name: str) -> Compared:
    config = load_config(path)
    if (path / TENSORS).exists():
        raise UserError(f"{path} is an exported model, which has no curves. Give the run that it was exported from.")
    texts = read_sealed(path / "text.json", dict.fromkeys(("valid", "test"), lambda value: isinstance(value, dict)))
    result = read_json(path / "result.json", RESULT) if (path / "result.json").exists() else None
    if result and result["config"].get("epochs") != config.epochs:
        result = None  # of the epochs before it was resumed
    return Compared(
        name=printable(name),
        config=config,
        vocabulary=load_vocabulary(path / "vocabulary.json"),
        texts=json.dumps([texts["valid"], texts["test"]], sort_keys=True),
        rows=read_rows(path / "metrics.jsonl"),
        result=result,
        device=(result or read_sealed(path / "environment.json", {"device": is_text}))["device"],
    )


def warn_if_not_comparable(runs: Sequence[Compared]) -> None:
    """Warns where the runs were not validated and tested on the same text in the same tokens."""
    groups: dict[tuple, list[str]] = {}
    for run in runs:
        groups.setdefault((run.texts, run.vocabulary), []).append(run.name)
    if len(groups) > 1:
        named = "; ".join(", ".join(names) for names in groups.values())
        warn(f"perplexities are not comparable across texts or tokenizers, and these runs differ in them: {named}.")


def table(runs: Sequence[Compared], width: float = math.inf) -> str:
    """The runs as lines of a table, one a run below the headings; as a list for each run, where a line is too wide.

    Args:
      runs: what `read_runs` returns.
      width: of the terminal, in characters.
    """
    rows = [HEADINGS, *(tuple(printable(cell) for cell in run.cells()) for run in runs)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width:
        longest = max(map(len, HEADINGS))
        lists = [
            [f"{heading:{longest}}  {cell}" for heading, cell in zip(HEADINGS, row, strict=True)] for row in rows[1:]
        ]
        return "\n\n".join(map("\n".join, lists))
    lines = []
    for row in rows:
        columns = zip(row, widths, HEADINGS, strict=True)
        padded = [(cell, " " * (width - cell_len(cell)), heading in LEFT) for cell, width, heading in columns]
        lines.append("  ".join(cell + space if left else space + cell for cell, space, left in padded).rstrip())
    return "\n".join(lines)


def draw(runs: Sequence[Compared], path: Path) -> None:
    """Writes a picture of the validations of some runs as PNG: over epochs, and over minutes of training."""
    units = {run.vocabulary.unit for run in runs}
    unit = units.pop() if len(units) == 1 else None
    figure = blank_figure(9.6, 4.0 + 0.22 * len(runs))
    over_epochs, over_minutes = figure.subplots(1, 2, sharey=True)
    for n, run in enumerate(runs):
        style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4}
        style |= {"linestyle": LINES[n // len(COLOURS) % len(LINES)], "label": _plain(run.label)}
        epochs, minutes, values = zip(*run.curve, strict=True) if run.curve else ((), (), ())
        heights = [math.log2(value) for value in values] if unit else values
        over_epochs.plot(epochs, heights, **style)
        over_minutes.plot(minutes, heights, **style)
    for axes, label in ((over_epochs, "epoch"), (over_minutes, "minutes of training")):
        axes.set(xlabel=label, yscale="linear" if unit else "log")
        axes.grid(alpha=0.3)
    if not unit:
        _label_logarithm(over_epochs.yaxis)
    over_epochs.set_ylabel(f"validation, bits per {unit}" if unit else "validation perplexity")
    figure.legend(*over_epochs.get_legend_handles_labels(), loc="outside lower center", ncols=1, frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it is drawn as a box
        write_figure(figure, path)


def _label_logarithm(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10 and so on; within less than a factor of 5, as on a linear axis. Both axes share them."""
    from matplotlib.ticker import AutoLocator, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(AutoLocator() if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _plain(name: str) -> str:
    """A name as matplotlib draws it: formulas begin with a dollar, and what begins with an underscore is left out."""
    return (" " * name.startswith("_") + name).replace("$", r"\$")
