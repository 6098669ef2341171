"""The states where the gates read all of h_{t-1}: one step after another, or all at once.

The derivative of the recurrence c_t = F_t(c_{t-1}) is linear: dc_t = J_t dc_{t-1} + r_t, with J_t = f_t + (the gates'
answer to h_{t-1}) and r_t what the weights and the inputs contribute. Everything in r_t is a product over all steps at
once, so only c and the linear system for dc (in reverse mode its transpose) are recurrences, and no loop accumulates
the gradient of a weight. Both are walked through step by step (`solver` None; time is the first axis), or iterated
over all steps (`FixedPoint`; time is the last axis but one).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes, lax

from ranjax.cell import ACTIVATIONS, Params, gates_of_state, update
from ranjax.fixed_point import FixedPoint, Record, exact, iterate, relative
from ranjax.masks import Steps, seen
from ranjax.scan import linear_recurrence

COARSE = 1e-2  # residual below which products must be exact


def recurrent_states(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint | None
) -> tuple[Array, Record]:
    """The states c_1 ... c_T from the state `c0`, with time first, and what the solver did."""
    used = {"gates": {"recurrent_kernel": params["gates"]["recurrent_kernel"]}}
    if "projection" in params:
        used["projection"] = params["projection"]
    if solver is None:
        return _states(used, steps, c0, activation, None)
    z, u = jnp.moveaxis(steps.z, 0, -3), jnp.moveaxis(steps.u, 0, -2)
    c, record = _states(used, Steps(u, z), c0, activation, solver)
    return jnp.moveaxis(c, -2, 0), record


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _states(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint | None
) -> tuple[Array, Record]:
    if solver is None:
        return _walk(params, steps, c0, activation)[0], exact(c0.dtype)
    return _iterated(params, steps, c0, activation, solver)


@_states.defjvp
def _states_jvp(activation, solver, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    axis, record = _axis(solver), exact(c0.dtype)
    if solver is None:
        states, gates = _walk(params, steps, c0, activation)
        before = seen(steps.z[..., 1, :], _shifted(states, c0, axis))
    else:
        states, record = _states(params, steps, c0, activation, solver)
        before = seen(steps.z[..., 1, :], _shifted(states, c0, axis))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, before, activation))
    answer = _answer(steps, before, gates)

    # r_t: the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, before, activation), (params,), (d_params,))
    r = jnp.sum(answer * (d_steps.z + d_z), axis=-2) + gates[..., 0, :] * d_steps.u

    jacobians = _jacobians(steps, before, gates, activation)
    at_first = Jacobians(*(_first(a, axis - (a.ndim - r.ndim) if axis else 0) for a in jacobians))
    r = r.at[(0,) if axis == 0 else (..., 0, slice(None))].add(_jacobian_product(params, at_first, d_c0))
    return (states, record), (_linear_solve(params, jacobians, r, solver), jax.tree.map(_no_tangent, record))


def _axis(solver: FixedPoint | None) -> int:
    """Where time is in the states."""
    return 0 if solver is None else -2


def _first(array: Array, axis: int) -> Array:
    return lax.index_in_dim(array, 0, axis, keepdims=False)


def _no_tangent(value: Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, dtypes.float0)


def _shifted(states: Array, initial: Array, axis: int, reverse: bool = False) -> Array:
    """The state that each step starts from; in reverse that of the step after."""
    initial = jnp.expand_dims(initial, axis)
    size = states.shape[axis]
    if reverse:
        return jnp.concatenate([lax.slice_in_dim(states, 1, size, axis=axis), initial], axis)
    return jnp.concatenate([initial, lax.slice_in_dim(states, 0, size - 1, axis=axis)], axis)


def _walk(params: Params, steps: Steps, c0: Array, activation: str) -> tuple[Array, Array]:
    """The states, and the gates that made them, one `jax.lax.scan` step after another."""

    def walk(c, step):
        before = seen(step.z[..., 1, :], c)
        recurrent = gates_of_state(params, before, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = update(before, step.u, gates)
        return after, (after, gates)

    return lax.scan(walk, c0, steps)[1]


def make_pass(params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint) -> Callable:
    """`apply(c, precision="highest")`: the states of the next pass, and the relative residual of these."""
    diagonal = _diagonal(params)

    def apply(c, precision="highest"):
        before = seen(steps.z[..., 1, :], _shifted(c, c0, -2))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, before, activation, precision))
        i, f = gates[..., 0, :], gates[..., 1, :]
        after, d = i * steps.u + f * before, f
        if solver.splitting == "diagonal":
            d = _clipped(_jacobians(steps, before, gates, activation), diagonal)
        inputs = i * steps.u + (f - d) * before
        return linear_recurrence(d, inputs, c0, solver=solver.recurrence), relative(after - c, after)

    return apply


def _iterated(params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint) -> tuple[Array, Record]:
    """The states as a fixed point."""
    apply = make_pass(params, steps, c0, activation, solver)
    rtol = 32 * float(jnp.finfo(c0.dtype).eps) if solver.rtol is None else solver.rtol
    c, record = jnp.zeros_like(steps.u), None
    if solver.precision != "highest":
        rough = partial(apply, precision=solver.precision)
        c, record = iterate(rough, c, max(rtol, COARSE), most=solver.max_iterations)
    c, record = iterate(apply, c, rtol, record, most=solver.max_iterations)

    def walked():
        time_first = Steps(jnp.moveaxis(steps.u, -2, 0), jnp.moveaxis(steps.z, -3, 0))
        return jnp.moveaxis(_walk(_wide(params, c0), time_first, c0, activation)[0], 0, -2)

    return _unless(record.converged, walked, c, solver), record


def _unless(converged: Array, walked: Callable[[], Array], found: Array, solver: FixedPoint) -> Array:
    """What was found, or what stands for it where the iteration has failed."""
    if solver.on_failure == "sequential":
        return lax.cond(converged, lambda: found, walked)
    return found if solver.on_failure == "ignore" else jnp.where(converged, found, jnp.nan)


def _recurrent(params: Params, before: Array, activation: str, precision: str = "highest") -> Array:
    """What h_{t-1} gives to the gates at all steps, in the dtype of the states."""
    with jax.default_matmul_precision(precision):
        return gates_of_state(_wide(params, before), before, activation)


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


def _answer(steps: Steps, before: Array, gates: Array) -> Array:
    """dc_t / dz_t of both gates."""
    return gates * (1 - gates) * jnp.stack([steps.u, before], axis=-2)


def _jacobians(steps: Steps, before: Array, gates: Array, activation: str) -> Jacobians:
    """What the decay passes on, and what the gates make of h_{t-1}."""
    _, slope = jax.jvp(ACTIVATIONS[activation], (before,), (jnp.ones_like(before),))
    return Jacobians(gates[..., 1, :], seen(steps.z[..., 1:, :], _answer(steps, before, gates)), slope)


def _diagonal(params: Params) -> Array:
    """Of the weights of both gates on g(c_{t-1}): `(2, features)`."""
    kernel = params["gates"]["recurrent_kernel"]
    if "projection" in params:
        return jnp.einsum("kn,ngk->gk", params["projection"]["kernel"], kernel)
    return jnp.einsum("kgk->gk", kernel)


def _clipped(at: Jacobians, diagonal: Array) -> Array:
    """The diagonals of the Jacobians, in [-1, 1], so that no iterate grows over time."""
    return jnp.clip(at.f + at.slope * jnp.sum(at.answer * diagonal.astype(at.f.dtype), axis=-2), -1, 1)


def _jacobian_product(params: Params, at: Jacobians, v: Array) -> Array:
    """J_t v, for one step or for all of them."""
    d_h = at.slope * v
    _, d_z = jax.jvp(lambda h: gates_of_state(params, h, "identity"), (d_h,), (d_h,))
    return at.f * v + jnp.sum(at.answer * d_z.astype(v.dtype), axis=-2)


def _transposed(params: Params) -> Params:
    """The weights as products with their transposes want them: turned once, not at every step of a loop."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 3:
        kernel = jnp.moveaxis(kernel, 0, -1).reshape(-1, kernel.shape[0])
    turned = {"gates": {"recurrent_kernel": kernel}}
    return turned | ({"projection": {"kernel": params["projection"]["kernel"].T}} if "projection" in params else {})


