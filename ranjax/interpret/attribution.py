r"""Which words made a prediction: the logits of a language model of RAN layers as sums over the words read.

Once its gates are known a RAN layer is linear in what it reads, but for the tanh of its outputs. Read each tanh as a
factor, tanh(c) = r * c with r = tanh(c) / c as it was, and the whole network is linear in the embeddings of the words,
in the states it began with and in its biases; so a logit is exactly the sum of a share for each of them:

.. math::
    \text{logit} = \sum_j \text{share}(\text{word}_j) + \sum_l \text{share}(\text{carry}_l) + \text{share}(\text{bias})

With the identity for its activation r is 1, and this is the decomposition of `ranjax.weights` carried on to the logit,
for any number of layers. With tanh it is a rule: the rescale rule (Shrikumar, Greenside, Kundaje, "Learning Important
Features Through Propagating Activation Differences", 2017) with a reference at which no word offers anything. For one
layer the integrated gradients along the contents give the same numbers. What a word did by moving gates is in no
word's share: the gates are taken as they were. `integrated_gradients` has that in them, too, at the price of a path
that is summed up numerically. How either compares with changing a word and watching the logit: `experiments/weights`.
Sums are in float32 or wider; where the model's products are narrower, its logits are rounded and the sums are not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from ranjax.cell import Params, content, gates_of, output
from ranjax.interpret.decomposition import Decomposition, checked_index, decompose
from ranjax.errors import check_size
from ranjax.solvers import solve
from ranjax.lm import Carries, LanguageModel, checked_ids
from ranjax.scan import linear_recurrence, state_dtype


class Shares(NamedTuple):
    """What a logit is the sum of.

    Attributes:
      words: the share of each word read, `(time,)`; 0 for those after the step that predicts.
      carry: the share of each layer's first state, `(layers,)`.
      bias: the share of the biases of the output layer and of projections, `()`.
    """

    words: Array
    carry: Array
    bias: Array

    @property
    def total(self) -> Array:
        """The logit."""
        return jnp.sum(self.words) + jnp.sum(self.carry) + self.bias


def decompositions(
    model: LanguageModel, params: Params, tokens: ArrayLike, state: Carries | None = None
) -> list[Decomposition]:
    """The decomposition of every layer's states, over a text.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      tokens: ids `(*batch, time)`.
      state: one carry `(*batch, features)` per layer, as the model returns it; None for the beginning of a text.

    Raises:
      ValueError: for a model of another cell, whose states are not weighted sums, parameters that are another model's,
        ids that are none of the model's, or a state that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.interpret.attribution import decompositions
      >>> model, tokens = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), jnp.arange(5)
      >>> params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
      >>> [made.c.shape for made in decompositions(model, params, tokens)]
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
    """What the words before it put into the logit of a word.

    Shares are linear in the logits: the difference of two words' shares is what makes one of them likelier.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      tokens: ids of the text, `(time,)`.
      target: id of the word whose logit it is; may be traced, as `step` may: `jax.vmap` over either.
      step: the step after which it is predicted, from 0.
      state: one carry `(features,)` per layer; None for the beginning of a text.

    Raises:
      ValueError: for a model of another cell, parameters, a text, a state, a target or a step that do not fit.

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
    """`shares` of a text whose decompositions are there already."""
    _check_model(model, params)
    target, step = checked_index("target", target, model.vocabulary), checked_index("step", step, len(layers[0].u))

    def logit(scale: Shares) -> Array:
        h = jnp.zeros(())  # of the layer below; the first has none
        for n, made in enumerate(layers):
            cell = params[f"stack_{n}"]["cell"]
            u = content(cell, h) if n else made.u * scale.words[:, None]
            c = linear_recurrence(made.f, made.i * u, made.c0 * scale.carry[n])
            h = c if model.activation == "identity" else c * _ratio(made.c)
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
    r"""What the words put into the logit of a word, their work on the gates included.

    .. math::
        \text{share}(x_j) = x_j \cdot
            \int_0^1 \frac{\partial\, \text{logit}}{\partial x_j}(\alpha x, \alpha c_0)\, d\alpha

    x are the embeddings of the words, c_0 the states to begin with. The path begins where all of them are 0: no word
    offers anything, and the gates are at their biases. `bias` of the result is the logit there, and `total` is the
    logit up to the error of the integral, a Gauss-Legendre sum.

    Args:
      model, params, tokens, target, step, state: as for `shares`.
      nodes: points of the path at which the gradient is taken.

    Raises:
      ValueError: for a model of another cell, parameters, a text, a state, a target or a step that do not fit, `nodes`
        that is no size.

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

    points, parts = (jnp.asarray(a / 2, x.dtype) for a in np.polynomial.legendre.leggauss(nodes))
    # The gradient of logit(a x) in x is a times that of logit at a x, hence the division: no point of the path is 0.
    gradients = jax.vmap(jax.grad(logit, argnums=(1, 2)), in_axes=(0, None, None))(points + 0.5, x, state)
    mean = jax.tree.map(lambda g: jnp.tensordot(parts / (points + 0.5), g, 1), gradients)
    words, carry = jax.tree.map(lambda g, a: jnp.sum(g * a, axis=-1), mean, (x, tuple(state)))
    return Shares(words, jnp.stack(carry), logit(jnp.zeros((), x.dtype), x, state))


def _check_model(model: LanguageModel, params: Params) -> None:
    """Raises a ValueError for a model whose states are not weighted sums, or parameters that are another model's."""
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
    shape = jnp.shape(tokens)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"`tokens` must be the ids of one text, (time,), of at least one; got the shape {shape}.")


def _embedded(model: LanguageModel, params: Params, tokens: ArrayLike) -> Array:
    """The embeddings of the tokens, once they are seen to be ids of the model; traced ones are taken as they come."""
    ids = checked_ids(tokens)
    if not isinstance(ids, Tracer) and ids.size and not 0 <= ids.min() <= ids.max() < model.vocabulary:
        expected = f"ids from 0 to {model.vocabulary - 1}, the model's"
        raise ValueError(f"`tokens` must be {expected}; got {ids.min()} to {ids.max()}.")
    return jnp.take(params["embed"]["embedding"], ids, axis=0)


def _ratio(c: Array) -> Array:
    """tanh(c) / c, which is 1 at 0."""
    return jnp.where(c == 0, 1, jnp.tanh(c) / jnp.where(c == 0, 1, c))


def _output_layer(model: LanguageModel, params: Params, target: ArrayLike) -> tuple[Array, Array]:
    """The weights and the bias of a word's logit."""
    if model.tie:
        rows, axis, bias = params["embed"]["embedding"], 0, params["bias"]
    else:
        rows, axis, bias = params["decode"]["kernel"], 1, params["decode"]["bias"]
    return jnp.take(rows, target, axis), jnp.take(bias, target)
