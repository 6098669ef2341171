"""A text explained by a trained model: sources of the states, half-lives, attribution of the next word."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ranjax.cell import Params
from ranjax.device import free_memory
from ranjax.errors import UserError, check_size, fitting
from ranjax.interpret import weights
from ranjax.interpret.attribution import Shares, decompositions, shares
from ranjax.interpret.decomposition import Decomposition, measure_of, scale_of
from ranjax.lm import LanguageModel, Trained

DRAWN = 1000  # tokens; longer texts come without the map of all pairs
PREDICTIONS = 5  # likeliest next words
HORIZON = 512  # steps; the longest half-life that is distinguished


class Tokens(Protocol):
    """A vocabulary, as far as an explanation needs it; those of `ranjax.data` fit.

    Attributes:
      separator: the text between two tokens.
    """

    separator: ClassVar[str]

    def encode(self, text: str) -> np.ndarray:
        """The int32 ids of a text, `(tokens,)`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids."""
        ...


class TrainedModel(Trained, Protocol):
    """A model with its parameters and its vocabulary; what `ranjax.evaluate.load_run` returns fits."""

    @property
    def vocabulary(self) -> Tokens: ...


@dataclass(frozen=True)
class Layer:
    """The states of one layer.

    Attributes:
      own: the reduced weight of each step in its own state, `(time,)`.
      weights: reduced weights of the strongest earlier steps in each state, `(time, top)`, the largest first.
      sources: these steps, `(time, top)`; -1 for none.
      lasting: for how many steps more than half of each step's weight remains, its own included, `(time,)`; `time` if
        it does to the end of the text.
      half_lives: the median over steps of each component's half-life, `(features,)`; the explanation's `horizon`
        stands for that or more.
      pairs: the reduced weight of each step (column) in each state (row), `(time, time)`; None for a text of more than
        `DRAWN` tokens.
    """

    own: np.ndarray
    weights: np.ndarray
    sources: np.ndarray
    lasting: np.ndarray
    half_lives: np.ndarray
    pairs: np.ndarray | None


@dataclass(frozen=True)
class Prediction:
    """A likely next word and the terms of its logit.

    Attributes:
      word: the word as it is displayed.
      probability: its probability.
      words: the share of each word read, `(time,)`.
      bias: the share of the biases.
    """

    word: str
    probability: float
    words: np.ndarray
    bias: float

    @property
    def logit(self) -> float:
        """The sum of all shares."""
        return float(self.words.sum()) + self.bias


@dataclass(frozen=True)
class Explanation:
    """A text, the states of a model that reads it, and its predictions of the next word.

    Attributes:
      words: the tokens as they are displayed.
      separator: the text between two tokens.
      reduce: the measure of the weights of all components; see `ranjax.weights`.
      horizon: the longest half-life that is distinguished, in steps.
      layers: one `Layer` for each layer, from the first to the last.
      predictions: of the word after the text, the likeliest first.
    """

    words: list[str]
    separator: str
    reduce: str
    horizon: int
    layers: list[Layer]
    predictions: list[Prediction]


def explain(run: TrainedModel, text: str, *, reduce: str = "l2", top: int = 3) -> Explanation:
    """Explains what the states of a model remember of a text, and which words its predictions are due to.

    Args:
      run: a trained model of RAN layers with its vocabulary, as `ranjax.evaluate.load_run` returns it: any object with
        the attributes `model`, `params` and `vocabulary`.
      text: at least one token.
      reduce: `"max"`, `"l1"`, `"l2"` (default) or `"contribution"`; see `ranjax.weights`.
      top: number of sources to find for each state, at least 1.

    Returns:
      An `Explanation`.

    Raises:
      UserError: for a model of another cell, a text that is empty, has tokens that the vocabulary lacks, or is too long
        for the memory of the device.
      ValueError: for another `reduce`, or a `top` that is no size.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from types import SimpleNamespace
      >>> from ranjax.data.vocabulary import Characters
      >>> from ranjax.interpret.explanation import explain
      >>> model = ranjax.LanguageModel(vocabulary=3, features=4, layers=1)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int), deterministic=True)["params"]
      >>> run = SimpleNamespace(model=model, params=params, vocabulary=Characters("abc"))
      >>> explanation = explain(run, "abba")
      >>> explanation.words, explanation.layers[0].pairs.shape, len(explanation.predictions)
      (['a', 'b', 'b', 'a'], (4, 4), 3)
    """
    check_size("top", top)
    if run.model.cell != "ran":
        raise UserError(
            f"this run is of the cell {run.model.cell!r}, whose states are not weighted sums of what it read. Give a "
            "run trained with --cell ran."
        )
    with fitting("the text"):
        ids = run.vocabulary.encode(text)
    if not len(ids):
        raise UserError("the text is empty; give --text or --file at least one word.")
    explained = jax.jit(partial(_explained, run.model, reduce=reduce, top=min(top, len(ids) - 1)))
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]  # then nothing is compiled
        program = explained.lower(run.params, ids).compile()
        device, *_ = jax.tree.leaves(program.output_shardings)[0].device_set
        _check_memory(program.memory_analysis(), device, len(ids))
        explained = program
    layers, probabilities, targets, shares = jax.device_get(explained(run.params, ids))
    predictions = [
        Prediction(visible(piece(run.vocabulary, int(v))), float(p), words, float(bias))
        for v, p, words, bias in zip(targets, probabilities, shares.words, shares.bias, strict=True)
    ]
    words, layers = [piece(run.vocabulary, i) for i in ids], [Layer(**arrays) for arrays in layers]
    return Explanation(words, run.vocabulary.separator, reduce, _horizon(len(ids)), layers, predictions)


def _explained(
    model: LanguageModel, params: Params, ids: Array, *, reduce: str, top: int
) -> tuple[list[dict[str, Array | None]], Array, Array, Shares]:
    """The arrays of an explanation: of its layers, and probabilities, ids and shares of its predictions."""
    parts = decompositions(model, params, ids)
    layers = [_layer(layer, reduce, top) for layer in parts]
    hidden, _ = model.apply({"params": params}, ids[None], deterministic=True, method="hidden")
    logits = jnp.asarray(model.apply({"params": params}, hidden[0, -1], method="logits"))
    probabilities, targets = jax.lax.top_k(jax.nn.softmax(logits), min(PREDICTIONS, model.vocabulary))
    found = jax.vmap(lambda target: shares(model, params, ids, target, len(ids) - 1))(targets)
    return layers, probabilities, targets, found


def _layer(parts: Decomposition, reduce: str, top: int) -> dict[str, Array | None]:
    """The arrays of a `Layer`."""
    time = len(parts.u)
    horizon = _horizon(time)
    lives = weights.half_lives(parts, horizon)[: time - horizon + 1]  # steps that are followed for the whole horizon
    return {
        "own": measure_of(reduce)(parts.i * scale_of(parts, reduce)),
        "lasting": weights.spans(parts, reduce, most=time),
        "half_lives": jnp.quantile(lives, 0.5, axis=0, method="lower"),
        "pairs": weights.reduced(parts, reduce) if time <= DRAWN else None,
        **_earlier(*weights.top(parts, top + 1, reduce)),
    }


def _earlier(values: Array, steps: Array) -> dict[str, Array]:
    """The strongest sources without the step itself, or without the last where the step is not among them."""
    order = jnp.argsort(steps == jnp.arange(len(steps))[:, None], axis=1, stable=True)[:, :-1]
    return {"weights": jnp.take_along_axis(values, order, 1), "sources": jnp.take_along_axis(steps, order, 1)}


def _horizon(time: int) -> int:
    """Half of the text, at most `HORIZON`: half-lives of the steps in its first half are followed that far."""
    return min(time // 2 + 1, HORIZON)


def piece(vocabulary: Tokens, token: int) -> str:
    """A token as it is displayed, with symbols for ends of lines, tabs and other characters that cannot be printed."""
    shown = vocabulary.decode([token]).replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def visible(word: str) -> str:
    """A token as it is displayed on its own, with a symbol for each space."""
    return word if word.strip() else "␠" * len(word)


def _check_memory(needed: Any, device: Any, time: int) -> None:
    """Raises a UserError if a compiled program needs more memory than is free on its device."""
    takes, free = needed.temp_size_in_bytes + needed.output_size_in_bytes, free_memory(device)
    if free is not None and takes > free:
        raise UserError(
            f"a text of {time:,} tokens takes {takes / 1e6:,.0f} MB of memory with this model, and "
            f"{free / 1e6:,.0f} MB are free, enough for about {time * free // takes:,} tokens. Give a part of it, or a "
            "smaller --top."
        )
