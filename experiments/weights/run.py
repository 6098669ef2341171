"""What a trained model remembers: `python experiments/weights/run.py --checkpoint RUN --data-dir DIR`.

On the validation text of a run of ranjax.train: half-lives of the components, which words are kept longest, and how the
shares of a logit compare with what becomes of it when a word is changed. Figures go to results.json, pictures beside.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measures import against_changes, by_frequency, by_word

from ranjax import views
from ranjax.errors import UserError, exit_with_message, flag, is_size
from ranjax.evaluate import load_run, load_text
from ranjax.interpret.explanation import explain
from ranjax.interpret.memory import Memory, memory
from ranjax.training.report import blank_figure, device, versions
from ranjax.data.vocabulary import Vocabulary

HERE = Path(__file__).parent
QUANTILES = (0.5, 0.9, 0.99)


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
    """Steps that half-lives and spans are followed for."""
    passage: int = 49_030
    """First token of the passage whose heat map is drawn."""
    out: str = str(HERE)
    """Folder of the results."""


def draw(layers: list[Memory], path: Path) -> None:
    """Half-lives of the components in each layer, sorted by their median."""
    figure = blank_figure(4.5 * len(layers), 3.6)
    for n, (axes, layer) in enumerate(
        zip(figure.subplots(1, len(layers), sharey=True, squeeze=False)[0], layers, strict=True)
    ):
        order = np.argsort(layer.quantile(0.9) + layer.quantile(0.5) * layer.half_lives.shape[1])
        for q in QUANTILES:
            axes.plot(layer.quantile(q)[order], label=f"{q:.0%} of the steps at most")
        axes.set(title=f"layer {n + 1}", xlabel="component", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.supylabel("half-life, steps")
    figure.savefig(path, dpi=110)


def passage_from(first: int, ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The 45 tokens of a text from one on."""
    if not 0 <= first < len(ids):
        raise UserError(f"--passage must be at least 0 and below {len(ids):,}, the tokens for validation; got {first}.")
    return vocabulary.decode(ids[first : first + 45])


def main(options: Options) -> None:
    for name in ("contexts", "length", "most"):
        if not is_size(size := getattr(options, name)):
            raise UserError(f"{flag(name)} must be a whole number, at least 1; got {size}.")
    run, out = load_run(options.checkpoint), Path(options.out)
    if (run.model.cell, run.vocabulary.tokenizer) != ("ran", "word"):
        got = f"--cell {run.model.cell} with --tokenizer {run.vocabulary.tokenizer}"
        raise UserError(f"--checkpoint must be a RAN on words; got one of {got}.")
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
        views.draw_pairs(explanation, number, out / f"layer-{number}.png")
    shares_of_components = (0, 0.25, 0.5, 0.75, 0.9, 1)
    results = {
        "run": {"dataset": run.config.dataset, "features": run.model.sizes, "gates": run.model.gates},
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "versions": versions(),
        "passage": passage,
        "half_lives": [
            {
                f"q{100 * q:g}": np.quantile(m.quantile(q), shares_of_components, method="nearest").tolist()
                for q in QUANTILES
            }
            for m in layers
        ],
        "components_of_half_life": [
            {f"at least {n}": int(np.sum(m.quantile(0.5) >= n)) for n in (1, 2, 5, 10, 20)} for m in layers
        ],
        "by_frequency": [by_frequency(m, valid, train, run.vocabulary) for m in layers],
        "by_word": [by_word(m, valid, run.vocabulary.decode) for m in layers],
        "attribution": against_changes(run, valid, options.contexts, options.length),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    import tyro

    with exit_with_message():
        main(tyro.cli(Options))