def _transposed_jacobian_product(turned: Params, at: Jacobians, v: Array) -> Array:
    """The transpose of J_t, times v, for one step or for all of them."""
    d_z, kernel = at.answer * v[..., None, :], turned["gates"]["recurrent_kernel"]
    if at.answer.shape[-2:] == kernel.shape:  # diagonal
        d_h = jnp.sum(d_z * kernel, axis=-2)
    else:
        d_h = jnp.dot(d_z.reshape(*v.shape[:-1], -1).astype(kernel.dtype), kernel)
    if "projection" in turned:
        d_h = jnp.dot(d_h, turned["projection"]["kernel"])
    return at.f * v + at.slope * d_h.astype(v.dtype)


def _linear_solve(params: Params, jacobians: Jacobians, r: Array, solver: FixedPoint | None) -> Array:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    axis = _axis(solver)
    zero = jnp.zeros_like(_first(r, axis))

    def matvec(v):
        return v - _jacobian_product(params, jacobians, _shifted(v, zero, axis))

    def solve(_, r):
        return _walk_system(params, jacobians, r) if solver is None else _iterated_system(params, jacobians, r, solver)

    def transpose_solve(_, g):
        if solver is None:
            return _walk_transposed(params, jacobians, g)
        return _iterated_transposed(params, jacobians, g, solver)

    return lax.custom_linear_solve(matvec, r, solve, transpose_solve)


