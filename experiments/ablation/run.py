"""The contribution of each part of a RAN: variants of one model, trained with the same settings.

    python experiments/ablation/run.py --runs runs/ablation

Trains one variant after another on the documentation of Python's standard library, then again with the next seed. A run
that was stopped is continued. A finished run adds its row to results.jsonl, and ablation.png is drawn again.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `harness` is there

from harness.ablation import constraint, learned
from harness.study import Options, run, seeds
from harness.table import Table, value

from ranjax import cli
from ranjax.figure import blank_figure
from ranjax.training.config import Config
from ranjax.training.model import load_run

HERE = Path(__file__).resolve().parent
CONFIG = Config(dataset="python-docs")  # all other settings at the training program's defaults


@dataclass(frozen=True)
class Variant:
    """What distinguishes a variant from the whole RAN.

    Attributes:
      settings: of the training.
      ablation: name of a constraint; see `harness.ablation.constraint`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    ablation: str | None = None


BASE = "RAN"
VARIANTS = {
    BASE: Variant(),
    "gates: own feature of h": Variant({"gates": "diagonal"}),
    "gates: input only": Variant({"gates": "input"}),
    "constant input gate": Variant(ablation="input-gate"),
    "constant forget gate": Variant(ablation="forget-gate"),
    "constant gates": Variant(ablation="gates"),
    "input gate 1 - f": Variant(ablation="complement"),
    "no content layer": Variant(ablation="content"),
    "h = c": Variant({"activation": "identity"}),
    "h = c, gates: input only": Variant({"activation": "identity", "gates": "input"}),
    "projection, 200": Variant({"projection": 200}),
    "states of 400, projection, 200": Variant({"features": (400,), "projection": 200}),
    "untied output": Variant({"tie": False}),
    "LSTM": Variant({"cell": "lstm"}),
}


@dataclass(frozen=True)
class Ablation(Options):
    """Runs the study, or continues it."""

    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)
    """The variants, in this order."""
    seeds: int = 3
    """Number of seeds of each variant."""


def row(table: Table, name: str, seed: int) -> dict[str, Any]:
    """The row of one variant and seed."""
    variant = VARIANTS[name]
    config = replace(CONFIG, seed=seed, **variant.settings)
    if variant.ablation is None:
        return table.row(config, variant=name)
    measure = partial(free_parameters, ablation=variant.ablation)
    return table.row(config, measure, constraint(variant.ablation), variant=name, ablation=variant.ablation)


def free_parameters(directory: Path, ablation: str) -> dict[str, int]:
    """The number of parameters that an ablated run has learned."""
    return {"parameters": learned(load_run(directory).params, ablation)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Test perplexity of every run by variant, and the mean of the whole RAN as a line."""
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    measured = [(value(row, "test_perplexity"), row["variant"]) for row in rows]
    limit = 2 * min(measured)[0]
    figure = blank_figure(8, 0.32 * len(names) + 1.2)
    axes = figure.subplots()
    for perplexity, name in measured:
        style = "oC0" if perplexity <= limit else ">C3"
        axes.plot(min(perplexity, limit), names.index(name), style)
    whole = [perplexity for perplexity, name in measured if name == BASE and perplexity <= limit]
    if whole:
        axes.axvline(sum(whole) / len(whole), color="0.6", linewidth=1)
    sizes = {row["variant"]: f", {row['parameters'] / 1e6:.2f}M" for row in rows if row["parameters"]}
    axes.set_yticks(range(len(names)), [name + sizes.get(name, "") for name in names])
    axes.set_xlabel("test perplexity (a dot for each seed; red: beyond)")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(options: Ablation, table: Table) -> None:
    """The study."""
    for seed in seeds(options.seeds):
        for name in options.variants:
            row(table, name, seed)
            draw(table.rows, table.folder / "ablation.png")


if __name__ == "__main__":
    cli.start(lambda: run(main, Ablation, HERE), huge_pages=True)
