"""A RAN beside an LSTM, a GRU and a simple RNN: one code, the same number of epochs.

    python experiments/parity/run.py --study ptb-small

A run that was stopped is continued. A finished run adds its row to results.jsonl, and perplexity.png is drawn again. A
study whose name ends in "-tuned" first tries the settings of `GRID` for each model with one seed, and keeps those with
the lowest validation perplexity.
"""

import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `harness` is there

from harness.study import Options, run, seeds
from harness.table import Table, chosen, value

from ranjax import cli
from ranjax.figure import blank_figure
from ranjax.training.config import PRESETS, Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
MODELS = {
    "RAN": {},
    "RAN, input gates": {"gates": "input"},
    "LSTM": {"cell": "lstm"},
    "RAN, identity": {"activation": "identity"},
    "RAN, diagonal gates": {"gates": "diagonal"},
    "GRU": {"cell": "gru"},
    "S-RNN": {"cell": "rnn"},
}
SEVERAL = ("RAN", "RAN, input gates", "LSTM")  # trained with several seeds, the others with one

SMALL = replace(PRESETS["ptb-small"], epochs=8)
TEXT8 = Config(dataset="text8", features=(256,), tie=False, dropout=0.0, epochs=1, steps=50, schedule="cosine")
ENWIK8 = replace(
    TEXT8,
    dataset="enwik8",
    layers=4,
    features=(1024,),
    batch_size=128,
    steps=256,
    learning_rate=1e-3,
    clip=5.0 * 256 / 35,
    streams=128,
)
STUDIES = {
    "ptb-small": SMALL,
    "ptb-small-35-steps": replace(SMALL, steps=35),
    "ptb-small-tuned": replace(SMALL, steps=35, dropout=0.25),
    "ptb-small-20-tuned": replace(SMALL, dropout=0.1),
    "ptb-small-tied-tuned": replace(SMALL, steps=35, dropout=0.25, tie=True),
    "ptb-small-tied-20-tuned": replace(SMALL, dropout=0.25, tie=True),
    "ptb-small-35-columns": replace(SMALL, batch_size=35, dropout=0.25),
    "ptb-small-reach": replace(SMALL, batch_size=35, dropout=0.25, learning_rate=1.75, clip=5 / 1.75),
    "ptb-medium": PRESETS["ptb-medium"],
    "ptb-medium-tied": replace(PRESETS["ptb-medium"], tie=True),
    "ptb-large": PRESETS["ptb-large"],
    "wikitext-2": replace(SMALL, dataset="wikitext-2", steps=35, dropout=0.25, epochs=3, decay_after=1),
    "text8": TEXT8,
    "text8-wide": replace(TEXT8, features=(322,)),  # the RAN then has as many parameters as the LSTM of text8
    "enwik8-small": replace(TEXT8, dataset="enwik8", features=(200,)),  # for a CPU
    "enwik8": ENWIK8,
}


class Trials(NamedTuple):
    """The values of a setting that a tuned study tries, and settings of these trials only."""

    values: tuple[float, ...]
    short: dict[str, Any]


GRID = {
    "learning_rate": Trials((0.5, 1.0, 2.0), {"epochs": 4, "decay_after": 2}),
    "dropout": Trials((0.1, 0.25, 0.4), {}),
}

# Settings of a model that differ from those of its study: the authors' learning rates on ptb-medium and ptb-large, and
# on wikitext-2 the best settings of ptb-small-tuned.
OWN = {
    "S-RNN": {
        "ptb-medium": {"learning_rate": 0.25},
        "ptb-large": {"learning_rate": 0.25},
        "wikitext-2": {"learning_rate": 0.25, "dropout": 0.1},
    },
    "RAN, identity": {
        "ptb-medium": {"learning_rate": 0.8},
        "ptb-large": {"learning_rate": 0.5},
    },
}

# Test perplexities: Zaremba et al. 2014 (small); Levy et al. 2018, table 1 (medium, large).
PUBLISHED = {
    "ptb-small": {"LSTM": 114.5},
    "ptb-medium": {"LSTM": 83.9, "RAN": 81.6, "S-RNN": 140.9},
    "ptb-large": {"LSTM": 78.8, "RAN": 78.5, "S-RNN": 126.1},
}
BITS = {"text8": "bits per character", "enwik8": "bits per byte"}  # other data sets: perplexity

