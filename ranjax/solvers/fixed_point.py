"""Recurrences that are not linear, solved for all time steps at once: the settings, and the iteration.

A recurrence c_t = F_t(c_{t-1}) is solved by iterating linear recurrences. With any D_t in place of the Jacobian
dF_t/dc_{t-1}, the states of the sequential scan are the only fixed point of

    c_t <- D_t c_{t-1} + (F_t(p_{t-1}) - D_t p_{t-1}),    p the states of the previous iteration.

Every iteration makes at least one more step exact, whatever D is. The nearer D is to the Jacobian, the fewer iterations
are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.errors import check_choice, check_size
from ranjax.scan import SOLVERS
from ranjax.sharding import chained, largest, largest_anywhere, steps_done, summed, varying_as
from ranjax.solvers.result import Result, Status

OnFailure = Literal["sequential", "nan"]


@dataclass(frozen=True)
class FixedPoint:
    r"""Solves a RAN whose gates read h_{t-1} for all time steps of a chunk at once.

    .. math::
        c_t \leftarrow D_t c_{t-1} + (F_t(p_{t-1}) - D_t p_{t-1})

    F is one step of the network, p the states of the previous iteration, and D the diagonal of the Jacobian of F,
    clipped to [-1, 1]. An iteration is one matrix product over all steps and one linear recurrence. Iterations that
    would overshoot are averaged. Products are in the dtype of the states, at JAX's precision `"highest"`.

    **Tolerance.** Iterations end when at every step the residual max |F(c_{t-1}) - c_t| is at most `rtol` times the
    larger of max |c_{t-1}| and max |F(c_{t-1})|, with maxima over the features. The tolerance of small features is
    therefore that of the largest one. The residual bounds the error of one step; where the model amplifies it, states
    and gradients have larger errors.

    **Gradients** solve the transposed linear system, with the full Jacobian, by the same iteration in reverse, with a
    tolerance of its own. Cotangents below a thousandth of the largest of their sequence and chunk are accurate only to
    that thousandth: the gradient of a loss on late states with regard to much earlier ones has few or no digits. Use
    `"sequential"` where that gradient matters (the reach of a memory, the gradient of the initial state).

    **Failure.** An iteration fails at `max_iterations`, or as soon as the residual is not finite. `on_failure` then
    applies to states and gradients alike: they are computed by the sequential scan, or are NaN. They are never the
    result of an iteration that has not converged. The `Result` beside the states reports on the states only; that of
    the gradient's system is returned by `ranjax.solvers.solve_adjoint`.

    **Batches.** Batch with leading axes. On a mesh each device iterates separately and has its own `Result`, unless
    time is spread over the devices. Under `vmap`, `on_failure="sequential"` always runs the sequential scan as well,
    because both branches of a batched condition are computed; `"nan"` avoids this.

    Attributes:
      recurrence: solver of the linear recurrences; see `linear_recurrence`. The parallel solvers round relative to
        states some steps earlier: if a state hundreds of times larger than the next one is cancelled within a step
        (rather than forgotten), the residual stays above the default tolerance.
      chunk: the largest number of time steps solved at once. Longer sequences are solved chunk by chunk, each from the
        last state of the one before. A long memory then needs fewer iterations, and the gradient stores only the
        states and recomputes the rest one chunk at a time. None, or time spread over a mesh: all steps at once. Second
        reverse-mode derivatives need None (JAX cannot transpose a scan twice); forward over reverse mode does not.
      rtol: relative tolerance of the states. None: 32 times the machine epsilon of their dtype.
      adjoint_rtol: relative tolerance of the gradient's system. None: 8 times the machine epsilon.
      max_iterations: the number of iterations after which a solve has failed.
      on_failure: `"sequential"`: compute the states, or solve the gradient's system, by the sequential scan; `"nan"`:
        return NaN.

    Raises:
      ValueError: for a setting out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> x = jax.random.normal(jax.random.key(0), (2, 300, 3))
      >>> layer = ranjax.RAN(ranjax.RANCell(features=4), solver=ranjax.FixedPoint(chunk=100))
      >>> variables = layer.init(jax.random.key(1), x)
      >>> expected = ranjax.RAN(ranjax.RANCell(features=4), solver="sequential").apply(variables, x)
      >>> bool(jnp.allclose(layer.apply(variables, x), expected, atol=1e-4))
      True

    References:
      Gonzalez, Warrington, Smith, Linderman, "Towards Scalable and Stable Parallelization of Nonlinear RNNs", NeurIPS
      2024 (quasi-DEER).
    """

    recurrence: str = "auto"
    chunk: int | None = 1024
    rtol: float | None = None
    adjoint_rtol: float | None = None
    max_iterations: int = 100
    on_failure: OnFailure = "sequential"

    def __post_init__(self):
        check_choice("recurrence", self.recurrence, tuple(SOLVERS))
        check_choice("on_failure", self.on_failure, get_args(OnFailure))
        for name in ("rtol", "adjoint_rtol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < float(value) < 1):
                raise ValueError(f"`{name}` must be a number above 0 and below 1, or None; got {value!r}.")
        check_size("max_iterations", self.max_iterations)
        check_size("chunk", self.chunk, optional=True)


Iteration = Callable[[Array], tuple[Array, Array]]


def averaged(
    x: Array, after: Array, step_before: Array, residual: Array, settled: Array, axis_name: str | None = None
) -> tuple[Array, Array]:
    """The start of the next iteration: the output of this one, or an average of its output and its start.

    An error that alternates in sign fades sooner when two iterates are averaged. With a_k the output of iteration k,
    started from x_k = a_{k-1}, with r_k = a_k - x_k, and where <r_k, r_{k-1}> < 0,

        x_{k+1} = a_k - w r_k,    w = <r_k, r_k - r_{k-1}> / |r_k - r_{k-1}|^2, but at most 1/2,

    with one w for each sequence. This is Anderson's mixing of depth 1, at most every other iteration, and it never
    extrapolates. There is no average while the residual of a state is at least its own size, nor where the squares of
    r overflow, nor at steps where a_k is exact.

    Args:
      x: x_k, `(*batch, time, features)`.
      after: a_k.
      step_before: r_{k-1}; zeros if x_k is not the output of the previous iteration.
      residual: the largest relative residual of x_k.
      settled: `(time, 1)`, the steps that are exact after this many iterations.
      axis_name: the mesh axis that time is spread over.

    Returns:
      x_{k+1}, and r_k for the next call; zeros instead of r_k after an average.

    References:
      Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM Journal on Numerical Analysis, 2011.
    """
    step = after - x
    products = step * step, step * step_before, step_before * step_before
    sums = jnp.stack([jnp.sum(p, axis=(-2, -1), keepdims=True) for p in products])
    square, mixed, square_before = summed(sums, axis_name)  # one exchange between devices
    size = square - 2 * mixed + square_before
    usable = (mixed < 0) & jnp.isfinite(size) & (residual < 1)
    weight = jnp.minimum((square - mixed) / jnp.where(usable, size, 1), 0.5)
    moves = usable & ~lax.broadcast_to_rank(settled, x.ndim)
    return jnp.where(moves, after - weight * step, after), jnp.where(usable, 0, step)


def iterate(
    apply: Iteration,
    first: Array,
    rtol: float,
    *,
    most: int,
    average: bool = True,
    reverse: bool = False,
    axis_name: str | None = None,
) -> tuple[Array, Result]:
    """Iterates until the relative residual is at most `rtol`, is not finite, or `most` iterations have run.

    Args:
      apply: x -> the next x, and the relative residual of this x.
      first: the initial x, `(*batch, time, features)`.
      rtol: relative tolerance.
      most: the largest number of iterations.
      average: whether iterations that would overshoot are averaged.
      reverse: whether each step depends on the one after it.
      axis_name: the mesh axis that time is spread over.

    Returns:
      The x whose residual the result reports, if it converged; otherwise the x that the next iteration would start
      from. The result's status is that of the last residual.
    """

    def proceed(loop):
        _, _, result = loop
        return (result.status == Status.MAX_ITERATIONS) & (result.iterations < most)

    def advance(loop):
        x, step, result = loop
        after, residual = apply(x)
        x_next = after
        if average:
            settled = (steps_done(x.shape[-2], reverse, axis_name) <= result.iterations)[:, None]
            x_next, step = averaged(x, after, step, residual, settled, axis_name)
        result = Result(_status(residual, rtol), result.iterations + 1, residual)
        return jnp.where(result.converged, x, x_next), step, result

    unsolved = Result(
        jnp.int32(Status.MAX_ITERATIONS), jnp.int32(0), jnp.asarray(jnp.finfo(first.dtype).max, first.dtype)
    )
    unsolved = jax.tree.map(lambda a: varying_as(a, () if axis_name else (first,)), unsolved)
    x, _, result = lax.while_loop(proceed, advance, (first, jnp.zeros_like(first), unsolved))
    return x, result


def _status(residual: Array, rtol: float) -> Array:
    """The status of an iteration that ends with this residual."""
    failed = jnp.where(jnp.isfinite(residual), jnp.int32(Status.MAX_ITERATIONS), jnp.int32(Status.NOT_FINITE))
    return jnp.where(residual <= rtol, jnp.int32(Status.SUCCESS), failed)


def relative(difference: Array, to: tuple[Array, Array], share: float = 0.0, axis_name: str | None = None) -> Array:
    """The largest value, over all steps, of max |difference| / max |to|, with maxima over the features.

    The divisor is at least the smallest number whose rounding error is a normal number: below it all digits are lost.

    Args:
      difference: `(*batch, time, features)`.
      to: the two arrays that the difference is measured against: the states before and after each step.
      share: lower bound of the divisor, as a share of the largest one of the sequence.
      axis_name: the mesh axis that time is spread over.

    Returns:
      One number, the same on all devices that time is spread over.
    """
    scale = jnp.maximum(*(jnp.max(jnp.abs(a), axis=-1, keepdims=True) for a in to))
    if share:
        scale = jnp.maximum(scale, share * largest(jnp.max(scale, axis=-2, keepdims=True), axis_name))
    finfo = jnp.finfo(difference.dtype)
    return largest_anywhere(jnp.max(jnp.abs(difference) / jnp.maximum(scale, finfo.tiny / finfo.eps)), axis_name)


def or_sequential(
    found: Array,
    result: Result,
    scan: Callable[[Array, Any], tuple[Array, Array]],
    first: Array,
    steps: Any,
    solver: FixedPoint,
    reverse: bool = False,
    axis_name: str | None = None,
) -> Array:
    """The values of an iteration if it converged; otherwise the sequential scan, or NaN, by `solver.on_failure`.

    Args:
      found: the values of the iteration, `(*batch, time, features)`.
      result: its result.
      scan: carry, steps with time first -> last carry, values with time first.
      first: the carry that the scan starts from, `(*batch, features)`.
      steps: arrays `(*batch, time, ...)`.
      solver: the settings.
      reverse: whether the scan runs from the last step to the first.
      axis_name: the mesh axis that time is spread over.
    """
    if solver.on_failure == "nan":
        return jnp.where(result.converged, found, jnp.nan)

    def sequential():
        rows = jax.tree.map(lambda a: jnp.moveaxis(a, first.ndim - 1, 0), steps)
        with jax.default_matmul_precision("highest"):
            return jnp.moveaxis(chained(lambda carry: scan(carry, rows), first, reverse, axis_name), 0, -2)

    return lax.cond(result.converged, lambda: found, sequential)
