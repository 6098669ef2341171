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

TITLES = {
    "ptb-small": "Penn Treebank, 2 x 200, no dropout",
    "ptb-small-tuned": "Penn Treebank, 2 x 200, tuned",
    "ptb-medium": "Penn Treebank, 2 x 650",
    "wikitext-2": "WikiText-2, 2 x 200",
    "text8": "text8 (10 MB), 2 x 256",
    "enwik8-small": "enwik8, 2 x 200",
}
LINES = sorted(MODELS, key=lambda model: model != "LSTM")  # of a panel: the LSTM first

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
    """The test figure of every run beside the published ones, a panel for each study of more than a RAN and an LSTM.

    A line is a model, the same in all panels; left of the dashed one is better than the LSTM. Figures above 1.15 times
    the best one are written at the right.
    """
    of = {study: {row["model"] for row in rows if row["study"] == study} for study in STUDIES}
    present = [study for study in STUDIES if len(of[study]) > 2] or [study for study in STUDIES if of[study]]
    columns = min(len(present), 3)
    lines = -(-len(present) // columns)
    figure = blank_figure(1.3 + 3.2 * columns, 2.6 * lines + 0.4)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, study in zip(panels, present, strict=False):
        draw_study(axes, study, rows)
    for unused in panels[len(present) :]:
        unused.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def draw_study(axes: "Axes", study: str, rows: list[dict[str, Any]]) -> None:
    """The panel of one study."""
    unit = BITS.get(STUDIES[study].dataset, "perplexity")
    key = "test_perplexity" if unit == "perplexity" else "test_bits"
    measured = [(value(row, key), model) for model in MODELS for row in chosen(rows, study=study, model=model)]
    published = [(figure, model) for model, figure in PUBLISHED.get(study, {}).items()]
    limit = 1.15 * min(measured)[0]
    if lstm := [figure for figure, model in measured if model == "LSTM"]:
        axes.axvline(sum(lstm) / len(lstm), color="grey", linestyle="--", linewidth=1)
    mark(axes, measured, limit, "measured, a dot a seed", "oC0", -0.2 if published else 0.0)
    mark(axes, published, limit, "published", "xC3", 0.2)
    axes.set_yticks(range(len(LINES)), LINES)
    axes.set(xlabel=f"test {unit}", ylim=(len(LINES) - 0.5, -0.5))
    axes.set_title(TITLES.get(study, study), fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", length=0)


def mark(axes: "Axes", points: list[Point], limit: float, label: str, style: str, down: float) -> None:
    """Draws points up to the limit, and writes those beyond it, `down` below the line of their model."""
    near = [(figure, LINES.index(model)) for figure, model in points if figure <= limit]
    axes.plot([x for x, _ in near], [y for _, y in near], style, label=label, markersize=5)
    far = {model: figure for figure, model in points if figure > limit}  # of several seeds the last
    for model, figure in far.items():
        text = "not finite" if figure == inf else f"{figure:.4g} \N{RIGHTWARDS ARROW}"
        look = {"color": style[1:], "size": 8, "ha": "right", "va": "center"}
        axes.text(0.98, LINES.index(model) + down, text, transform=axes.get_yaxis_transform(), **look)


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
