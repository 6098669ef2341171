r"""Which words a prediction is due to: the logits of a language model of RAN layers as sums over the words read.

Given its gates, a RAN layer is linear in its inputs, except for the tanh of its outputs. Write each tanh as a product,
tanh(c) = r * c with the ratio r = tanh(c) / c held constant. Then the network is linear in the embeddings of the words,
in the initial states and in its biases, and a logit is exactly the sum of their shares:

.. math::
    \text{logit} = \sum_j \text{share}(\text{word}_j) + \sum_l \text{share}(\text{carry}_l) + \text{share}(\text{bias})

With the identity as activation r is 1, and the shares continue the decomposition of `ranjax.weights` to the logit,
through any number of layers. With tanh this is the rescale rule of DeepLIFT (Shrikumar et al. 2017) with contents of 0
as the reference. For one layer it equals the integrated gradients along the contents.

Shares hold the gates constant: the effect of a word on the gates is in no word's share. `integrated_gradients` includes
it, at the price of a numerical integral. `experiments/weights` compares both with the change of the logit when a word
is replaced.

Sums are in float32 or wider. For a model with narrower products they differ from its logits by the rounding of those.

References:
  Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences", ICML 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ranjax.cell import Params, content, gates_of, output
from ranjax.errors import check_size
from ranjax.interpret.decomposition import Decomposition, checked_index, decompose
from ranjax.lm import Carries, LanguageModel, checked_ids
from ranjax.scan import linear_recurrence, state_dtype
from ranjax.solvers import solve

AT_ONCE = 32  # nodes of a quadrature


class Shares(NamedTuple):
    """The terms of a logit.

    Attributes:
      words: the share of each word read, `(time,)`; 0 for words after the step that predicts.
      carry: the share of each layer's initial state, `(layers,)`.
      bias: the share of the biases of the output layer and of projections, `()`.
    """

    words: Array
    carry: Array
    bias: Array

    @property
    def total(self) -> Array:
        """The logit, the sum of all shares."""
        return jnp.sum(self.words) + jnp.sum(self.carry) + self.bias


def decompositions(
    model: LanguageModel, params: Params, tokens: ArrayLike, state: Carries | None = None
) -> list[Decomposition]:
    """Decomposes the states of every layer over a text; see `ranjax.weights.decompose`.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      tokens: ids, `(*batch, time)`.
      state: one carry `(*batch, features)` per layer, as the model returns it; None for the start of a text.

    Returns:
      One `Decomposition` for each layer, from the first to the last.

    Raises:
      ValueError: for a model of another cell, whose states are not weighted sums, parameters of another model, ids out
        of the model's range, or a state that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.interpret.attribution import decompositions
      >>> model, tokens = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), jnp.arange(5)
      >>> params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
      >>> [parts.c.shape for parts in decompositions(model, params, tokens)]
      [(5, 4)]
    """
    _check_model(model, params)
    x, layers, options = _embedded(model, params, tokens), [], {"activation": model.activation, "dtype": model.dtype}
    for n, carry in enumerate(model.carries(state, x.shape[:-2])):
        cell = params[f"stack_{n}"]["cell"]
        layers.append(decompose(cell, x, carry, solver=model.solver, **options))
        x = output(cell, layers[-1].c, model.activation)
    return layers


def shares(
    model: LanguageModel,
    params: Params,
    tokens: ArrayLike,
    target: ArrayLike,
    step: ArrayLike,
    state: Carries | None = None,
) -> Shares:
    """The shares of a text's words in the logit of a next word.

    Shares are linear in the logits: the difference of two words' shares explains the difference of their logits.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      tokens: ids of the text, `(time,)`.
      target: id of the word whose logit is explained; may be traced, as may `step`, so `jax.vmap` works over both.
      step: the step that predicts it, from 0 to time - 1.
      state: one carry `(features,)` per layer; None for the start of a text.

    Returns:
      `Shares`, whose `total` is the logit.

    Raises:
      ValueError: for a model of another cell, or parameters, a text, a state, a target or a step that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.interpret.attribution import shares
      >>> model, tokens = ranjax.LanguageModel(vocabulary=50, features=16), jnp.arange(10)
      >>> params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
      >>> logits, _ = model.apply({"params": params}, tokens[None], deterministic=True)
      >>> found = shares(model, params, tokens, target=7, step=9)
      >>> found.words.shape, bool(jnp.allclose(found.total, logits[0, 9, 7], atol=1e-6))
      ((10,), True)
    """
    _check_text(tokens)
    return shares_of(model, params, decompositions(model, params, tokens, state), target, step)


def shares_of(
    model: LanguageModel, params: Params, layers: list[Decomposition], target: ArrayLike, step: ArrayLike
) -> Shares:
    """`shares` from the decompositions of a text.

    Args:
      model, params, target, step: as for `shares`.
      layers: what `decompositions` returns for one text.

    Returns:
      `Shares`, whose `total` is the logit.

    Raises:
      ValueError: for a model of another cell, or parameters, a target or a step that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.interpret.attribution import decompositions, shares_of
      >>> model, tokens = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), jnp.arange(5)
      >>> params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
      >>> shares_of(model, params, decompositions(model, params, tokens), target=7, step=4).words.shape
      (5,)
    """
    _check_model(model, params)
    target, step = checked_index("target", target, model.vocabulary), checked_index("step", step, len(layers[0].u))

    def logit(scale: Shares) -> Array:
        h = jnp.zeros(())  # output of the layer below; unused in the first
        for n, parts in enumerate(layers):
            cell = params[f"stack_{n}"]["cell"]
            u = content(cell, h) if n else parts.u * scale.words[:, None]
            c = linear_recurrence(parts.f, parts.i * u, parts.c0 * scale.carry[n])
            h = c if model.activation == "identity" else c * _ratio(parts.c)
            if "projection" in cell:
                h = jnp.dot(h, cell["projection"]["kernel"])
                h = h + scale.bias * lax.broadcast_to_rank(cell["projection"]["bias"], h.ndim)
        weight, bias = _output_layer(model, params, target)
        return jnp.dot(h[step], weight) + scale.bias * bias

    time, dtype = layers[0].u.shape[0], layers[0].u.dtype
    return jax.grad(logit)(Shares(jnp.ones(time, dtype), jnp.ones(len(layers), dtype), jnp.ones((), dtype)))


def integrated_gradients(
    model: LanguageModel,
    params: Params,
    tokens: ArrayLike,
    target: ArrayLike,
    step: ArrayLike,
    state: Carries | None = None,
    *,
    nodes: int = 32,
) -> Shares:
    r"""The shares of a text's words in the logit of a next word, including their effect on the gates.

    .. math::
        \text{share}(x_j) = x_j \cdot
            \int_0^1 \frac{\partial\, \text{logit}}{\partial x_j}(\alpha x, \alpha c_0)\, d\alpha

    x are the embeddings of the words and c_0 the initial states. The path starts where all of them are 0. The logit at
    that point is the `bias` of the result.

    Args:
      model, params, tokens, target, step, state: as for `shares`.
      nodes: nodes of the Gauss-Legendre quadrature, at which the gradient is computed (default: 32); at most 32 of them
        at once.

    Returns:
      `Shares`, whose `total` is the logit up to the error of the quadrature.

    Raises:
      ValueError: for a model of another cell, parameters, a text, a state, a target or a step that do not fit, or
        `nodes` below 1.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.interpret.attribution import integrated_gradients
      >>> model, tokens = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), jnp.arange(5)
      >>> params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
      >>> integrated_gradients(model, params, tokens, target=7, step=4).words.shape
      (5,)

    References:
      Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017.
    """
    _check_model(model, params)
    _check_text(tokens)
    check_size("nodes", nodes)
    x = _embedded(model, params, tokens)
    target, step = checked_index("target", target, model.vocabulary), checked_index("step", step, len(x))
    sizes = zip(model.carries(state, ()), model.sizes, strict=True)
    state = tuple(jnp.zeros(size, state_dtype(x)) if c is None else c for c, size in sizes)

    def logit(scale: Array, x: Array, state: Carries) -> Array:
        h = scale * x
        for n, c0 in enumerate(state):
            cell, options = params[f"stack_{n}"]["cell"], {"gates": model.gates, "activation": model.activation}
            c, _ = solve(cell, h, scale * c0, solver=model.solver, **options)
            h = output(cell, c, model.activation)
        weight, bias = _output_layer(model, params, target)
        return jnp.dot(h[step], weight) + bias

    points, quadrature = (jnp.asarray(a / 2, x.dtype) for a in np.polynomial.legendre.leggauss(nodes))
    # By the chain rule the gradient of logit(a x) in x has a factor a, hence the division; no node is at a = 0.
    gradients = lax.map(lambda a: jax.grad(logit, argnums=(1, 2))(a, x, state), points + 0.5, batch_size=AT_ONCE)
    mean = jax.tree.map(lambda g: jnp.tensordot(quadrature / (points + 0.5), g, 1), gradients)
    words, carry = jax.tree.map(lambda g, a: jnp.sum(g * a, axis=-1), mean, (x, tuple(state)))
    return Shares(words, jnp.stack(carry), logit(jnp.zeros((), x.dtype), x, state))


def _check_model(model: LanguageModel, params: Params) -> None:
    """Raises a ValueError for a model whose states are not weighted sums, or for parameters of another model."""
    if model.cell != "ran":
        raise ValueError(
            f"`model` must have cell='ran'; got cell={model.cell!r}, whose states are not weighted sums of its inputs."
        )
    if "embed" not in params:
        raise ValueError(
            f"`params` must be those of the model, variables['params']; got {', '.join(params) or 'nothing'}."
        )
    cells = [layer["cell"] for name, layer in params.items() if name.startswith("stack_")]
    if not all("gates" in cell for cell in cells):
        raise ValueError("`params` must be those of the model, cell='ran'; got those of another cell.")
    gates = "-".join(sorted({gates_of(cell) for cell in cells}))
    projected = any("projection" in cell for cell in cells)
    asked = model.vocabulary, len(model.sizes), model.tie, model.gates, model.projection is not None
    given = params["embed"]["embedding"].shape[0], len(cells), "decode" not in params, gates, projected
    if asked != given:
        names = "vocabulary={}, layers={}, tie={}, gates={!r}, projected={}"
        raise ValueError(f"`params` must be those of the model, {names.format(*asked)}; got {names.format(*given)}.")


def _check_text(tokens: ArrayLike) -> None:
    """Raises a ValueError for ids that are not those of one text of at least one token."""
    shape = jnp.shape(tokens)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"`tokens` must be the ids of one text, (time,), of at least one; got the shape {shape}.")


def _embedded(model: LanguageModel, params: Params, tokens: ArrayLike) -> Array:
    """The embeddings of the tokens. Raises a ValueError for ids out of the model's range, unless they are traced."""
    return jnp.take(params["embed"]["embedding"], checked_ids(tokens, model.vocabulary), axis=0)


def _ratio(c: Array) -> Array:
    """tanh(c) / c, and its limit 1 at 0."""
    return jnp.where(c == 0, 1, jnp.tanh(c) / jnp.where(c == 0, 1, c))


def _output_layer(model: LanguageModel, params: Params, target: ArrayLike) -> tuple[Array, Array]:
    """The weights and the bias of a word's logit."""
    if model.tie:
        rows, axis, bias = params["embed"]["embedding"], 0, params["bias"]
    else:
        rows, axis, bias = params["decode"]["kernel"], 1, params["decode"]["bias"]
    return jnp.take(rows, target, axis), jnp.take(bias, target)
