"""How far back RANs reach: perplexity against the truncation length, and tasks whose answers lie ever farther back.

    python experiments/long-context/run.py --study truncation --runs runs/long-context
    python experiments/long-context/run.py --study tasks --runs runs/long-context

Each run goes on where it was cut off, and adds its row to results.jsonl when it is done; the picture is drawn anew.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ranjax.training.config import Config
from ranjax.data import load_split
from ranjax.data.builtin import markov_entropy, task_answers
from ranjax.evaluate import load_run, make_evaluator
from ranjax.training.report import blank_figure
from harness.study import Options, run
from harness.table import Table

UPDATE = 2048  # tokens an update, whatever the truncation length
LENGTHS = (35, 128, 512, 2048, 64, 256, 1024)
MODELS = {"RAN": {}, "RAN, input gates": {"gates": "input"}, "LSTM": {"cell": "lstm"}}
TEXT = Config(dataset="python-docs", tokenizer="character", epochs=2, dropout=0.0)
TASK = Config(features=(128,), dropout=0.0, epochs=10, decay_after=7, learning_rate=5e-3)
DISTANCES = {"copy": (12, 24, 48, 96), "recall": (8, 16, 32, 64), "markov": (2, 4, 8, 16)}


@dataclass(frozen=True)
class LongContext(Options):
    """Runs a study, or what is left of it."""

    study: Literal["truncation", "tasks"] = "truncation"
    """Which study."""
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """Which models, in which order."""


def windows(config: Config, steps: int) -> Config:
    """About as many tokens an update at another truncation length; the clipping follows the sum over time."""
    return replace(config, steps=steps, batch_size=max(UPDATE // steps, 1), clip=5.0 * steps / 35)


def recalled(run: Path) -> dict[str, float]:
    """How much of what the answers hold comes back: 0 for a guess from what is near, 1 for all."""
    loaded = load_run(run)
    ids = load_split(loaded.config.dataset, "test", loaded.vocabulary)
    answers = task_answers(loaded.vocabulary.decode(ids))
    evaluate, guess = make_evaluator(loaded.model), math.log(8)
    nats = evaluate(loaded.params, ids, answers if answers.any() else None).nats
    floor = 0.0 if answers.any() else markov_entropy()
    return {"answer_nats": nats, "recalled": (guess - nats) / (guess - floor)}


def draw(rows: list[dict], y: str, panels: list[str], path: Path) -> None:
    """One value against distance or length, a line for each model, a panel for each task."""
    figure = blank_figure(4.2 * len(panels), 3.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, model in enumerate(MODELS):
            of = [(row["length"], row.get(y)) for row in rows if row["model"] == model and row["task"] == panel]
            of = [(length, value) for length, value in of if value is not None]  # it did not diverge
            if of:
                axes.plot(*zip(*sorted(of), strict=True), f"oC{number}-", label=model)
        axes.set(
            title=panel, xlabel="tokens back" if y == "recalled" else "tokens", ylabel=y.replace("_", " "), xscale="log"
        )
        ticks = sorted({row["length"] for row in rows if row["task"] == panel})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main(options: LongContext, table: Table) -> None:
    {"truncation": truncation, "tasks": tasks}[options.study](options, table)


def truncation(options: LongContext, table: Table) -> None:
    for length in LENGTHS:
        for model in options.models:
            labels = {"task": "truncation length", "model": model, "length": length}
            table.row(windows(replace(TEXT, **MODELS[model]), length), **labels)
            draw(table.rows, "test_perplexity", ["truncation length"], table.folder / "truncation.png")


def tasks(options: LongContext, table: Table) -> None:
    for task, distances in DISTANCES.items():
        for distance in distances:
            for model in options.models:
                config = replace(TASK, dataset=f"{task}-{distance}", **MODELS[model])
                labels = {"task": task, "model": model, "length": distance}
                table.row(windows(config, max(64, 4 * distance)), recalled, **labels)
                draw(table.rows, "recalled", list(DISTANCES), table.folder / "tasks.png")


if __name__ == "__main__":
    run(main, LongContext, Path(__file__).parent)
