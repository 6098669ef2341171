"""The derivative of a recurrence with gates on h_{t-1}: its Jacobians, and the linear system that they make."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.cell import ACTIVATIONS, Params, gates_of_state
from ranjax.solvers.fixed_point import FixedPoint, iterate, or_walked, relative
from ranjax.solvers.masks import Steps, seen
from ranjax.sharding import before, varying_as
from ranjax.scan import linear_recurrence, unroll

FADED = 1e-3  # share of a sequence's largest cotangent, below which cotangents are to be right to that share only


class Way(NamedTuple):
    """How the recurrences are solved.

    Attributes:
      solver: settings of the iteration, time being the last axis but one; None: step by step, time being the first.
      axis_name: the mesh axis that time is spread over, for the iteration; None: all of it is here.
    """

    solver: FixedPoint | None
    axis_name: str | None = None

    @property
    def axis(self) -> int:
        """Where time is in the states."""
        return 0 if self.solver is None else -2

    def precision(self) -> AbstractContextManager:
        """Of products with the Jacobians: the highest where they are iterated, elsewhere that of all products."""
        return nullcontext() if self.solver is None else jax.default_matmul_precision("highest")


class Jacobians(NamedTuple):
    """J_t of every step: v -> f * v + answer_i * (W_ih (slope * v)) + answer_f * (W_fh (slope * v)).

    Attributes:
      f: what the decay passes on.
      answer: dc_t / dz_t of both gates, where they see c_{t-1}.
      slope: dh_{t-1} / dc_{t-1}, before a projection.
    """

    f: Array
    answer: Array
    slope: Array


def answer(steps: Steps, earlier: Array, gates: Array) -> Array:
    """dc_t / dz_t of both gates."""
    return gates * (1 - gates) * jnp.stack([steps.u, earlier], axis=-2)


def jacobians_of(steps: Steps, earlier: Array, gates: Array, activation: str) -> Jacobians:
    """What the decay passes on, and what the gates make of h_{t-1}."""
    _, slope = jax.jvp(ACTIVATIONS[activation], (earlier,), (jnp.ones_like(earlier),))
    return Jacobians(gates[..., 1, :], seen(steps.z[..., 1:, :], answer(steps, earlier, gates)), slope)


def diagonal(params: Params) -> Array:
    """Of the weights of both gates on g(c_{t-1}): `(2, features)`."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 2:
        return kernel
    if "projection" in params:
        return jnp.einsum("kn,ngk->gk", params["projection"]["kernel"], kernel)
    return jnp.einsum("kgk->gk", kernel)


def clipped(jacobians: Jacobians, weights: Array) -> Array:
    """The diagonals of the Jacobians, in [-1, 1], so that no iterate grows over time; `weights`: their `diagonal`."""
    f, answer, slope = jacobians
    weights = lax.broadcast_to_rank(weights.astype(f.dtype), answer.ndim)
    return jnp.clip(f + slope * jnp.sum(answer * weights, axis=-2), -1, 1)


def jacobian_product(params: Params, jacobians: Jacobians, v: Array) -> Array:
    """J_t v, for one step or for all of them."""
    d_h = jacobians.slope * v
    _, d_z = jax.jvp(lambda h: gates_of_state(params, h, "identity"), (d_h,), (d_h,))
    return jacobians.f * v + jnp.sum(jacobians.answer * d_z.astype(v.dtype), axis=-2)


