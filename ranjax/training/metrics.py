"""How good a model is: perplexity, and the exact evaluation of a text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ranjax.errors import DivergedError, UserError, check_size
from ranjax.lm import LanguageModel, checked_text, zero_state
from ranjax.training.mesh import over_streams
from ranjax.training.processes import alone, from_first

MOST = 1e100  # perplexity: JSON and pictures have no infinity
# Tokens a call. The state goes on from one to the next, so the result does not depend on it; of several streams,
# though, each but the first reads as many before it counts.
WINDOW = 512


def perplexity(nats: float) -> float:
    """exp(nats), at most `MOST`."""
    return min(math.exp(min(nats, 700.0)), MOST)


def shown(perplexity: float) -> str:
    """Two digits after the point; of a model that has diverged, three in all."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
      nats: mean cross-entropy of a prediction.
      tokens: number of predictions that count: of a whole text, one less than it has tokens.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats)

    @property
    def bits(self) -> float:
        """Mean bits a prediction."""
        return self.nats / math.log(2)

    def line(self, unit: str | None, unknown: int = 0) -> str:
        """One line: perplexity, bits a character or byte, and the number of tokens they are of."""
        bits = f", {self.bits:.4f} bits per {unit}" if unit else ""
        tokens = f"{self.tokens:,} tokens" + (f", {unknown:,} of them <unk>" if unknown else "")
        return f"perplexity {shown(self.perplexity)}{bits}, {self.nats:.4f} nats, {tokens}"


def agreed(evaluation: Evaluation) -> Evaluation:
    """The same evaluation, with the loss that the first process has found; others may differ in the last bits."""
    return evaluation if alone() else replace(evaluation, nats=float(from_first(np.float32(evaluation.nats))))


def finite(evaluation: Evaluation) -> Evaluation:
    """The same evaluation.

    Raises:
      DivergedError: for one that is not finite, which is no result.
    """
    if not math.isfinite(evaluation.nats):
        raise DivergedError(
            f"the loss on this text is {evaluation.nats}: the model's parameters, or what it computes with them, are "
            "not finite. Train again, with a lower --learning-rate or --clip."
        )
    return evaluation


def make_evaluator(
    model: LanguageModel, streams: int = 1, between: Callable[[], Any] = lambda: None, mesh: Mesh | None = None
) -> Callable[..., Evaluation]:
    """`evaluate(params, ids, counted=None) -> Evaluation`: the whole text as one stream.

    Every prediction counts, once, or those of the tokens that `counted`, bool of the shape of `ids`, marks.

    Args:
      model: what predicts.
      streams: how many parts of the text are read side by side, which is faster. Each but the first begins `WINDOW`
        tokens before those that it counts: the state at its first prediction remembers no further back.
      between: called between two windows of text; what it raises ends the evaluation.
      mesh: devices, as `ranjax.training.mesh.make_mesh` returns them; where they divide the streams, each reads its
        own. None: the default device.

    Raises:
      ValueError: for a number of streams that is none; from the function, for ids that are not the model's, for
        `counted` of another shape or dtype, or with none marked.
      UserError: from the function, for a text without a prediction.

    Example:
      >>> import jax, numpy as np, ranjax
      >>> from ranjax.evaluate import make_evaluator
      >>> model, ids = ranjax.LanguageModel(vocabulary=9, layers=1, features=4), np.arange(100) % 9
      >>> params = model.init(jax.random.key(0), ids[None, :1], deterministic=True)["params"]
      >>> make_evaluator(model)(params, ids).tokens
      99
    """
    check_size("streams", streams)

    reader = _reader(model, mesh)

    def evaluate(params, ids, counted=None) -> Evaluation:
        ids = checked_text("ids", ids, model.vocabulary)
        if len(ids) < 2:
            raise UserError(f"a text of at least 2 tokens is needed to predict one from another; got {len(ids)}.")
        counts = np.ones(len(ids) - 1, bool) if counted is None else _checked_marks(np.asarray(counted), len(ids))[1:]
        side_by_side = min(streams, max(1, -(-(len(counts) - WINDOW) // WINDOW)))  # others would have no text
        state, losses = zero_state(model, params, side_by_side), []
        params, run = reader(params, side_by_side)
        for inputs, outputs in _windows(ids[:-1], np.where(counts, ids[1:], -1), side_by_side):
            between()
            state, loss = run(params, state, inputs, outputs)
            losses.append(loss)
        total, number = np.sum(jax.device_get(losses), dtype=np.float64), int(counts.sum())
        return Evaluation(float(total) / number, number)

    return evaluate


def _reader(model: LanguageModel, mesh: Mesh | None) -> Callable[[Any, int], tuple[Any, Callable]]:
    """`reader(params, streams)`: the parameters where they are computed with, and what reads a window of so many."""

    def window(params, state, tokens, targets):
        apply = partial(model.apply, {"params": params})
        hidden, state = apply(tokens, state, deterministic=True, method="hidden")
        nats = jnp.asarray(apply(hidden, jnp.maximum(targets, 0), method="nats"))
        return state, jnp.sum(jnp.where(targets < 0, 0.0, nats))

    on_one = jax.jit(window, donate_argnums=1)
    if mesh is None or mesh.size == 1:
        return lambda params, _: (params, on_one)
    on_all = jax.jit(over_streams(window, mesh), donate_argnums=1)

    def reader(params, streams):
        if streams % mesh.shape["data"] == 0 and alone() and model.solver != "pallas":  # not for `shard_map`
            return params, on_all
        return (params if mesh.shape["model"] > 1 else jax.device_put(params, jax.local_devices()[0])), on_one

    return reader


def _checked_marks(counted: np.ndarray, tokens: int) -> np.ndarray:
    """The marks of a text of so many tokens, after a check that one which has a prediction is marked."""
    fits = counted.shape == (tokens,) and counted.dtype == bool
    if not (fits and counted[1:].any()):
        got = "no such mark" if fits else f"{counted.dtype} of the shape {counted.shape}"
        raise ValueError(
            f"`counted` must be bool, of the shape {(tokens,)} of `ids`, and mark a token after the first; got {got}."
        )
    return counted


def _windows(tokens: np.ndarray, targets: np.ndarray, streams: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both, a window of every stream at a time, `(streams, WINDOW)`; a target is -1 where it does not count."""
    own = -(-max(len(tokens) - WINDOW, 0) // (streams * WINDOW)) * WINDOW  # what a stream after the first counts
    padding = (0, streams * own + WINDOW - len(tokens))
    tokens, targets = np.pad(tokens, padding), np.pad(targets, padding, constant_values=-1)
    for first in range(0, own + WINDOW, WINDOW):
        at = first + np.arange(streams)[:, None] * own + np.arange(WINDOW)
        outputs = targets[at]
        if first == 0:
            outputs[1:] = -1
        yield tokens[at], outputs