def _walk_system(params: Params, jacobians: Jacobians, r: Array) -> Array:
    def walk(v, step):
        v = _jacobian_product(params, step[0], v) + step[1]
        return v, v

    return lax.scan(walk, jnp.zeros_like(r[0]), (jacobians, r))[1]


def _walk_transposed(params: Params, jacobians: Jacobians, g: Array) -> Array:
    """w_t = J_{t+1}' w_{t+1} + g_t."""
    turned = _transposed(params)

    def walk(v, step):
        v = v + step[1]
        return _transposed_jacobian_product(turned, step[0], v), v

    return lax.scan(walk, jnp.zeros_like(g[0]), (jacobians, g), reverse=True)[1]


def _iterated_system(params: Params, jacobians: Jacobians, r: Array, solver: FixedPoint) -> Array:
    """v as a fixed point of v_t <- D_t v_{t-1} + (J_t - D_t) p_{t-1} + r_t, p that of the pass before."""
    zero, wide, d = jnp.zeros_like(r[..., 0, :]), _wide(params, r), _splitting(params, jacobians, solver)

    def apply(v):
        before = _shifted(v, zero, -2)
        after = _jacobian_product(wide, jacobians, before) + r
        return linear_recurrence(d, after - d * before, solver=solver.recurrence), relative(after - v, after)

    return _system(apply, _walk_system, params, jacobians, r, solver)


def _iterated_transposed(params: Params, jacobians: Jacobians, g: Array, solver: FixedPoint) -> Array:
    """The same in reverse: w_t <- D_{t+1} w_{t+1} + (J_{t+1}' - D_{t+1}) p_{t+1} + g_t."""
    zero, turned = jnp.zeros_like(g[..., 0, :]), _transposed(_wide(params, g))
    d = _shifted(_splitting(params, jacobians, solver), zero, -2, reverse=True)

    def apply(w):
        product = _transposed_jacobian_product(turned, jacobians, w)
        before = _shifted(product, zero, -2, reverse=True) + g
        inputs = before - d * _shifted(w, zero, -2, reverse=True)
        return linear_recurrence(d, inputs, reverse=True, solver=solver.recurrence), relative(before - w, before)

    return _system(apply, _walk_transposed, params, jacobians, g, solver)


def _system(
    apply: Callable, walk: Callable, params: Params, jacobians: Jacobians, r: Array, solver: FixedPoint
) -> Array:
    """What the iteration finds; `walk` is what stands for it, over arrays with time first."""
    rtol = 8 * float(jnp.finfo(r.dtype).eps) if solver.adjoint_rtol is None else solver.adjoint_rtol
    with jax.default_matmul_precision("highest"):
        v, record = iterate(apply, r, rtol, most=solver.max_iterations)

    def walked():
        f, slope, rows = (jnp.moveaxis(a, -2, 0) for a in (jacobians.f, jacobians.slope, r))
        time_first = Jacobians(f, jnp.moveaxis(jacobians.answer, -3, 0), slope)
        return jnp.moveaxis(walk(_wide(params, r), time_first, rows), 0, -2)

    return _unless(record.converged, walked, v, solver)


def _splitting(params: Params, jacobians: Jacobians, solver: FixedPoint) -> Array:
    return _clipped(jacobians, _diagonal(params)) if solver.splitting == "diagonal" else jacobians.f


def _wide(params: Params, like: Array) -> Params:
    return jax.tree.map(lambda p: p.astype(like.dtype), params)
