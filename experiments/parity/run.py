"""RAN beside LSTM, GRU and a plain RNN, one code, as many epochs: `python experiments/parity/run.py --study ptb-small`.

Each run goes on where it was cut off and adds its row to results.jsonl; perplexity.png is drawn anew. A tuned study
first tries each model's settings (`GRID`) with one seed: those of the lowest validation perplexity remain.
"""

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

from ranjax.training.config import PRESETS, Config
from ranjax.training.report import blank_figure
from harness.study import Options, rounds, run
from harness.table import Table, chosen, value

MODELS = {
    "RAN": {},
    "RAN, input gates": {"gates": "input"},
    "LSTM": {"cell": "lstm"},
    "RAN, identity": {"activation": "identity"},
    "RAN, diagonal gates": {"gates": "diagonal"},
    "GRU": {"cell": "gru"},
    "S-RNN": {"cell": "rnn"},
}
SEVERAL = ("RAN", "RAN, input gates", "LSTM")  # have several seeds, the others one
SMALL = replace(PRESETS["ptb-small"], epochs=8)
TEXT8 = Config(dataset="text8", features=(256,), tie=False, dropout=0.0, epochs=1, steps=50, schedule="cosine")
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
    "text8-wide": replace(TEXT8, features=(322,)),  # a RAN of as many parameters as the LSTM has in text8
    "enwik8-small": replace(TEXT8, dataset="enwik8", features=(200,)),  # for a CPU
    "enwik8": replace(TEXT8, dataset="enwik8", layers=4, features=(1024,), batch_size=128, steps=256,
                      learning_rate=1e-3, clip=5.0 * 256 / 35, streams=128),
}  # fmt: skip
GRID = {"learning_rate": ((0.5, 1.0, 2.0), {"epochs": 4, "decay_after": 2}), "dropout": ((0.1, 0.25, 0.4), {})}
# Where a model's settings are not its study's: the authors' rates; what came out best in ptb-small-tuned.
OWN = {"S-RNN": {"ptb-medium": {"learning_rate": 0.25}, "ptb-large": {"learning_rate": 0.25},
                 "wikitext-2": {"learning_rate": 0.25, "dropout": 0.1}},
       "RAN, identity": {"ptb-medium": {"learning_rate": 0.8}, "ptb-large": {"learning_rate": 0.5}}}  # fmt: skip
# Test perplexities: Zaremba et al. 2014 (small); Levy et al. 2018, table 1 (medium, large).
PUBLISHED = {"ptb-small": {"LSTM": 114.5}, "ptb-medium": {"LSTM": 83.9, "RAN": 81.6, "S-RNN": 140.9},
             "ptb-large": {"LSTM": 78.8, "RAN": 78.5, "S-RNN": 126.1}}  # fmt: skip


@dataclass(frozen=True)
class Parity(Options):
    """Runs a study, or what is left of it."""

    study: Literal[tuple(STUDIES)] = "ptb-small"
    """Which study."""
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """Which models, in which order."""
    seeds: int = 3
    """How many seeds of the RAN, the RAN with input gates and the LSTM; of the others there is one."""


def settings(table: Table, study: str, model: str) -> Config:
    """The study's settings of a model; if tuned, the best of the grid (its short runs are labelled "...-grid")."""
    config = replace(STUDIES[study], **MODELS[model], **OWN.get(model, {}).get(study, {}))
    for name, (values, short) in GRID.items() if study.endswith("-tuned") else ():
        label = f"{study}-grid" if short else study
        config = replace(config, **{name: table.best(config, name, values, short, study=label, model=model)})
    return config


def draw(rows: list[dict], path: Path) -> None:
    """The test figure of every seed by study and model, beside the published ones; the worst at the edge."""
    studies = [study for study in STUDIES if any(row["study"] == study for row in rows)]
    columns, shared = min(len(studies), 3), {}
    figure = blank_figure(4.2 * columns, 3 * (height := -(-len(studies) // columns)) + 0.4)
    figure.get_layout_engine().set(wspace=0.06, rect=(0, 0, 1 - 0.04 / columns, 1))  # for the marks beyond the axes
    for number, study in enumerate(studies, 1):
        kind = STUDIES[study].dataset, study.startswith("ptb-small")  # its studies share an axis
        axes = shared[kind] = figure.add_subplot(height, columns, number, sharex=shared.get(kind))
        unit = {"text8": "bits per character", "enwik8": "bits per byte"}.get(STUDIES[study].dataset, "perplexity")
        key = "test_perplexity" if unit == "perplexity" else "test_bits"
        found = [(value(row, key), model) for model in MODELS for row in chosen(rows, study=study, model=model)]
        published = [(x, model) for model, x in PUBLISHED.get(study, {}).items()]
        most, data, edge = 1.15 * min(found)[0], axes.transData, axes.get_yaxis_transform()
        axes.yaxis.update_units([model for model in MODELS if model in {name for _, name in found + published}])
        for label, marker, color, transform, dots in (
            ("measured, a dot a seed", "o", "C0", data, [dot for dot in found if dot[0] <= most]),
            ("beyond the axis", ">", "C0", edge, [(1, model) for x, model in found if most < x < inf]),
            ("not finite", "D", "C0", edge, [(1.04, model) for x, model in found if x == inf]),
            ("published", "x", "C3", data, [dot for dot in published if dot[0] <= most]),
            ("beyond the axis", ">", "C3", edge, [(1.04, model) for x, model in published if x > most]),
        ):
            style = {"marker": marker, "color": color, "ls": "", "clip_on": False, "in_layout": False}
            axes.plot([x for x, _ in dots], [model for _, model in dots], label=label, transform=transform, **style)
        axes.set(title=study, xlabel=f"test {unit}")
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.savefig(path, dpi=110)


def main(options: Parity, table: Table) -> None:
    for seeds in rounds(options.seeds):
        for model in options.models:
            own = [seed for seed in seeds if seed == 0 or model in SEVERAL]
            table.rows_of_seeds(settings(table, options.study, model), own, study=options.study, model=model)
            draw(table.rows, table.folder / "perplexity.png")


if __name__ == "__main__":
    run(main, Parity, Path(__file__).parent)
