"""The derivative of a recurrence with gates on h_{t-1}: its Jacobians, and the linear system of the gradient."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.cell import ACTIVATIONS, Params, gates_of_state
from ranjax.scan import linear_recurrence, unroll
from ranjax.sharding import before, varying_as
from ranjax.solvers.fixed_point import FixedPoint, iterate, or_sequential, relative
from ranjax.solvers.masks import Steps, seen
from ranjax.solvers.result import Result, exact

FADED = 1e-3  # cotangents below this share of their sequence's largest have an absolute accuracy only


class Method(NamedTuple):
    """How the recurrences are solved.

    Attributes:
      solver: settings of the iteration; None: the sequential scan.
      axis_name: the mesh axis that time is spread over, for the iteration; None: it is not spread.
    """

    solver: FixedPoint | None
    axis_name: str | None = None

    @property
    def axis(self) -> int:
        """The axis of time in the states: the first for the sequential scan, the last but one for the iteration."""
        return 0 if self.solver is None else -2

    def precision(self) -> AbstractContextManager:
        """The precision of products with the Jacobians: the highest for the iteration, JAX's default for the scan."""
        return nullcontext() if self.solver is None else jax.default_matmul_precision("highest")


class Jacobians(NamedTuple):
    """J_t of every step: v -> f * v + answer_i * (W_ih (slope * v)) + answer_f * (W_fh (slope * v)).

    Attributes:
      f: the forget gate.
      answer: dc_t / dz_t of both gates, 0 where a segment start hides c_{t-1}.
      slope: dh_{t-1} / dc_{t-1}, before a projection.
    """

    f: Array
    answer: Array
    slope: Array


def answer(steps: Steps, earlier: Array, gates: Array) -> Array:
    """dc_t / dz_t of both gates."""
    return gates * (1 - gates) * jnp.stack([steps.u, earlier], axis=-2)


def jacobians_of(steps: Steps, earlier: Array, gates: Array, activation: str) -> Jacobians:
    """The Jacobians of all steps, from the states `earlier` that the steps start from, and the gates."""
    _, slope = jax.jvp(ACTIVATIONS[activation], (earlier,), (jnp.ones_like(earlier),))
    return Jacobians(gates[..., 1, :], seen(steps.z[..., 1:, :], answer(steps, earlier, gates)), slope)


def diagonal(params: Params) -> Array:
    """The diagonal of both gates' weights on g(c_{t-1}): `(2, features)`."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 2:
        return kernel
    if "projection" in params:
        return jnp.einsum("kn,ngk->gk", params["projection"]["kernel"], kernel)
    return jnp.einsum("kgk->gk", kernel)


def clipped(jacobians: Jacobians, weights: Array) -> Array:
    """The diagonals of the Jacobians, clipped to [-1, 1] so that no iterate grows over time.

    Args:
      jacobians: those of all steps.
      weights: `diagonal(params)`.
    """
    f, answer, slope = jacobians
    weights = lax.broadcast_to_rank(weights.astype(f.dtype), answer.ndim)
    return jnp.clip(f + slope * jnp.sum(answer * weights, axis=-2), -1, 1)


def jacobian_product(params: Params, jacobians: Jacobians, v: Array) -> Array:
    """J_t v, for one step or for all steps."""
    d_h = jacobians.slope * v
    _, d_z = jax.jvp(lambda h: gates_of_state(params, h, "identity"), (d_h,), (d_h,))
    return jacobians.f * v + jnp.sum(jacobians.answer * d_z.astype(v.dtype), axis=-2)


def transposed(params: Params) -> Params:
    """The weights transposed for `transposed_product`, so that no loop transposes them at every step."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 3:
        kernel = jnp.moveaxis(kernel, 0, -1).reshape(-1, kernel.shape[0])
    weights = {"gates": {"recurrent_kernel": kernel}}
    return weights | ({"projection": {"kernel": params["projection"]["kernel"].T}} if "projection" in params else {})


def transposed_product(weights: Params, jacobians: Jacobians, v: Array) -> Array:
    """The transpose of J_t times v, for one step or for all steps; `weights` are `transposed(params)`."""
    d_z, kernel = jacobians.answer * v[..., None, :], weights["gates"]["recurrent_kernel"]
    if jacobians.answer.shape[-2:] == kernel.shape:  # diagonal gates
        d_h = jnp.sum(d_z * lax.broadcast_to_rank(kernel, d_z.ndim), axis=-2)
    else:
        d_h = jnp.dot(d_z.reshape(*v.shape[:-1], -1).astype(kernel.dtype), kernel)
    if "projection" in weights:
        d_h = jnp.dot(d_h, weights["projection"]["kernel"])
    return jacobians.f * v + jacobians.slope * d_h.astype(v.dtype)


