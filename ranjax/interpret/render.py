"""Explanations to look at: in the terminal, as a page of its own, as a figure."""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from ranjax.interpret.explanation import visible
from ranjax.training.report import blank_figure

if TYPE_CHECKING:
    from ranjax.interpret.explanation import Explanation, Layer, Prediction

LABELLED = 60  # words that fit along a figure's axis
STYLES = "dim", "cyan", "bold green"  # of sources, from the weak to the strong
NAMES = {"max": "the largest weight", "l1": "L1 norm of the weights", "l2": "L2 norm of the weights",
         "contribution": "L1 norm of weight times content"}  # fmt: skip


def print_sources(explanation: "Explanation", number: int) -> None:
    """Every word with its strongest sources in one layer, the half-lives, and the next word with its shares."""
    console, layer = Console(highlight=False, soft_wrap=True), explanation.layers[number - 1]
    words = list(map(visible, explanation.words))
    strongest, width = float(layer.weights.max(initial=0)) or 1.0, min(max(map(cell_len, words)), 20)
    console.print(f"Layer {number}. Each word, its weight in its own state ({NAMES[explanation.reduce]}), and the")
    console.print("earlier words that are strongest in that state, with their weights and how far back they are.")
    rows = zip(words, layer.own, layer.weights, layer.sources, strict=True)
    for t, (word, own, weights, sources) in enumerate(rows):
        line = Text(f"{t:5} ").append(set_cell_size(word, width), "bold").append(f" {own:8.3g} ")
        for weight, j in zip(weights, sources, strict=True):
            if j >= 0:
                style = STYLES[min(int(3 * weight / strongest), 2)]
                line.append(f"  {words[j]} {weight:.3g}", style).append(f" -{t - j}", "dim")
        console.print(line)
    if explanation.horizon > 2:
        shown = _quartiles(layer.half_lives, explanation.horizon)
        console.print(f"\nHalf-lives of the {len(layer.half_lives)} components in this text: {shown}")
    console.print("\nThe next word, and what its logit is the sum of")
    for prediction in explanation.predictions:
        console.print(_prediction(prediction, words))


def _quartiles(half_lives: np.ndarray, horizon: int) -> str:
    """The quartiles over components of the median half-life."""
    quartiles = np.quantile(half_lives, (0.25, 0.5, 0.75), method="nearest")
    shown = [f"{x:g}" if x < horizon else f"{horizon} or more" for x in quartiles]
    return f"quartiles {', '.join(shown)} steps"


def _prediction(prediction: "Prediction", words: list[str]) -> Text:
    line = Text(f"{prediction.probability:6.1%} ").append(prediction.word, "bold")
    line.append(f"  logit {prediction.logit:.2f} = biases {prediction.bias:+.2f}")
    shown = np.argsort(-np.abs(prediction.words))[:4]
    for j in shown:
        line.append(f"  {words[j]} {prediction.words[j]:+.2f}", "green" if prediction.words[j] > 0 else "red")
    rest = prediction.logit - prediction.bias - float(prediction.words[shown].sum())
    return line.append(f"  the other words {rest:+.2f}", "dim") if len(words) > len(shown) else line


def draw_pairs(explanation: "Explanation", number: int, path: Path) -> None:
    """A heat map: columns are the words as they are read, rows the words remembered, dark what is strong."""
    from matplotlib.colors import PowerNorm

    layer, words = explanation.layers[number - 1], explanation.words
    few = len(words) <= LABELLED
    side = max(0.2 * len(words), 3) + 1.5 if few else 8
    figure = blank_figure(side, side)
    axes = figure.subplots()
    scale = PowerNorm(0.5, vmin=0)  # the diagonal outshines the rest otherwise
    assert layer.pairs is not None
    image = axes.imshow(layer.pairs.T, cmap="Greys", norm=scale, interpolation="nearest" if few else "antialiased")
    if few:
        axes.set_xticks(range(len(words)), words, rotation=90, parse_math=False)
        axes.set_yticks(range(len(words)), words, parse_math=False)
    axes.set(xlabel="the state at", ylabel="remembers", title=f"layer {number}, {NAMES[explanation.reduce]}")
    figure.colorbar(image, shrink=0.6)
    figure.savefig(path, dpi=150)


def write_page(explanation: "Explanation", number: int, path: Path) -> None:
    """One page that needs nothing but itself; the layer chosen is shown first."""
    template = resources.files("ranjax").joinpath("explain.html").read_text("utf-8")
    data = {
        "words": explanation.words,
        "separator": explanation.separator,
        "reduce": NAMES[explanation.reduce],
        "horizon": explanation.horizon,
        "layer": number - 1,
        "layers": [_layer(layer) for layer in explanation.layers],
        "predictions": [
            {
                "word": prediction.word,
                "probability": prediction.probability,
                "logit": prediction.logit,
                "words": _digits(prediction.words),
                "bias": prediction.bias,
            }
            for prediction in explanation.predictions
        ],
    }
    path.write_text(template.replace("{{data}}", _json(data)), "utf-8")


def _layer(layer: "Layer") -> dict:
    """A layer for the page: the pairs up to the diagonal, row by row, as 65535ths of the root of the largest."""
    pairs = np.zeros((0, 0)) if layer.pairs is None else layer.pairs
    largest = float(pairs.max(initial=0)) or 1.0
    roots = np.rint(65535 * np.sqrt(pairs[np.tril_indices(len(pairs))] / largest)).astype("<u2")
    return {
        "largest": largest,
        "pairs": base64.b64encode(roots.tobytes()).decode(),
        "own": _digits(layer.own),
        "weights": [_digits(row) for row in layer.weights],
        "sources": layer.sources.tolist(),
        "lasting": layer.lasting.tolist(),
        "halfLives": layer.half_lives.tolist(),
    }


def _digits(values: np.ndarray) -> list[float]:
    """Four digits of each: more are not read."""
    return [float(f"{value:.4g}") for value in values]


def _json(data: dict) -> str:
    """JSON that can stand in a page: nothing in it ends the element it is in."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
