r"""Which words a prediction is due to: the logits of a language model of RAN layers as sums over the words read.

Given its gates, a RAN layer is linear in its inputs, except for the tanh of its outputs. Write each tanh as a product,
tanh(c) = r * c with the ratio r = tanh(c) / c held constant. Then the network is linear in the embeddings of the words,
in the initial states and in its biases, and a logit is exactly the sum of their shares:

.. math::
    \text{logit} = \sum_j \text{share}(\text{word}_j) + \sum_l \text{share}(\text{carry}_l) + \text{share}(\text{bias})

In residual blocks three more factors are held constant: the reciprocal root mean square of each norm, the output gate
silu(W_g n), and the MLP's gate silu(W_s m). Convolutions and products are linear as they are. The carry of a layer is
then its state and the steps that its convolution remembers.

With the identity as activation r is 1, and in plain layers the shares continue the decomposition of `ranjax.weights` to
the logit, through any number of layers. With tanh this is the rescale rule of DeepLIFT (Shrikumar et al. 2017) with
contents of 0 as the reference. For one layer it equals the integrated gradients along the contents.

Shares hold the factors constant: the effect of a word on the gates is in no word's share. `integrated_gradients`
includes it, at the price of a numerical integral. `experiments/weights` compares both with the change of the logit when
a word is replaced.

With an adaptive softmax the logit is the score of the word within its cluster, where the difference of two scores is
that of the log-probabilities.

Sums are in float32 or wider. For a model with narrower products they differ from its logits by the rounding of those.

References:
  Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences", ICML 2017;
  Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation",
  PLoS ONE 2015, for factors that are held.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax import Array, lax
from jax.typing import ArrayLike

from ranjax.block import convolved, delayed
from ranjax.cell import Params, content, gates_of, output
from ranjax.errors import check_size
from ranjax.interpret.decomposition import Decomposition, checked_index, decompose
from ranjax.lm import Carries, LanguageModel, checked_ids
from ranjax.scan import linear_recurrence, state_dtype

AT_ONCE = 32  # nodes of a quadrature


class Shares(NamedTuple):
    """The terms of a logit.

    Attributes:
      words: the share of each word read, `(time,)`; 0 for words after the step that predicts.
      carry: the share of each layer's initial state, `(layers,)`; of a residual block with the steps that its
        convolution remembers.
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
      One `Decomposition` for each layer, from the first to the last. In residual blocks the contents are of what the
      convolution returns: those of a step and of the few right before it.

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
    x = _embedded(model, params, tokens)
    return _read(model, params, x, _carries(model, state, x), dtype=model.dtype)[1]


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
    _check_model(model, params)
    _check_text(tokens)
    x = _embedded(model, params, tokens)
    target, step = checked_index("target", target, model.vocabulary), checked_index("step", step, len(x))
    carries = _carries(model, state, x)

    def logit(scale: Shares) -> Array:
        scaled = [jax.tree.map(lambda c, s=s: s * c, carry) for carry, s in zip(carries, scale.carry, strict=True)]
        h, _ = _read(model, params, scale.words[:, None] * x, scaled, scale.bias, held=True, dtype=model.dtype)
        weight, bias = _output_layer(model, params, target)
        return jnp.dot(h[step], weight) + scale.bias * bias

    dtype = state_dtype(x)
    return jax.grad(logit)(Shares(jnp.ones(len(x), dtype), jnp.ones(len(carries), dtype), jnp.ones((), dtype)))


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
    that point is the `bias` of the result. The norms of residual blocks keep the factors that they have at the end of
    the path, since they would undo the scaling. The effect of a word on these factors is in no word's share.

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
    carries = _carries(model, state, x)

    factors: list[Array] = []
    _read(model, params, x, carries, factor=lambda h: factors.append(_reciprocal_rms(h)) or factors[-1])

    def logit(scale: Array, x: Array, carries: list) -> Array:
        kept = iter(factors)
        scaled = jax.tree.map(lambda c: scale * c, carries)
        h, _ = _read(model, params, scale * x, scaled, factor=lambda _: next(kept))
        weight, bias = _output_layer(model, params, target)
        return jnp.dot(h[step], weight) + bias

    points, quadrature = (jnp.asarray(a / 2, x.dtype) for a in np.polynomial.legendre.leggauss(nodes))
    points = points + 0.5
    # By the chain rule the gradient of logit(a x) in x has a factor a, hence the division; no node is at a = 0.
    gradients = lax.map(lambda a: jax.grad(logit, argnums=(1, 2))(a, x, carries), points, batch_size=AT_ONCE)
    mean = jax.tree.map(lambda g: jnp.tensordot(quadrature / points, g, 1), gradients)
    products = jax.tree.map(lambda g, a: g * a, mean, (x, carries))
    carry = jnp.stack([sum(jnp.sum(a) for a in jax.tree.leaves(of_layer)) for of_layer in products[1]])
    return Shares(jnp.sum(products[0], axis=-1), carry, logit(jnp.zeros((), x.dtype), x, carries))


def _carries(model: LanguageModel, state: Carries | None, x: Array) -> list:
    """The state before the first step, checked, for embeddings `(*batch, time, in)`; zeros for None."""
    batch, dtype, carries = x.shape[:-2], state_dtype(x), []
    for carry, size in zip(model.carries(state, batch), model.sizes, strict=True):
        first = jnp.zeros((*batch, size), dtype)
        if model.block == "residual":
            first = first, jnp.zeros((*batch, model.conv_width - 1, model.embedding_size), dtype)
        carries.append(first if carry is None else carry)
    return carries


def _reciprocal_rms(x: Array) -> Array:
    """The factor of an RMSNorm before its scale, as flax computes it, `(..., 1)`."""
    return lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + nn.RMSNorm.epsilon)


