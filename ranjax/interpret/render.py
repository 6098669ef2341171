"""Explanations displayed: in the terminal, as a page, as a figure. Needs the extra `train` (rich, matplotlib)."""

import base64
import json
from importlib import resources
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from ranjax.cli import write_whole
from ranjax.figure import blank_figure, write_figure
from ranjax.interpret.explanation import Explanation, Layer, Prediction, visible

LABELLED = 60  # words that fit along a figure's axis
STYLES = "dim", "cyan", "bold green"  # of sources, from weak to strong
NAMES = {"max": "the largest weight", "l1": "L1 norm of the weights", "l2": "L2 norm of the weights",
         "contribution": "L1 norm of weight times content"}  # fmt: skip


def print_sources(explanation: Explanation, number: int) -> None:
    """Prints each word with its strongest sources in one layer, the half-lives, and the next word with its shares.

    Args:
      explanation: what `explain` returns.
      number: of the layer, from 1.
    """
    console, layer = Console(highlight=False), explanation.layers[number - 1]
    console.soft_wrap = not console.is_terminal  # between words on a terminal, nowhere in a file
    words = list(map(visible, explanation.words))
    console.print(f"Layer {number}. Each word, its weight in its own state ({NAMES[explanation.reduce]}), and the")
    console.print("earlier words that are strongest in that state, with their weights and how far back they are.")
    for line in _source_lines(layer, words):
        console.print(line)
    if explanation.horizon > 2:
        shown = _quartiles(layer.half_lives, explanation.horizon)
        console.print(f"\nHalf-lives of the {len(layer.half_lives)} components in this text: {shown}")
    console.print("\nThe next word, and the shares that its logit is the sum of, with how far back their words are")
    for prediction in explanation.predictions:
        console.print(_prediction(prediction, words))


def _source_lines(layer: Layer, words: list[str]) -> list[Text]:
    """One line for each word: its step, its own weight, its strongest sources."""
    strongest, width = float(layer.weights.max(initial=0)) or 1.0, min(max(map(cell_len, words)), 20)
    lines = []
    for t, (word, own, weights, sources) in enumerate(zip(words, layer.own, layer.weights, layer.sources, strict=True)):
        line = Text(f"{t:5} ").append(set_cell_size(word, width), "bold").append(f" {own:8.3g} ")
        for weight, j in zip(weights, sources, strict=True):
            if j >= 0:
                style = STYLES[min(int(3 * weight / strongest), 2)]
                line.append(f"  {words[j]} {weight:.3g}", style).append(f" -{t - j}", "dim")
        lines.append(line)
    return lines


def _quartiles(half_lives: np.ndarray, horizon: int) -> str:
    """The quartiles over components of the median half-life."""
    quartiles = np.quantile(half_lives, (0.25, 0.5, 0.75), method="nearest")
    shown = [f"{x:g}" if x < horizon else f"{horizon} or more" for x in quartiles]
    return f"quartiles {', '.join(shown)} steps"


def _prediction(prediction: Prediction, words: list[str]) -> Text:
    """One line: a next word, its probability, its logit and the four largest shares."""
    line = Text(f"{prediction.probability:6.1%} ").append(prediction.word, "bold")
    line.append(f"  logit {prediction.logit:.2f} = biases {prediction.bias:+.2f}")
    shown = np.argsort(-np.abs(prediction.words))[:4]
    for j in shown:
        line.append(f"  {words[j]} {prediction.words[j]:+.2f}", "green" if prediction.words[j] > 0 else "red")
        line.append(f" -{len(words) - 1 - j}", "dim")
    rest = prediction.logit - prediction.bias - float(prediction.words[shown].sum())
    return line.append(f"  the other words {rest:+.2f}", "dim") if len(words) > len(shown) else line


def draw_heat_map(explanation: Explanation, number: int, path: Path) -> None:
    """Writes a heat map of all pairs as PNG: columns are the states, rows their sources, dark is a large weight.

    Args:
      explanation: what `explain` returns, for a text of at most `DRAWN` tokens.
      number: of the layer, from 1.
      path: of the figure.

    Raises:
      OSError: if the file cannot be written.
    """
    layer, words = explanation.layers[number - 1], explanation.words
    few = len(words) <= LABELLED
    shown = [visible(word).replace("␠", "·") for word in words]  # fonts of figures have no ␠
    side = max(0.2 * len(words), 3) + 1.5 if few else 8
    figure = blank_figure(side, side)
    from matplotlib.colors import PowerNorm  # once `blank_figure` has found a matplotlib that can be imported

    axes = figure.subplots()
    scale = PowerNorm(0.5, vmin=0)  # on a linear scale the diagonal would outshine the rest
    assert layer.pairs is not None
    image = axes.imshow(layer.pairs.T, cmap="Greys", norm=scale, interpolation="nearest" if few else "antialiased")
    if few:
        axes.set_xticks(range(len(words)), shown, rotation=90, parse_math=False)
        axes.set_yticks(range(len(words)), shown, parse_math=False)
    axes.set(xlabel="the state after", ylabel="holds so much of", title=f"What the states of layer {number} remember")
    figure.colorbar(image, shrink=0.6, label=NAMES[explanation.reduce])
    write_figure(figure, path)


def write_page(explanation: Explanation, number: int, path: Path) -> None:
    """Writes an interactive page (HTML) that loads nothing else.

    Args:
      explanation: what `explain` returns, for a text of at most `DRAWN` tokens.
      number: of the layer that is displayed first, from 1.
      path: of the page.

    Raises:
      OSError: if the file cannot be written.
    """
    template = resources.files("ranjax.interpret").joinpath("page.html").read_text("utf-8")
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
    write_whole(path, template.replace("{{data}}", _json(data)))


def _layer(layer: Layer) -> dict:
    """A layer as the page reads it. Pairs up to the diagonal, row by row: square roots, as 65535ths of the largest."""
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
    """Each value to four significant digits."""
    return [float(f"{value:.4g}") for value in values]


def _json(data: dict) -> str:
    """JSON that can be embedded in a page: nothing in it ends the script element."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
