"""What the parts of a RAN are worth: variants of one model, trained alike.

    python experiments/ablation/run.py --runs runs/ablation

Trains them one after another on the documentation that every Python carries, seed after seed (on a GPU or TPU the seeds
side by side). Each run goes on where it was cut off, and adds its row to results.jsonl when it is done; ablation.png is
drawn anew.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ranjax.training.config import Config
from ranjax.training.report import blank_figure
from harness.study import Options, rounds, run
from harness.table import Table, value

BASE = "RAN"
CONFIG = Config(dataset="python-docs")  # all else is at the training program's defaults
VARIANTS = {
    BASE: {},
    "gates: own feature of h": {"gates": "diagonal"},
    "gates: input only": {"gates": "input"},
    "constant input gate": {"ablation": "input-gate"},
    "constant forget gate": {"ablation": "forget-gate"},
    "constant gates": {"ablation": "gates"},
    "input gate 1 - f": {"ablation": "complement"},
    "no content layer": {"ablation": "content"},
    "h = c": {"activation": "identity"},
    "h = c, gates: input only": {"activation": "identity", "gates": "input"},
    "projection, 200": {"projection": 200},
    "states of 400, projection, 200": {"features": (400,), "projection": 200},
    "untied output": {"tie": False},
    "LSTM": {"cell": "lstm"},
}


@dataclass(frozen=True)
class Ablation(Options):
    """Runs the study, or what is left of it."""

    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)
    """Which variants, in which order."""
    seeds: int = 3
    """How many seeds of each."""


def draw(rows: list[dict], path: Path) -> None:
    """Test perplexity of every run, by variant and its parameters, with the mean of the whole RAN as a line."""
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    figure = blank_figure(8, 0.32 * len(names) + 1.2)
    dots = [(value(row, "test_perplexity"), row["variant"]) for row in rows]
    axes, edge = figure.subplots(), 2 * min(dots)[0]
    for x, name in dots:
        axes.plot(min(x, edge), names.index(name), ">C3" if x > edge else "oC0")
    sizes = {row["variant"]: f", {row['parameters'] / 1e6:.2f}M" for row in rows if row["parameters"]}
    whole = [x for x, name in dots if name == BASE and x <= edge]
    if whole:
        axes.axvline(sum(whole) / len(whole), color="0.6", linewidth=1)
    axes.set(
        xlabel="test perplexity (a dot for each seed; red: beyond)",
        yticks=range(len(names)),
        yticklabels=[name + sizes.get(name, "") for name in names],
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(options: Ablation, table: Table) -> None:
    for seeds in rounds(options.seeds):
        for name in options.variants:
            table.rows_of_seeds(replace(CONFIG, **VARIANTS[name]), seeds, variant=name)
            draw(table.rows, table.folder / "ablation.png")


if __name__ == "__main__":
    run(main, Ablation, Path(__file__).parent)
