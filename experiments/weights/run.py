"""What a trained model remembers.

    python experiments/weights/run.py --checkpoint RUN --data-dir DIR

On the validation text of a run of ranjax.train on words: half-lives of the components of each layer, the words that are
remembered longest, and how the attribution of a logit to words compares with the effect of changing a word. The figures
are in results.json, the pictures beside it.
"""

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from measures import against_changes, by_frequency, by_word

from ranjax import cli
from ranjax.data.vocabulary import Vocabulary
from ranjax.errors import UserError, flag, is_size
from ranjax.figure import blank_figure
from ranjax.interpret.explanation import explain
from ranjax.interpret.memory import Memory, memory
from ranjax.interpret.render import draw_heat_map
from ranjax.training.model import Run, load_run
from ranjax.training.report import device, versions
from ranjax.training.run import load_text

HERE = Path(__file__).resolve().parent
QUANTILES = (0.5, 0.9, 0.99)  # of the half-lives of a component over time
SHARES = (0, 0.25, 0.5, 0.75, 0.9, 1)  # of the components
LEAST = (1, 2, 5, 10, 20)  # steps of a median half-life
PASSAGE = 45  # tokens


@dataclass(frozen=True)
class Options:
    """Measures a trained model's memory."""

    checkpoint: str
    """The --out directory of a run on words."""
    data_dir: str | None = None
    """Folder of the data set."""
    contexts: int = 200
    """Places in the text whose next word is explained."""
    length: int = 50
    """Words before each of them."""
    most: int = 512
    """The largest half-life and span that is measured, in steps."""
    passage: int = 49_030
    """First token of the passage of the heat maps."""
    out: str = str(HERE)
    """Folder of the results."""


def draw(layers: list[Memory], path: Path) -> None:
    """Half-lives of the components of each layer, sorted by their median."""
    figure = blank_figure(4.5 * len(layers), 3.6)
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for number, (axes, layer) in enumerate(zip(panels, layers, strict=True), 1):
        order = np.argsort(layer.quantile(0.9) + layer.quantile(0.5) * layer.half_lives.shape[1])
        for q in QUANTILES:
            axes.plot(layer.quantile(q)[order], label=f"{q:.0%} of the steps at most")
        axes.set(title=f"layer {number}", xlabel="component", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.supylabel("half-life, steps")
    figure.savefig(path, dpi=110)


def half_lives(layer: Memory) -> dict[str, list]:
    """Quantiles over the components of quantiles over time."""
    return {f"q{100 * q:g}": np.quantile(layer.quantile(q), SHARES, method="nearest").tolist() for q in QUANTILES}


def components_of_half_life(layer: Memory) -> dict[str, int]:
    """The number of components whose median half-life is at least so many steps."""
    return {f"at least {steps}": int(np.sum(layer.quantile(0.5) >= steps)) for steps in LEAST}


def passage_from(first: int, ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The passage of a text that begins with this token."""
    if not 0 <= first < len(ids):
        raise UserError(f"--passage must be at least 0 and below {len(ids):,}, the tokens for validation; got {first}.")
    return vocabulary.decode(ids[first : first + PASSAGE])


def checked(options: Options) -> Run:
    """The run, after a check that the study can use it and the options."""
    for name in ("contexts", "length", "most"):
        if not is_size(size := getattr(options, name)):
            raise UserError(f"{flag(name)} must be a whole number, at least 1; got {size}.")
    run = load_run(options.checkpoint)
    if (run.model.cell, run.vocabulary.tokenizer) != ("ran", "word"):
        got = f"--cell {run.model.cell} with --tokenizer {run.vocabulary.tokenizer}"
        raise UserError(f"--checkpoint must be a RAN on words; got one of {got}.")
    return run


def about(run: Run) -> dict[str, Any]:
    """What was measured, when and where."""
    model = {"dataset": run.config.dataset, "features": run.model.sizes, "gates": run.model.gates}
    return {"run": model, "date": date.today().isoformat(), "device": device(), "versions": versions()}


def main(options: Options) -> None:
    """The study."""
    run, out = checked(options), Path(options.out)
    train, valid = (load_text(run, options.checkpoint, split, options.data_dir) for split in ("train", "valid"))
    passage = passage_from(options.passage, valid, run.vocabulary)
    if len(valid) <= (asked := options.contexts + options.length):
        most = f"{len(valid):,}, the tokens for validation"
        raise UserError(f"--contexts + --length must be below {most}; got {asked:,}.")
    out.mkdir(parents=True, exist_ok=True)
    layers = memory(run.model, run.params, valid, most=options.most)
    draw(layers, out / "half-lives.png")
    explanation = explain(run, passage)
    for number in range(1, len(layers) + 1):
        draw_heat_map(explanation, number, out / f"layer-{number}.png")
    results = about(run) | {
        "passage": passage,
        "half_lives": [half_lives(layer) for layer in layers],
        "components_of_half_life": [components_of_half_life(layer) for layer in layers],
        "by_frequency": [by_frequency(layer, valid, train, run.vocabulary) for layer in layers],
        "by_word": [by_word(layer, valid, run.vocabulary.decode) for layer in layers],
        "attribution": against_changes(run, valid, options.contexts, options.length),
    }
    cli.write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def program() -> None:
    """The command line of the study."""
    with cli.exit_with_message():
        main(cli.options(Options, None, "python experiments/weights/run.py"))


if __name__ == "__main__":
    cli.start(program)