def _read(
    model: LanguageModel,
    params: Params,
    x: Array,
    carries: list,
    bias: ArrayLike = 1.0,
    held: bool = False,
    factor: Callable[[Array], Array] = _reciprocal_rms,
    dtype: Dtype | None = None,
) -> tuple[Array, list[Decomposition]]:
    """What the output layer reads, and the decompositions of all layers.

    Args:
      x: embeddings `(*batch, time, in)`.
      carries: of the layers before the first step.
      bias: a factor of the projections' biases.
      held: whether the factors are constants to a derivative.
      factor: of a norm, from its inputs.
      dtype: of the cells' products.
    """
    hold = lax.stop_gradient if held else _unchanged

    def norm(params: Params, h: Array) -> Array:
        return h * hold(factor(h)) * lax.broadcast_to_rank(params["scale"], h.ndim)

    h, layers = x, []
    for n, carry in enumerate(carries):
        layer = params[f"stack_{n}"]
        states = partial(_states, model, layer["cell"], hold=hold, bias=bias, dtype=dtype, layers=layers)
        h = _block(layer, h, carry, states, norm, hold) if model.block == "residual" else states(h, carry)
    return (norm(params["norm"], h) if model.block == "residual" else h), layers


def _states(
    model: LanguageModel,
    cell: Params,
    v: Array,
    c0: Array,
    *,
    hold: Callable,
    bias: ArrayLike,
    dtype: Dtype | None,
    layers: list,
) -> Array:
    """The outputs of a RAN; its decomposition is added to `layers`."""
    parts = decompose(cell, hold(v), hold(c0), activation=model.activation, solver=model.solver, dtype=dtype)
    layers.append(parts)
    if hold is _unchanged:
        return output(cell, parts.c, model.activation)
    c = linear_recurrence(parts.f, parts.i * content(cell, v), c0)
    h = c if model.activation == "identity" else c * _ratio(parts.c)
    if "projection" not in cell:
        return h
    return jnp.dot(h, cell["projection"]["kernel"]) + bias * lax.broadcast_to_rank(cell["projection"]["bias"], h.ndim)


def _block(layer: Params, x: Array, carry: tuple, states: Callable, norm: Callable, hold: Callable) -> Array:
    """A residual block, with `states(v, c0)` for its cell and `norm(params, x)`; see `ranjax.ResidualBlock`."""
    c0, history = carry
    n = norm(layer["norm"], x)
    v = n + convolved(layer["conv"], delayed(n, history, x.ndim - 2)) if "conv" in layer else n
    x = x + _product(layer, "out", states(v, c0) * hold(jax.nn.silu(_product(layer, "gate", n))))
    if "mlp_in" not in layer:
        return x
    m = norm(layer["mlp_norm"], x)
    gate = hold(jax.nn.silu(_product(layer, "mlp_gate", m)))
    return x + _product(layer, "mlp_out", _product(layer, "mlp_in", m) * gate)


def _product(layer: Params, name: str, x: Array) -> Array:
    return jnp.dot(x, layer[name]["kernel"])


def _unchanged(factor: Any) -> Any:
    return factor


def _check_model(model: LanguageModel, params: Params) -> None:
    """Raises a ValueError for a model whose states are not weighted sums, or for parameters of another model."""
    if model.cell != "ran":
        raise ValueError(
            f"`model` must have cell='ran'; got cell={model.cell!r}, whose states are not weighted sums of its inputs."
        )
    adaptive = model.softmax == "adaptive"
    if ("adaptive" if adaptive else "embed") not in params:
        raise ValueError(
            f"`params` must be those of the model, variables['params']; got {', '.join(params) or 'nothing'}."
        )
    cells = [layer["cell"] for name, layer in params.items() if name.startswith("stack_")]
    if not all("gates" in cell for cell in cells):
        raise ValueError("`params` must be those of the model, cell='ran'; got those of another cell.")
    gates = "-".join(sorted({gates_of(cell) for cell in cells}))
    projected = any("projection" in cell for cell in cells)
    block = "residual" if "norm" in params else "plain"
    asked = model.vocabulary, len(model.sizes), model.tie, model.gates, model.projection is not None, model.block
    words = params["embed"]["embedding"].shape[0] if "embed" in params else model.vocabulary
    tied = "embed" not in params if adaptive else "decode" not in params
    given = words, len(cells), tied, gates, projected, block
    if asked != given:
        names = "vocabulary={}, layers={}, tie={}, gates={!r}, projected={}, block={!r}"
        raise ValueError(f"`params` must be those of the model, {names.format(*asked)}; got {names.format(*given)}.")


def _check_text(tokens: ArrayLike) -> None:
    """Raises a ValueError for ids that are not those of one text of at least one token."""
    shape = jnp.shape(tokens)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"`tokens` must be the ids of one text, (time,), of at least one; got the shape {shape}.")


def _embedded(model: LanguageModel, params: Params, tokens: ArrayLike) -> Array:
    """What the first layer reads. Raises a ValueError for ids out of the model's range, unless they are traced."""
    ids = checked_ids(tokens, model.vocabulary)
    return jnp.asarray(model.clone(dtype=None).apply({"params": params}, ids, method="embedded"))


def _ratio(c: Array) -> Array:
    """tanh(c) / c, and its limit 1 at 0."""
    return jnp.where(c == 0, 1, jnp.tanh(c) / jnp.where(c == 0, 1, c))


def _output_layer(model: LanguageModel, params: Params, target: ArrayLike) -> Any:
    """The weights and the bias of a word's logit."""
    return model.clone(dtype=None).apply({"params": params}, jnp.asarray(target), method="score")
