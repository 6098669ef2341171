"""What the states of a sequence are sums of: its gates and contents; see `ranjax.weights`."""

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
from ranjax.solvers.fixed_point import FixedPoint
from ranjax.solvers import check_solver, prepared, states_and_gates
from ranjax.solvers.masks import Steps, checked, checked_lengths, padding_after
from ranjax.scan import Sequence, State


class Decomposition(NamedTuple):
    """What the states of a sequence are sums of; every array but `c0` is `(*batch, time, features)`.

    Attributes:
      i, f: the gates as they were. Where a segment starts f is 0; in padding i is 0 and f is 1 (its half-lives are
        `most`, its spans 1: leave padding out by its lengths).
      u: the contents.
      c: the states.
      c0: the state before the first step, `(*batch, features)`.
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
    """The states of a sequence, and the gates and contents that they are made of.

    Args:
      params: the parameters as a `RANCell` makes them; which gates they are is read off their shapes.
      x: inputs `(*batch, time, in)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None is the same as zeros.
      activation: `"tanh"` or `"identity"`, the g of h = g(c). It is not in the parameters: give that of the cell.
      solver: as for `RAN`.
      seq_lengths: integers `(*batch)`; the steps beyond are padding, whatever they hold.
      segment_starts: bool `(*batch, time)`, True where a new segment begins, which sees nothing of what came before.
      dtype: of the products, as that of the cell.

    Raises:
      ValueError, TypeError: for a name that is not known, a shape or a dtype that does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax import weights
      >>> cell, x = ranjax.RANCell(features=4), jax.random.normal(jax.random.key(1), (2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> made = weights.decompose(params, x)
      >>> w = weights.at(made, 49)  # of the last state
      >>> bool(jnp.allclose(jnp.sum(w * made.u, axis=-2), made.c[:, 49], atol=1e-6))
      True
    """
    check_choice("activation", activation, ACTIVATIONS)
    params, x = checked_inputs(params, x)
    check_solver(solver, gates_of(params))
    starts = checked("segment_starts", segment_starts, jnp.bool_, x.shape[:-1])
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
    """The L2 norm; weights are at most 1, so that scaled up by a power of 2 no square of one above 2e-36 is lost."""
    scale = 2.0 ** (jnp.finfo(w.dtype).maxexp * 7 // 16)
    squares = _total(jnp.square(scale * w))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0) / scale  # 0 has no gradient


MEASURES = {"max": _largest, "l1": _total, "l2": _norm, "contribution": _total}


def measure_of(reduce: str) -> Callable[[Array], Array]:
    """One number for the (scaled) weights of all components, over the last axis."""
    check_choice("reduce", reduce, MEASURES)
    return MEASURES[reduce]


def measure_pairs(reduce: str, p: Array, w: Array) -> Array:
    """The measure of the products of every row of `p` with every row of `w`, `(rows of p, rows of w)`."""
    measure = measure_of(reduce)
    if measure is _largest:
        return measure(p[:, None] * w[None])
    if measure is _total:
        return _products(p, w)
    scale = 2.0 ** (jnp.finfo(p.dtype).maxexp * 7 // 32)
    norms = jnp.sqrt(_products(jnp.square(scale * p), jnp.square(scale * w))) / scale**2
    # Squares of a row that are lost, below 2^-91 of float32, are nothing beside a norm above 2^-60.
    certain = jnp.all(norms > 2.0 ** (-jnp.finfo(p.dtype).maxexp * 15 // 32))
    return lax.cond(certain, lambda: norms, lambda: measure(p[:, None] * w[None]))


def _products(p: Array, w: Array) -> Array:
    return jnp.matmul(p, w.T, precision="highest")


def scale_of(made: Decomposition, reduce: str) -> Array:
    """What the weights of a source are multiplied with before they are reduced."""
    return jnp.abs(made.u) if reduce == "contribution" else jnp.ones_like(made.u[..., :1])


@partial(jax.jit, static_argnums=2, inline=True)
def rows(i: Sequence, f: Sequence, emit: Callable[[Array], Array]) -> Array:
    """What is made of w^t for each t, stacked on an axis before that of j; one w^t in memory at a time."""
    time = f.ndim - 2
    j = jnp.arange(f.shape[time])[:, None]

    def row(w, gates):
        t, i, f = gates
        w = jnp.where(j == t, i[..., None, :], f[..., None, :] * w)
        return w, emit(w)

    gates = (j[:, 0], *(jnp.moveaxis(a, time, 0) for a in (i, f)))
    return jnp.moveaxis(lax.scan(row, jnp.zeros_like(f), gates)[1], 0, time)


def checked_index(name: str, value: ArrayLike, size: int) -> Array:
    """An index from 0 to size - 1, once it is seen to be one; a traced one is taken as it comes."""
    if np.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"`{name}` must be one integer; got {value!r}.")
    if not isinstance(value, Tracer) and not 0 <= np.asarray(value) < size:
        raise ValueError(f"`{name}` must be from 0 to {size - 1}; got {value}.")
    return jnp.asarray(value)
