"""How far back a RAN reaches: perplexity by truncation length, and tasks whose answers are a known distance back.

    python experiments/long-context/run.py --study truncation --runs runs/long-context
    python experiments/long-context/run.py --study tasks --runs runs/long-context

A run that was stopped is continued. A finished run adds its row to results.jsonl, and the picture is drawn again.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `harness` is there

from harness.study import Options, run
from harness.table import Table

from ranjax import cli
from ranjax.data import load_split
from ranjax.data.builtin import markov_entropy, task_answers
from ranjax.figure import blank_figure
from ranjax.training.config import Config
from ranjax.training.metrics import make_evaluator
from ranjax.training.model import load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
UPDATE = 2048  # tokens of an update, about, for every truncation length
LENGTHS = (35, 128, 512, 2048, 64, 256, 1024)
MODELS = {"RAN": {}, "RAN, input gates": {"gates": "input"}, "LSTM": {"cell": "lstm"}}
TEXT = Config(dataset="python-docs", tokenizer="character", epochs=2, dropout=0.0)
TASK = Config(features=(128,), dropout=0.0, epochs=10, decay_after=7, learning_rate=5e-3)
DISTANCES = {"copy": (12, 24, 48, 96), "recall": (8, 16, 32, 64), "markov": (2, 4, 8, 16)}


@dataclass(frozen=True)
class LongContext(Options):
    """Runs a study, or continues it."""

    study: Literal["truncation", "tasks"] = "truncation"
    """The study."""
    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """The models, in this order."""


def truncated(config: Config, steps: int) -> Config:
    """The same training at another truncation length, with about as many tokens an update.

    The loss is a sum over the steps, so clipping grows with their number.
    """
    return replace(config, steps=steps, batch_size=max(UPDATE // steps, 1), clip=5.0 * steps / 35)


def recalled(directory: Path) -> dict[str, float]:
    """The share of the information in the answers that a model recalls: 0 for a guess, 1 for all of it."""
    loaded = load_run(directory)
    ids = load_split(loaded.config.dataset, "test", loaded.vocabulary)
    answers = task_answers(loaded.vocabulary.decode(ids))
    marked = answers.any()  # in the markov tasks every token is an answer
    nats = make_evaluator(loaded.model)(loaded.params, ids, answers if marked else None).nats
    guess, best = math.log(8), 0.0 if marked else markov_entropy()
    return {"answer_nats": nats, "recalled": (guess - nats) / (guess - best)}


def draw(rows: list[dict[str, Any]], key: str, tasks: list[str], path: Path) -> None:
    """A value of the rows by length, with a panel for each task and a line for each model."""
    figure = blank_figure(4.2 * len(tasks), 3.4)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        draw_task(axes, [row for row in rows if row["task"] == task], key)
        axes.set_title(task)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def draw_task(axes: "Axes", rows: list[dict[str, Any]], key: str) -> None:
    """The panel of one task."""
    for number, model in enumerate(MODELS):
        of_model = [row for row in rows if row["model"] == model and row.get(key) is not None]  # None: it diverged
        points = sorted((row["length"], row[key]) for row in of_model)
        if points:
            axes.plot(*zip(*points, strict=True), f"oC{number}-", label=model)
    xlabel = "tokens back" if key == "recalled" else "tokens"
    axes.set(xlabel=xlabel, ylabel=key.replace("_", " "), xscale="log")
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def truncation(options: LongContext, table: Table) -> None:
    """Perplexity on the characters of python-docs, by truncation length."""
    for length in LENGTHS:
        for model in options.models:
            config = truncated(replace(TEXT, **MODELS[model]), length)
            table.row(config, task="truncation length", model=model, length=length)
            draw(table.rows, "test_perplexity", ["truncation length"], table.folder / "truncation.png")


def tasks(options: LongContext, table: Table) -> None:
    """What is recalled in tasks with a known distance."""
    for task, distances in DISTANCES.items():
        for distance in distances:
            for model in options.models:
                config = replace(TASK, dataset=f"{task}-{distance}", **MODELS[model])
                config = truncated(config, max(64, 4 * distance))
                table.row(config, recalled, task=task, model=model, length=distance)
                draw(table.rows, "recalled", list(DISTANCES), table.folder / "tasks.png")


def main(options: LongContext, table: Table) -> None:
    """The study that the options name."""
    {"truncation": truncation, "tasks": tasks}[options.study](options, table)


if __name__ == "__main__":
    cli.start(lambda: run(main, LongContext, HERE), huge_pages=True)
