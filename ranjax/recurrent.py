"""The states where the gates read all of h_{t-1}: one step after another, or all at once.

The derivative of the recurrence c_t = F_t(c_{t-1}) is linear: dc_t = J_t dc_{t-1} + r_t, with J_t = f_t + (the gates'
answer to h_{t-1}) and r_t what the weights and the inputs contribute. Everything in r_t is a product over all steps at
once, so only c and the linear system for dc (in reverse mode its transpose) are recurrences, and no loop over steps
accumulates the gradient of a weight. Both are walked through step by step, or iterated over all steps, or over those of
one window after another: see `Way`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes, lax
from jax.ad_checkpoint import checkpoint_name

from ranjax.cell import ACTIVATIONS, Params, gates_of_state, update
from ranjax.fixed_point import FixedPoint, Record, exact, iterate, relative
from ranjax.masks import Steps, filled, seen
from ranjax.mesh import at_the_edge, before, chained, varying_as
from ranjax.scan import linear_recurrence

KEPT = "ranjax.states"  # of a window of time, for the way back
COARSE = 1e-2  # residual below which products must be exact


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


def recurrent_states(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    """The states c_1 ... c_T from the state `c0`, with time first, and what the solver did."""
    used = {"gates": {"recurrent_kernel": params["gates"]["recurrent_kernel"]}}
    if "projection" in params:
        used["projection"] = params["projection"]
    if way.solver is None:
        return _states(used, steps, c0, activation, way)
    window = way.solver.window
    if window is None or window >= len(steps.u) or way.axis_name is not None:
        return _at_once(used, steps, c0, activation, way)
    return _by_windows(used, steps, c0, activation, way, window)


def _at_once(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    z, u = jnp.moveaxis(steps.z, 0, -3), jnp.moveaxis(steps.u, 0, -2)
    c, record = _states(params, Steps(u, z), c0, activation, way)
    return jnp.moveaxis(c, -2, 0), record


def _by_windows(
    params: Params, steps: Steps, c0: Array, activation: str, way: Way, window: int
) -> tuple[Array, Record]:
    """Windows of at most so many steps, one after another from the last state; steps that change nothing fill the last.

    Of a window only the states are kept for the way back, which makes all else anew.
    """
    params, time = _wide(params, c0), len(steps.u)  # the windows' gradients are summed in the dtype of the states
    number = -(-time // window)
    windows = jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), filled(steps, number * -(-time // number)))

    def solve(c, steps):
        states, record = _at_once(params, steps, c, activation, way)
        return states[-1], (states, record)

    kept = jax.checkpoint_policies.save_only_these_names(KEPT)
    c = varying_as(c0, (*steps, *jax.tree.leaves(params)))
    _, (states, records) = lax.scan(jax.checkpoint(solve, policy=kept, prevent_cse=False), c, windows)
    states = states.reshape(-1, *states.shape[2:])[:time]
    return states, Record(jnp.max(records.iterations), jnp.max(records.residual), jnp.all(records.converged))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _states(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    if way.solver is None:
        return walk(params, steps, c0, activation)[1][0], exact(c0.dtype)
    return _iterated(params, steps, c0, activation, way.solver, way.axis_name)


@_states.defjvp
def _states_jvp(activation, way, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    axis, record = way.axis, exact(c0.dtype)
    if way.solver is None:
        states, gates = walk(params, steps, c0, activation)[1]
        earlier = seen(steps.z[..., 1, :], before(states, c0, axis))
    else:
        states, record = _states(params, steps, c0, activation, way)
        states = checkpoint_name(states, KEPT)
        earlier = seen(steps.z[..., 1, :], before(states, c0, axis, axis_name=way.axis_name))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, earlier, activation))
    answer = _answer(steps, earlier, gates)

    # r_t: the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, earlier, activation), (params,), (d_params,))
    r = jnp.sum(answer * (d_steps.z + d_z), axis=-2) + gates[..., 0, :] * d_steps.u

    jacobians = _jacobians(steps, earlier, gates, activation)
    at_first = Jacobians(*(_first(a, axis - (a.ndim - r.ndim) if axis else 0) for a in jacobians))
    begun = at_the_edge(_jacobian_product(params, at_first, d_c0), False, way.axis_name)
    r = r.at[(0,) if axis == 0 else (..., 0, slice(None))].add(begun)
    return (states, record), (_linear_solve(params, jacobians, r, way), jax.tree.map(_no_tangent, record))


def _first(array: Array, axis: int) -> Array:
    return lax.index_in_dim(array, 0, axis, keepdims=False)


def _no_tangent(value: Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, dtypes.float0)


def walk(params: Params, steps: Steps, c0: Array, activation: str) -> tuple[Array, tuple[Array, Array]]:
    """The last state, the states, and the gates that made them, one `jax.lax.scan` step after another."""

    def advance(c, step):
        earlier = seen(step.z[..., 1, :], c)
        recurrent = gates_of_state(params, earlier, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = update(earlier, step.u, gates)
        return after, (after, gates)

    return lax.scan(advance, varying_as(c0, steps), steps)


def make_pass(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None = None
) -> Callable:
    """`apply(c, precision="highest")`: the states of the next pass, and the relative residual of these."""
    diagonal = _diagonal(params)

    def apply(c, precision="highest"):
        earlier = seen(steps.z[..., 1, :], before(c, c0, -2, axis_name=axis_name))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, earlier, activation, precision))
        i, f = gates[..., 0, :], gates[..., 1, :]
        after, d = i * steps.u + f * earlier, f
        if solver.splitting == "diagonal":
            d = _clipped(_jacobians(steps, earlier, gates, activation), diagonal)
        inputs = i * steps.u + (f - d) * earlier
        c_next = linear_recurrence(d, inputs, c0, solver=solver.recurrence, axis_name=axis_name)
        return c_next, relative(after - c, after, axis_name)

    return apply


def _iterated(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None
) -> tuple[Array, Record]:
    """The states as a fixed point."""
    apply = make_pass(params, steps, c0, activation, solver, axis_name)
    rtol = 32 * float(jnp.finfo(c0.dtype).eps) if solver.rtol is None else solver.rtol
    c, record = varying_as(jnp.zeros_like(steps.u), (*steps, c0)), None
    if solver.precision != "highest":
        rough = partial(apply, precision=solver.precision)
        c, record = iterate(rough, c, max(rtol, COARSE), most=solver.max_iterations)
    c, record = iterate(apply, c, rtol, record, most=solver.max_iterations)

    def walked():
        time_first = Steps(jnp.moveaxis(steps.u, -2, 0), jnp.moveaxis(steps.z, -3, 0))
        first = varying_as(c0, steps)
        states, _ = chained(
            partial(walk, _wide(params, c0), time_first, activation=activation), first, False, axis_name
        )
        return jnp.moveaxis(states, 0, -2)

    return _unless(record.converged, walked, c, solver), record


def _unless(converged: Array, walked: Callable[[], Array], found: Array, solver: FixedPoint) -> Array:
    """What was found, or what stands for it where the iteration has failed."""
    if solver.on_failure == "sequential":
        return lax.cond(converged, lambda: found, walked)
    return found if solver.on_failure == "ignore" else jnp.where(converged, found, jnp.nan)


def _recurrent(params: Params, earlier: Array, activation: str, precision: str = "highest") -> Array:
    """What h_{t-1} gives to the gates at all steps, in the dtype of the states."""
    with jax.default_matmul_precision(precision):
        return gates_of_state(_wide(params, earlier), earlier, activation)


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


def _answer(steps: Steps, earlier: Array, gates: Array) -> Array:
    """dc_t / dz_t of both gates."""
    return gates * (1 - gates) * jnp.stack([steps.u, earlier], axis=-2)


def _jacobians(steps: Steps, earlier: Array, gates: Array, activation: str) -> Jacobians:
    """What the decay passes on, and what the gates make of h_{t-1}."""
    _, slope = jax.jvp(ACTIVATIONS[activation], (earlier,), (jnp.ones_like(earlier),))
    return Jacobians(gates[..., 1, :], seen(steps.z[..., 1:, :], _answer(steps, earlier, gates)), slope)


def _diagonal(params: Params) -> Array:
    """Of the weights of both gates on g(c_{t-1}): `(2, features)`."""
    kernel = params["gates"]["recurrent_kernel"]
    if kernel.ndim == 2:
        return kernel
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


def _linear_solve(params: Params, jacobians: Jacobians, r: Array, way: Way) -> Array:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    params = jax.tree.map(lambda p: varying_as(p, (r,)), params)  # as they are when they come back as residuals
    zero = jnp.zeros_like(_first(r, way.axis))

    def matvec(v):
        return v - _jacobian_product(params, jacobians, before(v, zero, way.axis, axis_name=way.axis_name))

    def solve(_, r):
        if way.solver is None:
            return _walk_system(params, jacobians, r, zero)[1]
        return _iterated_system(params, jacobians, r, way.solver, way.axis_name)

    def transpose_solve(_, g):
        if way.solver is None:
            return _walk_transposed(params, jacobians, g, zero)[1]
        return _iterated_transposed(params, jacobians, g, way.solver, way.axis_name)

    return lax.custom_linear_solve(matvec, r, solve, transpose_solve)


def _walk_system(params: Params, jacobians: Jacobians, r: Array, first: Array) -> tuple[Array, Array]:
    def walk(v, step):
        v = _jacobian_product(params, step[0], v) + step[1]
        return v, v

    return lax.scan(walk, first, (jacobians, r))


def _walk_transposed(params: Params, jacobians: Jacobians, g: Array, first: Array) -> tuple[Array, Array]:
    """w_t = J_{t+1}' w_{t+1} + g_t, carrying the product."""
    turned = _transposed(params)

    def walk(v, step):
        v = v + step[1]
        return _transposed_jacobian_product(turned, step[0], v), v

    return lax.scan(walk, first, (jacobians, g), reverse=True)


