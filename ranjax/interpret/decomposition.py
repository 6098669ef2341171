"""A sequence of states as weighted sums: gates, contents and states of a RAN; see `ranjax.weights`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from ranjax.cell import ACTIVATIONS, Params, checked_inputs, gates_of
from ranjax.errors import check_choice
from ranjax.scan import Sequence, State
from ranjax.solvers import check_solver, prepared, states_and_gates
from ranjax.solvers.fixed_point import FixedPoint
from ranjax.solvers.masks import Steps, checked_lengths, checked_starts, padding_after


class Decomposition(NamedTuple):
    r"""Gates, contents and states of a sequence: all that the weighted sum of a state consists of.

    .. math::
        c_t = i_t * u_t + f_t * c_{t-1}

    Attributes:
      i: input gates, `(*batch, time, features)`; 0 in padding.
      f: forget gates, `(*batch, time, features)`; 0 where a segment starts, 1 in padding. So in padding every half-life
        is `most` and every span 1: leave padding out by its lengths.
      u: contents, `(*batch, time, features)`.
      c: states, `(*batch, time, features)`.
      c0: state before the first step, `(*batch, features)`.
    """

    i: Sequence
    f: Sequence
    u: Sequence
    c: Sequence
    c0: State


def decompose(
    params: Params,
    x: ArrayLike,
    c0: ArrayLike | None = None,
    *,
    activation: str = "tanh",
    solver: str | FixedPoint = "auto",
    seq_lengths: ArrayLike | None = None,
    segment_starts: ArrayLike | None = None,
    dtype: Dtype | None = None,
) -> Decomposition:
    r"""Computes the states of a sequence and returns them with their gates and contents.

    .. math::
        u_t = W_c x_t, \qquad
        i_t = \sigma(W_{ix} x_t + W_{ih} h_{t-1} + b_i), \qquad
        f_t = \sigma(W_{fx} x_t + W_{fh} h_{t-1} + b_f), \qquad
        c_t = i_t * u_t + f_t * c_{t-1}

    Args:
      params: parameters of a `RANCell`. Their shapes determine which gates they belong to.
      x: inputs, `(*batch, time, in)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None stands for zeros.
      activation: `"tanh"` (default) or `"identity"`, the g of h = g(c). It is not in the parameters: give that of the
        cell.
      solver: as for `RAN`.
      seq_lengths: integers, `(*batch)`; later steps are padding, whatever they hold. None: no padding.
      segment_starts: bool or the numbers 0 and 1, `(*batch, time)`; True where a new segment starts, which ignores all
        earlier steps. None: one segment.
      dtype: of the products, as that of the cell.

    Returns:
      A `Decomposition`. Its states and gates are those that the solver computed, in the dtype of the states.

    Raises:
      ValueError: for an unknown `activation` or `solver`, `params` that are not a cell's, a shape that does not fit.
      TypeError: for a dtype that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax import weights
      >>> cell, x = ranjax.RANCell(features=4), jax.random.normal(jax.random.key(1), (2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> parts = weights.decompose(params, x)
      >>> w = weights.at(parts, 49)  # of the last state
      >>> bool(jnp.allclose(jnp.sum(w * parts.u, axis=-2), parts.c[:, 49], atol=1e-6))
      True

    References:
      Lee, Levy, Zettlemoyer, "Recurrent Additive Networks", 2017.
    """
    check_choice("activation", activation, ACTIVATIONS)
    params, x = checked_inputs(params, x)
    check_solver(solver, gates_of(params))
    starts = checked_starts(segment_starts, x.shape[:-1])
    lengths, padding = checked_lengths(seq_lengths, x.shape[:-2], x.shape[-2]), None
    if lengths is not None:
        padding = padding_after(lengths, x.shape[:-1], x.ndim - 2)
        x = jnp.where(padding[..., None], 0, x)  # before any product: padding may hold NaN
    params, steps, first = prepared(params, x, c0, starts, padding, dtype)
    steps = Steps(*(a.astype(first.dtype) for a in steps))
    c, gates = states_and_gates(params, steps, first, activation=activation, solver=solver)
    i, f, u, c = (jnp.moveaxis(a, 0, -2) for a in (gates[..., 0, :], gates[..., 1, :], steps.u, c))
    return Decomposition(i, f, u, c, first)


def _largest(w: Array) -> Array:
    return jnp.max(w, axis=-1)


def _total(w: Array) -> Array:
    return jnp.sum(w, axis=-1)


def _norm(w: Array) -> Array:
    """The L2 norm. Weights are at most 1; a power of 2 scales them, so that squares of weights above 2e-36 do not
    underflow."""
    scale = 2.0 ** (jnp.finfo(w.dtype).maxexp * 7 // 16)
    squares = _total(jnp.square(scale * w))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0) / scale  # 0 has no gradient


MEASURES = {"max": _largest, "l1": _total, "l2": _norm, "contribution": _total}


def measure_of(reduce: str) -> Callable[[Array], Array]:
    """The function that reduces the (scaled) weights of all components, the last axis, to one number."""
    check_choice("reduce", reduce, MEASURES)
    return MEASURES[reduce]


def measure_pairs(reduce: str, p: Array, w: Array) -> Array:
    """The measure of the product of each row of `p` with each row of `w`, `(rows of p, rows of w)`."""
    measure = measure_of(reduce)
    if measure is _largest:
        return measure(p[:, None] * w[None])
    if measure is _total:
        return _products(p, w)
    scale = 2.0 ** (jnp.finfo(p.dtype).maxexp * 7 // 32)
    norms = jnp.sqrt(_products(jnp.square(scale * p), jnp.square(scale * w))) / scale**2
    # Squares that underflow, below 2^-91 in float32, are negligible in a norm above 2^-60.
    certain = jnp.all(norms > 2.0 ** (-jnp.finfo(p.dtype).maxexp * 15 // 32))
    return lax.cond(certain, lambda: norms, lambda: measure(p[:, None] * w[None]))


def _products(p: Array, w: Array) -> Array:
    return jnp.matmul(p, w.T, precision="highest")


def scale_of(parts: Decomposition, reduce: str) -> Array:
    """The factor of a source's weights before they are reduced: |u| for `"contribution"`, else 1."""
    return jnp.abs(parts.u) if reduce == "contribution" else jnp.ones_like(parts.u[..., :1])


@partial(jax.jit, static_argnums=2, inline=True)
def rows(i: Sequence, f: Sequence, emit: Callable[[Array], Array]) -> Array:
    """`emit(w^t)` for each t, stacked on an axis before that of j. Only one w^t is in memory at a time."""
    time = f.ndim - 2
    j = jnp.arange(f.shape[time])[:, None]

    def row(w, gates):
        t, i, f = gates
        w = jnp.where(j == t, i[..., None, :], f[..., None, :] * w)
        return w, emit(w)

    gates = (j[:, 0], *(jnp.moveaxis(a, time, 0) for a in (i, f)))
    return jnp.moveaxis(lax.scan(row, jnp.zeros_like(f), gates)[1], 0, time)


def checked_index(name: str, value: ArrayLike, size: int) -> Array:
    """An index as an array. Raises a ValueError if it is not an integer from 0 to `size` - 1; a traced value is not
    checked."""
    if np.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"`{name}` must be one integer; got {value!r}.")
    if not isinstance(value, Tracer) and not 0 <= np.asarray(value) < size:
        raise ValueError(f"`{name}` must be from 0 to {size - 1}; got {value}.")
    return jnp.asarray(value)
