"""Which words a model remembers: `python -m ranjax.explain --checkpoint DIR --text "..."`."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ranjax.errors import UserError, exit_with_message
from ranjax.hugepages import restart_with_huge_pages

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

    from ranjax.evaluate import Run
    from ranjax.lm import LanguageModel
    from ranjax.vocabulary import Vocabulary

DRAWN = 2000  # tokens that a page or a figure shows at most
PREDICTIONS = 5  # likeliest next words
ARRAYS = 16  # of the size of a layer's states, that are in memory at once


@dataclass(frozen=True)
class Layer:
    """What is shown of one layer.

    Attributes:
      own: the reduced weight of each step in its own state, `(time,)`.
      weights, sources: of the strongest earlier ones, `(time, top)`: the reduced weights, and their steps, -1 for none.
      half_lives: the median of each component's, `(features,)`; `horizon` stands for that and more.
      horizon: steps that were looked ahead.
      pairs: what each step is to each state, `(time, time)`; empty where it is not drawn.
    """

    own: "np.ndarray"
    weights: "np.ndarray"
    sources: "np.ndarray"
    half_lives: "np.ndarray"
    horizon: int
    pairs: "np.ndarray"


@dataclass(frozen=True)
class Prediction:
    """A likely next word, and what its logit is the sum of.

    Attributes:
      word: as it is shown.
      probability: that the model gives it.
      words: the share of each word read, `(time,)`.
      bias: the share of the biases.
    """

    word: str
    probability: float
    words: "np.ndarray"
    bias: float

    @property
    def logit(self) -> float:
        return float(self.words.sum()) + self.bias


@dataclass(frozen=True)
class Explanation:
    """A text as a model read it.

    Attributes:
      words: its tokens, as they are shown.
      separator: what stands between them.
      reduce: what one number for all components' weights is.
      layers: from the first to the last.
      predictions: of the word after the text, the likeliest first.
    """

    words: list[str]
    separator: str
    reduce: str
    layers: list[Layer]
    predictions: list[Prediction]


def explain(run: "Run", text: str, *, reduce: str = "l2", top: int = 3, drawn: bool = False) -> Explanation:
    """Reads a text with a trained model and finds what its states and its next word are made of.

    Args:
      run: what `ranjax.evaluate.load_run` returns.
      text: what to read.
      reduce: `"max"`, `"l1"`, `"l2"` or `"contribution"`; see `ranjax.weights`.
      top: sources of each state.
      drawn: whether all pairs of steps are wanted, too.

    Raises:
      UserError: for a model that is not a RAN, a text that is empty, has words that its vocabulary cannot tell, or is
        too long.
    """
    import jax

    if run.model.cell != "ran":
        raise UserError(
            f"this run is of the cell {run.model.cell!r}, whose states are not weighted sums of what it read. Give a "
            "run trained with --cell ran."
        )
    ids = run.vocabulary.encode(text)
    _check_length(run.model, len(ids), drawn)
    found = partial(_found, run.model, reduce=reduce, top=top, drawn=drawn)
    layers, probabilities, targets, shares = jax.device_get(jax.jit(found)(run.params, ids))
    horizon = _horizon(len(ids))
    predictions = [
        Prediction(piece(run.vocabulary, int(v)), float(p), words, float(bias))
        for v, p, words, bias in zip(targets, probabilities, shares.words, shares.bias, strict=True)
    ]
    words = [piece(run.vocabulary, i) for i in ids]
    shown = [Layer(own, weights, sources, lives, horizon, pairs) for own, weights, sources, lives, pairs in layers]
    return Explanation(words, run.vocabulary.separator, reduce, shown, predictions)


def _found(model: "LanguageModel", params: Any, ids: Any, *, reduce: str, top: int, drawn: bool) -> Any:
    """The arrays of an explanation."""
    import jax
    import jax.numpy as jnp

    from ranjax import weights
    from ranjax.attribution import decompositions, shares_of
    from ranjax.cell import output
    from ranjax.decomposition import measure_of, scale_of

    made, layers, time = decompositions(model, params, ids), [], len(ids)
    for layer in made:
        lives = weights.half_lives(layer, _horizon(time))[: time - _horizon(time) + 1]  # those that are seen to the end
        pairs = weights.reduced(layer, reduce) if drawn else jnp.zeros((0, 0))
        own = measure_of(reduce)(layer.i * scale_of(layer, reduce))
        layers.append((own, *_earlier(*weights.top(layer, top + 1, reduce)), jnp.median(lives, axis=0), pairs))
    hidden = output(params[f"stack_{len(made) - 1}"]["cell"], made[-1].c[-1], model.activation)
    logits = jnp.asarray(model.apply({"params": params}, hidden, method="logits"))
    probabilities, targets = jax.lax.top_k(jax.nn.softmax(logits), min(PREDICTIONS, model.vocabulary))
    shares = jax.vmap(lambda target: shares_of(model, params, made, target, time - 1))(targets)
    return layers, probabilities, targets, shares


def _earlier(values: "Array", steps: "Array") -> "tuple[Array, Array]":
    """The strongest sources but for the step itself, which is among them or would be the next."""
    import jax.numpy as jnp

    order = jnp.argsort(steps == jnp.arange(len(steps))[:, None], axis=1, stable=True)[:, :-1]
    return jnp.take_along_axis(values, order, 1), jnp.take_along_axis(steps, order, 1)


def _horizon(time: int) -> int:
    """Steps that half-lives look ahead: half of the text, so that the words of its first half are seen to the end."""
    return time // 2 + 1


def piece(vocabulary: "Vocabulary", token: int) -> str:
    """A token as it is shown; the end of a line is its sign."""
    return vocabulary.decode([token]).replace("\n", "⏎")


def _check_length(model: "LanguageModel", time: int, drawn: bool) -> None:
    """Refuses a text that is empty, too long to be drawn, or more than the memory holds."""
    if not time:
        raise UserError("the text is empty; give --text or --file at least one word.")
    if drawn and time > DRAWN:
        raise UserError(
            f"--out shows at most {DRAWN:,} tokens, and this text has {time:,}. Leave --out away, or give a part of it."
        )
    each, free = 4 * ARRAYS * sum(model.sizes), free_memory()
    if free is not None and each * time > free:
        raise UserError(
            f"a text of {time:,} tokens takes about {each * time / 1e9:.1f} GB of memory with this model, and "
            f"{free / 1e9:.1f} GB are free: enough for {free // each:,} tokens. Give a part of it."
        )


def free_memory() -> int | None:
    """Bytes of memory that are free, where the system tells."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