def _iterated_system(
    params: Params, jacobians: Jacobians, r: Array, solver: FixedPoint, axis_name: str | None
) -> Array:
    """v as a fixed point of v_t <- D_t v_{t-1} + (J_t - D_t) p_{t-1} + r_t, p that of the pass before."""
    zero, wide, d = jnp.zeros_like(r[..., 0, :]), _wide(params, r), _splitting(params, jacobians, solver)

    def apply(v):
        earlier = before(v, zero, -2, axis_name=axis_name)
        after = _jacobian_product(wide, jacobians, earlier) + r
        inputs = after - d * earlier
        v_next = linear_recurrence(d, inputs, solver=solver.recurrence, axis_name=axis_name)
        return v_next, relative(after - v, after, axis_name)

    return _system(apply, _walk_system, params, jacobians, r, solver, False, axis_name)


def _iterated_transposed(
    params: Params, jacobians: Jacobians, g: Array, solver: FixedPoint, axis_name: str | None
) -> Array:
    """The same in reverse: w_t <- D_{t+1} w_{t+1} + (J_{t+1}' - D_{t+1}) p_{t+1} + g_t."""
    zero, turned = jnp.zeros_like(g[..., 0, :]), _transposed(_wide(params, g))

    def later(a):
        return before(a, zero, -2, True, axis_name)

    d = later(_splitting(params, jacobians, solver))

    def apply(w):
        after = later(_transposed_jacobian_product(turned, jacobians, w)) + g
        inputs = after - d * later(w)
        w_next = linear_recurrence(d, inputs, reverse=True, solver=solver.recurrence, axis_name=axis_name)
        return w_next, relative(after - w, after, axis_name)

    return _system(apply, _walk_transposed, params, jacobians, g, solver, True, axis_name)


