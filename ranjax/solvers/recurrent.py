"""The states where the gates read all of h_{t-1}: one step after another, or all at once.

The derivative of the recurrence c_t = F_t(c_{t-1}) is linear: dc_t = J_t dc_{t-1} + r_t, with J_t = f_t + (the gates'
answer to h_{t-1}) and r_t what the weights and the inputs contribute. Everything in r_t is a product over all steps at
once, so only c and the linear system for dc (in reverse mode its transpose) are recurrences, and no loop over steps
accumulates the gradient of a weight. Both are walked through step by step, or iterated over all steps, or over those of
one window after another: see `jacobian.Way`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ranjax.cell import Params, gates_of_state, update
from ranjax.solvers.fixed_point import FixedPoint, Record, exact, iterate, or_walked, relative
from ranjax.solvers.adjoint import (
    Way,
    answer,
    clipped,
    diagonal,
    first_step,
    jacobian_product,
    jacobians_of,
    linear_solve,
    overshoots,
)
from ranjax.solvers.masks import Steps, filled, seen
from ranjax.sharding import at_the_edge, before, varying_as
from ranjax.scan import linear_recurrence, unroll

KEPT = "ranjax.states"  # of a window of time, for the backward pass
COARSE = 1e-2  # residual below which products must be exact


def recurrent_states(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    """The states c_1 ... c_T from the state `c0`, with time first, and what the solver did."""
    used = {"gates": {"recurrent_kernel": params["gates"]["recurrent_kernel"]}}
    if "projection" in params:
        used["projection"] = params["projection"]
    if way.solver is None:
        return _solved(used, steps, c0, activation, way)
    used = jax.tree.map(lambda p: p.astype(c0.dtype), used)  # products and sums of gradients are in that of the states
    window, time = way.solver.window, steps.u.shape[0]
    known = isinstance(time, int)  # not where it is symbolic, as in `jax.export`
    if window is None or not known or window >= time or way.axis_name is not None:
        return _at_once(used, steps, c0, activation, way)
    return _by_windows(used, steps, c0, activation, way, window)


def _at_once(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    z, u = jnp.moveaxis(steps.z, 0, -3), jnp.moveaxis(steps.u, 0, -2)
    c, record = _solved(params, Steps(u, z), c0, activation, way)
    return jnp.moveaxis(c, -2, 0), record


def _by_windows(
    params: Params, steps: Steps, c0: Array, activation: str, way: Way, window: int
) -> tuple[Array, Record]:
    """Windows of at most so many steps, one after another from the last state; steps that change nothing fill the last.

    Of a window only the states are kept for the backward pass, which makes all else anew.
    """
    time, number = len(steps.u), -(-len(steps.u) // window)
    windows = jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), filled(steps, number * -(-time // number)))

    def solve(c, steps):
        states, record = _at_once(params, steps, c, activation, way)
        return states[-1], (states, record)

    kept = jax.checkpoint_policies.save_only_these_names(KEPT)
    c = varying_as(c0, (*steps, *jax.tree.leaves(params)))
    _, (states, records) = lax.scan(jax.checkpoint(solve, policy=kept, prevent_cse=False), c, windows)
    states = states.reshape(-1, *states.shape[2:])[:time]
    return states, Record(jnp.max(records.iterations), jnp.max(records.residual), jnp.all(records.converged))


def _solved(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    states, told = _states(params, steps, c0, activation, way)
    return states, Record(told.iterations.astype(jnp.int32), told.residual, told.converged > 0)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _states(params: Params, steps: Steps, c0: Array, activation: str, way: Way) -> tuple[Array, Record]:
    """The states, and the record in their dtype: integers on a mesh have no tangent that a rule could return."""
    if way.solver is None:
        states, record = walk_through(params, steps, c0, activation)[1][0], exact(c0.dtype)
    else:
        states, record = _iterated(params, steps, c0, activation, way.solver, way.axis_name)
    return states, jax.tree.map(lambda a: a.astype(c0.dtype), record)


@_states.defjvp
def _states_jvp(activation, way, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    axis, record = way.axis, exact(c0.dtype)
    if way.solver is None:
        states, gates = walk_through(params, steps, c0, activation)[1]
        earlier = seen(steps.z[..., 1, :], before(states, c0, axis))
    else:
        states, record = _states(params, steps, c0, activation, way)
        states = checkpoint_name(states, KEPT)
        earlier = seen(steps.z[..., 1, :], before(states, c0, axis, axis_name=way.axis_name))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, earlier, activation))

    # r_t: the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, earlier, activation), (params,), (d_params,))
    d_z = d_steps.z + d_z.astype(c0.dtype)
    r = jnp.sum(answer(steps, earlier, gates) * d_z, axis=-2) + gates[..., 0, :] * d_steps.u

    jacobians = jacobians_of(steps, earlier, gates, activation)
    first = jax.tree.map(lambda a: first_step(a, axis % r.ndim), jacobians)
    with way.precision():
        begun = at_the_edge(jacobian_product(params, first, d_c0), False, way.axis_name)
    r = r.at[(0,) if axis == 0 else (..., 0, slice(None))].add(begun)
    record = jax.tree.map(lambda a: a.astype(c0.dtype), record)
    still = jax.tree.map(lambda a: varying_as(jnp.zeros_like(a), (a,)), record)
    return (states, record), (linear_solve(params, jacobians, r, way), still)


def walk_through(params: Params, steps: Steps, c0: Array, activation: str) -> tuple[Array, tuple[Array, Array]]:
    """The last state, the states, and the gates that made them, one `jax.lax.scan` step after another."""

    def advance(c, step):
        earlier = seen(step.z[..., 1, :], c)
        recurrent = gates_of_state(params, earlier, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = update(earlier, step.u, gates)
        return after, (after, gates)

    return lax.scan(advance, varying_as(c0, steps), steps, unroll=unroll())


def make_pass(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None = None
) -> Callable:
    """`apply(c, precision="highest")`: the states of the next pass, and the relative residual of these."""
    weights = diagonal(params)

    def apply(c, precision="highest"):
        earlier = seen(steps.z[..., 1, :], before(c, c0, -2, axis_name=axis_name))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, earlier, activation, precision))
        i, f = gates[..., 0, :], gates[..., 1, :]
        after, d = i * steps.u + f * earlier, f
        if solver.splitting == "diagonal":
            d = clipped(jacobians_of(steps, earlier, gates, activation), weights)
        inputs = i * steps.u + (f - d) * earlier
        c_next = linear_recurrence(d, inputs, c0, solver=solver.recurrence, axis_name=axis_name)
        return c_next, relative(after - c, (after, earlier), axis_name=axis_name)

    return apply


def _iterated(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None
) -> tuple[Array, Record]:
    """The states as a fixed point."""
    apply = make_pass(params, steps, c0, activation, solver, axis_name)
    rtol = 32 * float(jnp.finfo(c0.dtype).eps) if solver.rtol is None else solver.rtol
    on = partial(iterate, most=solver.max_iterations, average=overshoots(params), axis_name=axis_name)
    c, record = varying_as(jnp.zeros_like(steps.u), (*steps, c0)), None
    if solver.precision != "highest":
        c, record = on(partial(apply, precision=solver.precision), c, max(rtol, COARSE))
    c, record = on(apply, c, rtol, record)

    def states(c0, steps):
        last, (states, _) = walk_through(params, steps, c0, activation)
        return last, states

    return or_walked(c, record, states, varying_as(c0, steps), steps, solver, axis_name=axis_name), record


def _recurrent(params: Params, earlier: Array, activation: str, precision: str = "highest") -> Array:
    """What h_{t-1} gives to the gates at all steps, in the dtype of the states."""
    with jax.default_matmul_precision(precision):
        return gates_of_state(params, earlier, activation)