Point = tuple[float, str]  # a test figure and its model


@dataclass(frozen=True)
class Parity(Options):
    """Runs a study, or continues it."""

    study: Literal[tuple(STUDIES)] = "ptb-small"
    """The study."""
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """The models, in this order."""
    seeds: int = 3
    """Number of seeds of the RAN, the RAN with input gates and the LSTM; the others have one."""


def settings(table: Table, study: str, model: str) -> Config:
    """The settings of a model in a study; in a tuned study, the best of the grid.

    The rows of trials with fewer epochs have the study's name with "-grid" after it.
    """
    config = replace(STUDIES[study], **MODELS[model], **OWN.get(model, {}).get(study, {}))
    if not study.endswith("-tuned"):
        return config
    for name, (values, short) in GRID.items():
        label = f"{study}-grid" if short else study
        best = table.best(config, name, values, short, study=label, model=model)
        config = replace(config, **{name: best})
    return config


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The test figure of every run beside the published ones, one panel for each study."""
    present = [study for study in STUDIES if any(row["study"] == study for row in rows)]
    columns = min(len(present), 3)
    lines = -(-len(present) // columns)
    figure = blank_figure(4.2 * columns, 3 * lines + 0.4)
    margin = 0.04 / columns  # for the marks beyond the axes
    figure.get_layout_engine().set(wspace=0.06, rect=(0, 0, 1 - margin, 1))
    shared: dict[tuple[str, bool], Axes] = {}
    for number, study in enumerate(present, 1):
        kind = (
            STUDIES[study].dataset,
            study.startswith("ptb-small"),
        )  # studies of one kind have the same horizontal axis
        axes = figure.add_subplot(lines, columns, number, sharex=shared.get(kind))
        shared[kind] = axes
        draw_study(axes, study, rows)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.savefig(path, dpi=110)


def draw_study(axes: "Axes", study: str, rows: list[dict[str, Any]]) -> None:
    """The panel of one study; figures above 1.15 times the best one are marked at its right boundary."""
    unit = BITS.get(STUDIES[study].dataset, "perplexity")
    key = "test_perplexity" if unit == "perplexity" else "test_bits"
    measured = [(value(row, key), model) for model in MODELS for row in chosen(rows, study=study, model=model)]
    published = [(figure, model) for model, figure in PUBLISHED.get(study, {}).items()]
    limit = 1.15 * min(measured)[0]
    drawn = {model for _, model in measured + published}
    axes.yaxis.update_units([model for model in MODELS if model in drawn])  # the order of the models

    mark(axes, within(measured, limit), "measured, a dot a seed", "oC0")
    mark(axes, beyond(measured, limit), "beyond the axis", ">C0", right=1.0)
    mark(axes, [point for point in measured if point[0] == inf], "not finite", "DC0", right=1.04)
    mark(axes, within(published, limit), "published", "xC3")
    mark(axes, beyond(published, limit), "beyond the axis", ">C3", right=1.04)

    axes.set(title=study, xlabel=f"test {unit}")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)


def within(points: list[Point], limit: float) -> list[Point]:
    """The points whose figure is at most the limit."""
    return [point for point in points if point[0] <= limit]


def beyond(points: list[Point], limit: float) -> list[Point]:
    """The points whose figure is above the limit, but finite."""
    return [point for point in points if limit < point[0] < inf]


def mark(axes: "Axes", points: list[Point], label: str, style: str, right: float | None = None) -> None:
    """Draws points: at their figures, or all at the same share of the panel's width, `right`."""
    figures = [figure if right is None else right for figure, _ in points]
    models = [model for _, model in points]
    transform = axes.transData if right is None else axes.get_yaxis_transform()
    axes.plot(figures, models, style, label=label, transform=transform, clip_on=False, in_layout=False)


def main(options: Parity, table: Table) -> None:
    """The study."""
    for seed in seeds(options.seeds):
        for model in options.models:
            if seed == 0 or model in SEVERAL:
                config = settings(table, options.study, model)
                table.row(replace(config, seed=seed), study=options.study, model=model)
                draw(table.rows, table.folder / "perplexity.png")


if __name__ == "__main__":
    cli.start(lambda: run(main, Parity, HERE), huge_pages=True)