def linear_solve(params: Params, jacobians: Jacobians, r: Array, method: Method) -> Array:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    params = jax.tree.map(lambda p: varying_as(p, (r,)), params)  # the types that they have as residuals
    zero = jnp.zeros_like(first_step(r, method.axis))

    def matvec(v):
        with method.precision():
            return v - jacobian_product(params, jacobians, before(v, zero, method.axis, axis_name=method.axis_name))

    def solve(_, r, reverse=False):
        return solve_system(params, jacobians, r, method, reverse)[0]

    return lax.custom_linear_solve(matvec, r, solve, partial(solve, reverse=True))


def solve_system(
    params: Params, jacobians: Jacobians, r: Array, method: Method, reverse: bool = False
) -> tuple[Array, Result]:
    r"""The linear system of the tangents, or with `reverse` of the cotangents, and how it was solved.

    .. math::
        v_t = J_t v_{t-1} + r_t, \qquad \text{in reverse} \quad v_t = J_{t+1}^\top v_{t+1} + r_t

    Args:
      params: the parameters that the gates read the state with.
      jacobians: J of all steps, time on `method.axis`.
      r: the right-hand side, of the shape of the states.
      method: how to solve it.
      reverse: solve the transposed system.

    Returns:
      v, zero before the first step (in reverse, after the last), and its `Result`.
    """
    zero = jnp.zeros_like(first_step(r, method.axis))
    if method.solver is None:
        return _sequential(params, zero, (jacobians, r), reverse)[1], exact(r.dtype)
    v, result = iterate_system(params, jacobians, r, method.solver, method.axis_name, reverse)
    scan = partial(_sequential, params, reverse=reverse)
    return or_sequential(v, result, scan, zero, (jacobians, r), method.solver, reverse, method.axis_name), result


def _sequential(params: Params, first: Array, rows: tuple[Jacobians, Array], reverse: bool) -> tuple[Array, Array]:
    """The system by one scan step after another, time first: the last carry, and v."""
    weights = transposed(params) if reverse else params

    def forward(v, step):
        v = jacobian_product(params, step[0], v) + step[1]
        return v, v

    def backward(v, step):  # the carry is the transpose of J_{t+1} times v_{t+1}
        v = v + step[1]
        return transposed_product(weights, step[0], v), v

    return lax.scan(backward if reverse else forward, first, rows, reverse=reverse, unroll=unroll())


def iterate_system(
    params: Params,
    jacobians: Jacobians,
    r: Array,
    solver: FixedPoint,
    axis_name: str | None = None,
    reverse: bool = False,
) -> tuple[Array, Result]:
    """The system as the fixed point of v_t <- D_t v_{t-1} + (J_t - D_t) p_{t-1} + r_t, p the previous iterate.

    Returns:
      The last iterate, converged or not, and its `Result`.
    """
    zero, weights = jnp.zeros_like(first_step(r, -2)), transposed(params) if reverse else params
    d = clipped(jacobians, diagonal(params))

    def neighbours(a):  # the values that each step starts from: in reverse, those of the later step
        return before(a, zero, -2, reverse, axis_name)

    def product(v):
        if reverse:
            return neighbours(transposed_product(weights, jacobians, v))
        return jacobian_product(params, jacobians, neighbours(v))

    d = neighbours(d) if reverse else d

    def apply(v):
        after, others = product(v) + r, neighbours(v)
        v_next = linear_recurrence(
            d, after - d * others, reverse=reverse, solver=solver.recurrence, axis_name=axis_name
        )
        return v_next, relative(after - v, (after, others), FADED, axis_name)

    rtol = 8 * float(jnp.finfo(r.dtype).eps) if solver.adjoint_rtol is None else solver.adjoint_rtol
    options: dict = {"average": overshoots(params), "reverse": reverse, "axis_name": axis_name}
    with jax.default_matmul_precision("highest"):
        return iterate(apply, r, rtol, most=solver.max_iterations, **options)


def overshoots(params: Params) -> bool:
    """Whether iterations may overshoot. Those of diagonal gates are Newton's: few, and averages do not help."""
    return params["gates"]["recurrent_kernel"].ndim == 3


def first_step(array: Array, axis: int) -> Array:
    """An array's values at the first step."""
    return lax.index_in_dim(array, 0, axis, keepdims=False)
