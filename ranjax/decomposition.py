"""What the states of a sequence are sums of: its gates and contents; see `ranjax.weights`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from ranjax.cell import ACTIVATIONS, Params, checked_carry, content, gates_of_input, gates_of_state
from ranjax.fixed_point import FixedPoint
from ranjax.gated import check_solver, gates_of, states
from ranjax.masks import Steps, checked, masked, padding_after, seen
from ranjax.scan import state_dtype

Sequence = Float[Array, "*batch time features"]


class Decomposition(NamedTuple):
    """What the states of a sequence are sums of; every array but `c0` is `(*batch, time, features)`.

    Attributes:
      i, f: the gates as they were. Where a segment starts f is 0; in padding i is 0 and f is 1.
      u: the contents.
      c: the states.
      c0: the state before the first step, `(*batch, features)`.
    """

    i: Sequence
    f: Sequence
    u: Sequence
    c: Sequence
    c0: Float[Array, "*batch features"]


def decompose(
    params: Params,
    x: ArrayLike,
    c0: ArrayLike | None = None,
    *,
    activation: str = "tanh",
    solver: str | FixedPoint = "auto",
    seq_lengths: ArrayLike | None = None,
    segment_starts: ArrayLike | None = None,
) -> Decomposition:
    """The states of a sequence, and the gates and contents that they are made of.

    Args:
      params: the parameters as a `RANCell` makes them; which gates they are is read off their shapes.
      x: inputs `(*batch, time, in)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None is the same as zeros.
      activation: `"tanh"` or `"identity"`, the g of h = g(c).
      solver: as for `RAN`.
      seq_lengths: integers `(*batch)`; the steps beyond are padding, whatever they hold.
      segment_starts: bool `(*batch, time)`, True where a new segment begins, which sees nothing of what came before.

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
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}.")
    check_solver(solver, gates_of(params))
    x = jnp.asarray(x)
    starts = checked("segment_starts", segment_starts, jnp.bool_, x.shape[:-1])
    lengths, padding = checked("seq_lengths", seq_lengths, jnp.integer, x.shape[:-2]), None
    if lengths is not None:
        padding = padding_after(lengths, x.shape[:-1], x.ndim - 2)
        x = jnp.where(padding[..., None], 0, x)  # before any product: padding may hold NaN
    u, z = content(params, x), gates_of_input(params, x)
    shape, dtype = (*u.shape[:-2], u.shape[-1]), state_dtype(u)
    c0 = jnp.zeros(shape, dtype) if c0 is None else checked_carry("c0", c0, shape)
    steps, masks = jax.tree.map(lambda a: jnp.moveaxis(a, x.ndim - 2, 0), (Steps(u, z), (starts, padding)))
    steps = masked(Steps(*(a.astype(c0.dtype) for a in steps)), *masks)
    c, _ = states(params, steps, c0, activation=activation, solver=solver)
    i, f = jnp.moveaxis(_gates(params, steps, c, c0, activation), -2, 0)
    i, f, u, c = (jnp.moveaxis(a, 0, -2) for a in (i, f, steps.u, c))
    return Decomposition(i, f, u, c, c0)


def _gates(params: Params, steps: Steps, c: Array, c0: Array, activation: str) -> Array:
    """Both gates of every step, `(time, *batch, 2, features)`, from the states."""
    if "recurrent_kernel" not in params["gates"]:
        return jax.nn.sigmoid(steps.z)
    before = seen(steps.z[..., 1, :], jnp.concatenate([c0[None], c[:-1]]))
    wide = jax.tree.map(lambda p: p.astype(c0.dtype), params)
    return jax.nn.sigmoid(steps.z + gates_of_state(wide, before, activation))


def _norm(w: Array) -> Array:
    squares = jnp.sum(w * w, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)  # 0 has no gradient of its own


MEASURES: dict[str, Callable[[Array], Array]] = {
    "max": lambda w: jnp.max(w, axis=-1),
    "l1": lambda w: jnp.sum(w, axis=-1),
    "l2": _norm,
    "contribution": lambda w: jnp.sum(w, axis=-1),
}


def measure_of(reduce: str) -> Callable[[Array], Array]:
    """One number for the (scaled) weights of all components, over the last axis."""
    if reduce not in MEASURES:
        raise ValueError(f"`reduce` must be one of {', '.join(map(repr, MEASURES))}; got {reduce!r}.")
    return MEASURES[reduce]


def scale_of(made: Decomposition, reduce: str) -> Array:
    """What the weights of a source are multiplied with before they are reduced."""
    return jnp.abs(made.u) if reduce == "contribution" else jnp.ones_like(made.u[..., :1])


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