@dataclass(frozen=True)
class Options:
    """Shows which words a model remembers: the strongest sources of every state, and of the word it expects next."""

    checkpoint: str
    """The --out directory of a run."""
    text: str | None = None
    """The text to read; words as the run's data set writes them, that is with spaces around punctuation."""
    file: str | None = None
    """A file with the text, in its place."""
    layer: int = 1
    """Layer whose states are shown, from 1: its sources are the words, those of later ones the outputs below."""
    reduce: Literal["max", "l1", "l2", "contribution"] = "l2"
    """One number for the weights of all components: the largest, their norm, or the L1 norm of weight times content."""
    top: int = 3
    """Sources shown of each word."""
    out: str | None = None
    """A page (.html) or a figure (.png) to write."""


def read_text(options: Options) -> str:
    """The text that was given."""
    if (options.text is None) == (options.file is None):
        raise UserError("give the text by --text or by --file, by one of them.")
    if options.file is None:
        return options.text or ""
    path = Path(options.file).expanduser()
    if not path.is_file():
        raise UserError(f"--file {path} is not a file.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def check(options: Options, layers: int) -> None:
    """Raises a UserError for an option out of its range."""
    if not 1 <= options.layer <= layers:
        raise UserError(f"--layer must be from 1 to {layers}, the layers of this run; got {options.layer}.")
    if options.top < 1:
        raise UserError(f"--top must be at least 1; got {options.top}.")
    if options.out is not None and Path(options.out).suffix.lower() not in (".html", ".png"):
        raise UserError(f"--out must end in .html (a page) or .png (a figure); got {options.out}.")
    if options.out is not None and not Path(options.out).expanduser().absolute().parent.is_dir():
        raise UserError(f"--out is to be in {Path(options.out).parent}, which is not a directory.")


def main(argv: list[str] | None = None) -> None:
    """The program."""
    import tyro

    from ranjax import views
    from ranjax.evaluate import load_run

    with exit_with_message():
        options = tyro.cli(Options, args=argv, prog="python -m ranjax.explain")
        text, run = read_text(options), load_run(options.checkpoint)
        check(options, len(run.model.sizes))
        drawn = options.out is not None
        explanation = explain(run, text, reduce=options.reduce, top=options.top, drawn=drawn)
        views.print_sources(explanation, options.layer)
        if options.out is not None:
            path = Path(options.out).expanduser()
            write = views.write_page if path.suffix.lower() == ".html" else views.draw_pairs
            write(explanation, options.layer, path)
            print(f"written: {path}")


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
