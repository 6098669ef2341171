"""Recurrences that are not linear, solved for all time steps at once: settings, and the iteration.

A recurrence c_t = F_t(c_{t-1}) is solved by iterating linear ones. With any D_t in place of the Jacobian dF_t/dc_{t-1},

    c_t <- D_t c_{t-1} + (F_t(p_{t-1}) - D_t p_{t-1}),    p the states of the pass before,

has the states of the sequential walk for its only fixed point: every pass makes a further step exact, whatever D is,
and how much sooner all of them are depends on how near D is to the Jacobian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.errors import check_choice, check_size
from ranjax.sharding import chained, largest, largest_anywhere, steps_walked, summed, varying_as
from ranjax.scan import SOLVERS

Splitting = Literal["diagonal", "frozen"]
OnFailure = Literal["sequential", "nan", "ignore"]
Precision = Literal["default", "high", "highest"]


@dataclass(frozen=True)
class FixedPoint:
    """How a RAN whose gates read h_{t-1} is solved for all time steps of a window at once.

    A pass is one product over all steps and one linear recurrence; passes that would overshoot are averaged. They end
    when at every step the residual max |F(c_{t-1}) - c_t| is at most `rtol` times the larger of max |c_{t-1}| and
    max |F(c_{t-1})|: where one feature is much larger than the others, these have its tolerance. Gradients solve the
    transposed linear system, with the full Jacobian, by the same iteration in reverse, to a tolerance of their own.
    Cotangents below a thousandth of the largest of their sequence and window have the tolerance of that thousandth:
    what a loss on late states gives to much earlier ones has few digits or none. Where that itself is wanted (how far
    a memory reaches, the gradient of a first state) use `"sequential"`. Products are in the dtype of the states. A
    residual bounds what a step is off by; where the model amplifies it, states and gradients are off by more.

    Batch by the leading axes. On a mesh each device makes its own passes and has a record of them, unless time is
    spread. Under `vmap` `on_failure="sequential"` always walks, for both branches of a condition that is batched are
    computed; `"nan"` does not.

    Attributes:
      splitting: what stands for the Jacobian in a pass. `"diagonal"`: its diagonal, clipped to [-1, 1]; `"frozen"`: the
        forget gate, as if the gates did not answer to the state.
      recurrence: solver of the linear recurrences; see `linear_recurrence`. Those that take several steps at once round
        by the states some steps back: where a state of hundreds of times the next one is cancelled within a step, not
        forgotten, they leave a residual above the default tolerance.
      window: most time steps solved at once. Longer sequences are solved window after window, each from the last
        state: fewer passes where a memory is long, and the gradient keeps the states alone, making all else anew a
        window at a time. None, or with time spread over a mesh: all at once. A gradient of a gradient needs None where
        there would be windows (JAX cannot transpose that twice inside a scan); forward over reverse mode does not.
      rtol: tolerance of the states. None: 32 times the eps of their dtype.
      adjoint_rtol: tolerance of the gradient's system. None: 8 times eps.
      max_iterations: passes after which the iteration has failed.
      precision: of the products on a GPU or TPU until the residual is below 1e-2; the last passes always run at
        `"highest"`, for with rounded products the residual stalls near 1e-3.
      on_failure: `"sequential"`: the states, or the gradient's system, are solved by the sequential walk; `"nan"`: they
        are NaN; `"ignore"`: they are what the last pass left, which for a gradient nothing tells.

    Raises:
      ValueError: for a setting out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> x = jax.random.normal(jax.random.key(0), (2, 300, 3))
      >>> layer = ranjax.RAN(ranjax.RANCell(features=4), solver=ranjax.FixedPoint(window=100))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> walked = ranjax.RAN(ranjax.RANCell(features=4), solver="sequential").apply(variables, x)
      >>> bool(jnp.allclose(layer.apply(variables, x), walked, atol=1e-4))
      True

    References:
      Gonzalez, Warrington, Smith, Linderman, "Towards Scalable and Stable Parallelization of Nonlinear RNNs", NeurIPS
      2024 (quasi-DEER).
    """

    splitting: Splitting = "diagonal"
    recurrence: str = "auto"
    window: int | None = 1024
    rtol: float | None = None
    adjoint_rtol: float | None = None
    max_iterations: int = 100
    precision: Precision = "highest"
    on_failure: OnFailure = "sequential"

    def __post_init__(self):
        for name, choices in (
            ("splitting", get_args(Splitting)),
            ("recurrence", tuple(SOLVERS)),
            ("precision", get_args(Precision)),
            ("on_failure", get_args(OnFailure)),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("rtol", "adjoint_rtol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < float(value) < 1):
                raise ValueError(f"`{name}` must be a number above 0 and below 1, or None; got {value!r}.")
        check_size("max_iterations", self.max_iterations)
        check_size("window", self.window, optional=True)


class Record(NamedTuple):
    """What a solver did to find the states; of the gradient's system nothing is recorded.

    Attributes:
      iterations: passes, the most that a window took; 0 for a solver that does not iterate.
      residual: largest one-step residual, relative to the larger of the two states that it lies between; where the
        passes came to an end before it was within the tolerance, that of the pass before the last.
      converged: whether the residual is within the tolerance.
    """

    iterations: Array
    residual: Array
    converged: Array


def exact(dtype: jnp.dtype) -> Record:
    """The record of a solver that does not iterate."""
    return Record(jnp.int32(0), jnp.zeros((), dtype), jnp.bool(True))


Pass = Callable[[Array], tuple[Array, Array]]


def averaged(
    x: Array, after: Array, step_before: Array, residual: Array, settled: Array, axis_name: str | None = None
) -> tuple[Array, Array]:
    """What the next pass starts from: what this one made, or an average of that and of what it started from.

    An error that changes its sign from pass to pass fades sooner when two passes are averaged. With a_k what pass k
    makes of x_k = a_{k-1}, r_k = a_k - x_k, and where <r_k, r_{k-1}> < 0,

        x_{k+1} = a_k - w r_k,    w = <r_k, r_k - r_{k-1}> / |r_k - r_{k-1}|^2, but at most 1/2,

    a w for each sequence: Anderson's mixing of depth 1, at every other pass at most, never extrapolating. Not as long
    as there is a state that is off by more than its own size, nor where the squares of steps are no normal numbers, nor
    where a_k is exact.

    Args:
      step_before: r_{k-1}; zeros if x_k is not what the pass before made.
      residual: the largest of all x_k, relative.
      settled: `(time, 1)`, the steps that so many passes make exact.

    Returns:
      x_{k+1}, and r_k or, after an average, zeros, for the next pass.

    References:
      Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM Journal on Numerical Analysis, 2011.
    """
    step = after - x
    products = step * step, step * step_before, step_before * step_before
    sums = jnp.stack([jnp.sum(p, axis=(-2, -1), keepdims=True) for p in products])
    square, turned, square_before = summed(sums, axis_name)  # one exchange between devices
    size = square - 2 * turned + square_before
    usable = (turned < 0) & jnp.isfinite(size) & (residual < 1)
    weight = jnp.minimum((square - turned) / jnp.where(usable, size, 1), 0.5)
    moves = usable & ~lax.broadcast_to_rank(settled, x.ndim)
    return jnp.where(moves, after - weight * step, after), jnp.where(usable, 0, step)


def iterate(
    apply: Pass,
    first: Array,
    rtol: float,
    record: Record | None = None,
    *,
    most: int,
    average: bool = True,
    reverse: bool = False,
    axis_name: str | None = None,
) -> tuple[Array, Record]:
    """Applies passes until one finds a relative residual of at most `rtol`, or is the `most`-th.

    Args:
      apply: x -> the next x, and the relative residual of this one.
      first: `(*batch, time, features)` to start from.
      record: of the iteration that this one goes on with.
      average: whether passes that would overshoot are averaged.
      reverse: whether each step depends on the one after it.
      axis_name: the mesh axis that time is spread over.

    Returns:
      The x whose residual the record tells, or, if that is above the tolerance, what the next pass would start from; a
      residual that is not finite ends the iteration at once.
    """

    def going(loop):
        _, _, record = loop
        return ~record.converged & (record.iterations < most) & jnp.isfinite(record.residual)

    def turn(loop):
        x, step, record = loop
        after, residual = apply(x)
        x_next = after
        if average:
            settled = (steps_walked(x.shape[-2], reverse, axis_name) <= record.iterations)[:, None]
            x_next, step = averaged(x, after, step, residual, settled, axis_name)
        converged = residual <= rtol
        return jnp.where(converged, x, x_next), step, Record(record.iterations + 1, residual, converged)

    begun = record or Record(jnp.int32(0), jnp.asarray(jnp.finfo(first.dtype).max, first.dtype), jnp.bool(False))
    begun = begun._replace(converged=jnp.bool(False))
    begun = jax.tree.map(lambda a: varying_as(a, () if axis_name else (first,)), begun)
    x, _, ended = lax.while_loop(going, turn, (first, jnp.zeros_like(first), begun))
    return x, ended


def relative(difference: Array, to: tuple[Array, Array], share: float = 0.0, axis_name: str | None = None) -> Array:
    """The largest, over all steps, of max |difference| / max |to|, the maxima over the features.

    Where all are so small that their roundings are flushed to 0, it is relative to the least that has digits.

    Args:
      difference: `(*batch, time, features)`.
      to: what a step comes from, and what it makes of that.
      share: of the largest of a sequence, against which smaller ones are measured.
      axis_name: the mesh axis that time is spread over.
    """
    scale = jnp.maximum(*(jnp.max(jnp.abs(a), axis=-1, keepdims=True) for a in to))
    if share:
        scale = jnp.maximum(scale, share * largest(jnp.max(scale, axis=-2, keepdims=True), axis_name))
    finfo = jnp.finfo(difference.dtype)
    return largest_anywhere(jnp.max(jnp.abs(difference) / jnp.maximum(scale, finfo.tiny / finfo.eps)), axis_name)


def or_walked(
    found: Array,
    record: Record,
    walk: Callable[[Array, Any], tuple[Array, Array]],
    first: Array,
    steps: Any,
    solver: FixedPoint,
    reverse: bool = False,
    axis_name: str | None = None,
) -> Array:
    """What the iteration found; where it has failed, what stands for it.

    Args:
      walk: carry, steps with time first -> last carry, values with time first.
      first: the carry to walk from, `(*batch, features)`.
      steps: arrays `(*batch, time, ...)`.
    """

    def walked():
        rows = jax.tree.map(lambda a: jnp.moveaxis(a, first.ndim - 1, 0), steps)
        with jax.default_matmul_precision("highest"):
            return jnp.moveaxis(chained(lambda carry: walk(carry, rows), first, reverse, axis_name), 0, -2)

    if solver.on_failure == "sequential":
        return lax.cond(record.converged, lambda: found, walked)
    return found if solver.on_failure == "ignore" else jnp.where(record.converged, found, jnp.nan)