def _turned(params: Params) -> Params:
    """The weights as products with their transposes want them: turned once, not at every step of a loop."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 3:
        kernel = jnp.moveaxis(kernel, 0, -1).reshape(-1, kernel.shape[0])
    turned = {"gates": {"recurrent_kernel": kernel}}
    return turned | ({"projection": {"kernel": params["projection"]["kernel"].T}} if "projection" in params else {})


def _transposed_product(turned: Params, jacobians: Jacobians, v: Array) -> Array:
    """The transpose of J_t, times v, for one step or for all of them."""
    d_z, kernel = jacobians.answer * v[..., None, :], turned["gates"]["recurrent_kernel"]
    if jacobians.answer.shape[-2:] == kernel.shape:  # diagonal
        d_h = jnp.sum(d_z * lax.broadcast_to_rank(kernel, d_z.ndim), axis=-2)
    else:
        d_h = jnp.dot(d_z.reshape(*v.shape[:-1], -1).astype(kernel.dtype), kernel)
    if "projection" in turned:
        d_h = jnp.dot(d_h, turned["projection"]["kernel"])
    return jacobians.f * v + jacobians.slope * d_h.astype(v.dtype)


def linear_solve(params: Params, jacobians: Jacobians, r: Array, way: Way) -> Array:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    params = jax.tree.map(lambda p: varying_as(p, (r,)), params)  # as they are when they come back as residuals
    zero = jnp.zeros_like(first_step(r, way.axis))

    def matvec(v):
        with way.precision():
            return v - jacobian_product(params, jacobians, before(v, zero, way.axis, axis_name=way.axis_name))

    def solve(_, r, reverse=False):
        if way.solver is None:
            return _walk(params, zero, (jacobians, r), reverse)[1]
        return _iterated(params, jacobians, r, way.solver, way.axis_name, reverse)

    return lax.custom_linear_solve(matvec, r, solve, partial(solve, reverse=True))


def _walk(params: Params, first: Array, rows: tuple[Jacobians, Array], reverse: bool) -> tuple[Array, Array]:
    """v_t = J_t v_{t-1} + r_t; in reverse w_t = J_{t+1}' w_{t+1} + g_t, carrying the product."""
    turned = _turned(params) if reverse else params

    def there(v, step):
        v = jacobian_product(params, step[0], v) + step[1]
        return v, v

    def back(v, step):
        v = v + step[1]
        return _transposed_product(turned, step[0], v), v

    return lax.scan(back if reverse else there, first, rows, reverse=reverse, unroll=unroll())


def _iterated(
    params: Params, jacobians: Jacobians, r: Array, solver: FixedPoint, axis_name: str | None, reverse: bool
) -> Array:
    """The same as a fixed point of v_t <- D_t v_{t-1} + (J_t - D_t) p_{t-1} + r_t, p that of the pass before."""
    zero, turned = jnp.zeros_like(first_step(r, -2)), _turned(params) if reverse else params
    d = clipped(jacobians, diagonal(params)) if solver.splitting == "diagonal" else jacobians.f

    def neighbours(a):  # what each step comes from: in reverse, the later ones
        return before(a, zero, -2, reverse, axis_name)

    def product(v):
        if reverse:
            return neighbours(_transposed_product(turned, jacobians, v))
        return jacobian_product(params, jacobians, neighbours(v))

    d = neighbours(d) if reverse else d

    def apply(v):
        after, others = product(v) + r, neighbours(v)
        v_next = linear_recurrence(
            d, after - d * others, reverse=reverse, solver=solver.recurrence, axis_name=axis_name
        )
        return v_next, relative(after - v, (after, others), FADED, axis_name)

    rtol = 8 * float(jnp.finfo(r.dtype).eps) if solver.adjoint_rtol is None else solver.adjoint_rtol
    with jax.default_matmul_precision("highest"):
        v, record = iterate(
            apply,
            r,
            rtol,
            most=solver.max_iterations,
            average=overshoots(params),
            reverse=reverse,
            axis_name=axis_name,
        )
    return or_walked(
        v, record, partial(_walk, params, reverse=reverse), zero, (jacobians, r), solver, reverse, axis_name
    )


def overshoots(params: Params) -> bool:
    """Whether passes may, and are averaged. Those of diagonal gates are Newton's: few, and they need no averages."""
    return params["gates"]["recurrent_kernel"].ndim == 3


def first_step(array: Array, axis: int) -> Array:
    """What an array has for the first step."""
    return lax.index_in_dim(array, 0, axis, keepdims=False)