def _system(
    apply: Callable,
    walk: Callable,
    params: Params,
    jacobians: Jacobians,
    r: Array,
    solver: FixedPoint,
    reverse: bool,
    axis_name: str | None,
) -> Array:
    """What the iteration finds; `walk` is what stands for it, over arrays with time first."""
    rtol = 8 * float(jnp.finfo(r.dtype).eps) if solver.adjoint_rtol is None else solver.adjoint_rtol
    with jax.default_matmul_precision("highest"):
        v, record = iterate(apply, r, rtol, most=solver.max_iterations)

    def walked():
        f, slope, rows = (jnp.moveaxis(a, -2, 0) for a in (jacobians.f, jacobians.slope, r))
        time_first = Jacobians(f, jnp.moveaxis(jacobians.answer, -3, 0), slope)
        found = chained(partial(walk, _wide(params, r), time_first, rows), jnp.zeros_like(rows[0]), reverse, axis_name)
        return jnp.moveaxis(found, 0, -2)

    return _unless(record.converged, walked, v, solver)


def _splitting(params: Params, jacobians: Jacobians, solver: FixedPoint) -> Array:
    return _clipped(jacobians, _diagonal(params)) if solver.splitting == "diagonal" else jacobians.f


def _wide(params: Params, like: Array) -> Params:
    return jax.tree.map(lambda p: p.astype(like.dtype), params)
