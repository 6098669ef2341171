"""The states where the gates read all of h_{t-1}: by the sequential scan, or by an iteration over all steps at once.

The derivative of the recurrence c_t = F_t(c_{t-1}) is linear: dc_t = J_t dc_{t-1} + r_t. J_t is f_t plus the gates'
derivative with regard to c_{t-1}; r_t is the contribution of the weights and the inputs. All of r_t is one product over
all steps, so only c and the linear system of dc (in reverse mode, its transpose) are recurrences, and no loop over the
steps accumulates the gradient of a weight.

Both recurrences are solved by the same `Method`. Time is the first axis of the steps and the states; only inside the
iteration, which solves all steps of a chunk at once, it is the last but one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ranjax.cell import Params, gates_of_state, update
from ranjax.scan import linear_recurrence, unroll
from ranjax.sharding import at_boundary, before, varying_as
from ranjax.solvers.adjoint import (
    Jacobians,
    Method,
    answer,
    clipped,
    diagonal,
    first_step,
    jacobian_product,
    jacobians_of,
    linear_solve,
    overshoots,
    solve_system,
    transposed,
    transposed_product,
)
from ranjax.solvers.fixed_point import FixedPoint, iterate, or_sequential, relative
from ranjax.solvers.masks import Steps, filled, seen
from ranjax.solvers.result import Result, exact, worst

KEPT = "ranjax.states"  # the values of a chunk that are stored for the backward pass


def recurrent_states(params: Params, steps: Steps, c0: Array, activation: str, method: Method) -> tuple[Array, Result]:
    """The states c_1 ... c_T from the state `c0`, time first, and how they were solved.

    Chunks run one after another, each from the last state of the one before. All have one length: the last one is
    filled with steps that keep the state. Only the states of a chunk are stored for the backward pass, which recomputes
    the rest.
    """
    params, number = _weights_on_h(params, c0, method), _chunk_count(steps, method)
    if number == 1:
        return _states_at_once(params, steps, c0, activation, method)

    def solve(c, steps):
        states, result = _states_at_once(params, steps, c, activation, method)
        return states[-1], (states, result)

    stored = jax.checkpoint_policies.save_only_these_names(KEPT)
    c = varying_as(c0, (*steps, *jax.tree.leaves(params)))
    chunks = _split(filled(steps, _filled_length(steps, number)), number)
    _, (states, results) = lax.scan(jax.checkpoint(solve, policy=stored, prevent_cse=False), c, chunks)
    return _joined_chunks(states, len(steps.u)), worst(results)


def recurrent_adjoint(
    params: Params, steps: Steps, c0: Array, cotangents: Array, activation: str, method: Method
) -> tuple[Array, Result]:
    """The solution of the gradient's system for `cotangents` of the states, time first, and how it was solved.

    Chunks run in reverse: the cotangent of the state that a chunk starts from is added to that of the chunk before.
    """
    states, _ = recurrent_states(params, steps, c0, activation, method)
    params, number = _weights_on_h(params, c0, method), _chunk_count(steps, method)
    if number == 1:
        v, result, _ = _adjoint_at_once(params, steps, states, c0, cotangents, activation, method)
        return v, result

    def solve(carry, chunk):
        steps, states, c, cotangents = chunk
        cotangents = cotangents.at[-1].add(carry)
        v, result, carry = _adjoint_at_once(params, steps, states, c, cotangents, activation, method)
        return carry, (v, result)

    length = _filled_length(steps, number)
    fill = [(0, length - len(steps.u)), *((0, 0),) * c0.ndim]
    arrays = filled(steps, length), jnp.pad(states, fill), jnp.pad(cotangents, fill)
    chunks, states, cotangents = _split(arrays, number)
    starts = jnp.concatenate([c0[None], states[:-1, -1]])
    carry = varying_as(jnp.zeros_like(c0), (c0, cotangents, *steps, *jax.tree.leaves(params)))
    _, (v, results) = lax.scan(solve, carry, (chunks, states, starts, cotangents), reverse=True)
    return _joined_chunks(v, len(steps.u)), worst(results)


def _weights_on_h(params: Params, c0: Array, method: Method) -> Params:
    """The parameters that the gates read the state with; for the iteration in the dtype of the states.

    Products, and sums of gradients over chunks, are then in that dtype too.
    """
    weights = {"gates": {"recurrent_kernel": params["gates"]["recurrent_kernel"]}}
    if "projection" in params:
        weights["projection"] = params["projection"]
    return weights if method.solver is None else jax.tree.map(lambda p: p.astype(c0.dtype), weights)


def _chunk_count(steps: Steps, method: Method) -> int:
    """The number of chunks of a sequence; 1 where time is symbolic (`jax.export`) or spread over a mesh."""
    time, chunk = steps.u.shape[0], None if method.solver is None else method.solver.chunk
    if chunk is None or not isinstance(time, int) or method.axis_name is not None:
        return 1
    return -(-time // chunk)


def _filled_length(steps: Steps, number: int) -> int:
    """The number of steps in `number` chunks of one length."""
    return number * -(-len(steps.u) // number)


def _split(arrays: Any, number: int) -> Any:
    """Arrays with time first as `number` chunks, stacked on a new first axis."""
    return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), arrays)


def _joined_chunks(chunks: Array, time: int) -> Array:
    """The first `time` steps of the chunks, time first."""
    return chunks.reshape(-1, *chunks.shape[2:])[:time]


def _with_time_on(axis: int, steps: Steps, *states: Array) -> tuple[Steps, *tuple[Array, ...]]:
    """Steps and states with time moved from the first axis to `axis`, 0 or -2 of the states."""
    if axis == 0:
        return steps, *states
    z, u = jnp.moveaxis(steps.z, 0, -3), jnp.moveaxis(steps.u, 0, -2)
    return Steps(u, z), *(jnp.moveaxis(a, 0, -2) for a in states)


def _states_at_once(params: Params, steps: Steps, c0: Array, activation: str, method: Method) -> tuple[Array, Result]:
    """The states of all steps, time first, and how they were solved."""
    (steps,) = _with_time_on(method.axis, steps)
    states, result = _differentiable_states(params, steps, c0, activation, method)
    result = Result(result.status.astype(jnp.int32), result.iterations.astype(jnp.int32), result.residual)
    return jnp.moveaxis(states, method.axis, 0), result


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _differentiable_states(
    params: Params, steps: Steps, c0: Array, activation: str, method: Method
) -> tuple[Array, Result]:
    """The states, and the result in their dtype: integers on a mesh have no tangent that a rule could return."""
    if method.solver is None:
        states, result = sequential_scan(params, steps, c0, activation)[1][0], exact(c0.dtype)
    else:
        states, result = _iterate_or_scan(params, steps, c0, activation, method.solver, method.axis_name)
    return states, jax.tree.map(lambda a: a.astype(c0.dtype), result)


@_differentiable_states.defjvp
def _differentiable_states_jvp(activation, method, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    axis, result = method.axis, exact(c0.dtype)
    if method.solver is None:
        states, gates = sequential_scan(params, steps, c0, activation)[1]
        earlier = seen(steps.z[..., 1, :], before(states, c0, axis))
    else:
        states, result = _differentiable_states(params, steps, c0, activation, method)
        states = checkpoint_name(states, KEPT)
        earlier, gates = _earlier_and_gates(params, steps, states, c0, activation, method)

    # r_t: the contribution of the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, earlier, activation), (params,), (d_params,))
    d_z = d_steps.z + d_z.astype(c0.dtype)
    r = jnp.sum(answer(steps, earlier, gates) * d_z, axis=-2) + gates[..., 0, :] * d_steps.u

    jacobians = jacobians_of(steps, earlier, gates, activation)
    with method.precision():
        of_c0 = jacobian_product(params, _first_of(jacobians, axis % r.ndim), d_c0)
    of_c0 = at_boundary(of_c0, False, method.axis_name)
    r = r.at[(0,) if axis == 0 else (..., 0, slice(None))].add(of_c0)
    result = jax.tree.map(lambda a: a.astype(c0.dtype), result)
    zeros = jax.tree.map(lambda a: varying_as(jnp.zeros_like(a), (a,)), result)
    return (states, result), (linear_solve(params, jacobians, r, method), zeros)


def _adjoint_at_once(
    params: Params, steps: Steps, states: Array, c0: Array, cotangents: Array, activation: str, method: Method
) -> tuple[Array, Result, Array]:
    """The solution of the gradient's system, time first, how it was solved, and the cotangent of `c0`."""
    steps, states, cotangents = _with_time_on(method.axis, steps, states, cotangents)
    earlier, gates = _earlier_and_gates(params, steps, states, c0, activation, method)
    jacobians = jacobians_of(steps, earlier, gates, activation)
    v, result = solve_system(params, jacobians, cotangents, method, reverse=True)
    axis = method.axis % v.ndim
    with method.precision():
        of_c0 = transposed_product(transposed(params), _first_of(jacobians, axis), first_step(v, axis))
    return jnp.moveaxis(v, axis, 0), result, of_c0


def _earlier_and_gates(
    params: Params, steps: Steps, states: Array, c0: Array, activation: str, method: Method
) -> tuple[Array, Array]:
    """The states that the steps start from, and the gates, recomputed from the states."""
    earlier = seen(steps.z[..., 1, :], before(states, c0, method.axis, axis_name=method.axis_name))
    with method.precision():
        recurrent = gates_of_state(params, earlier, activation)
    return earlier, jax.nn.sigmoid(steps.z + recurrent.astype(states.dtype))


def _first_of(jacobians: Jacobians, axis: int) -> Jacobians:
    """The Jacobian of the first step; `axis` is that of time, counted from the front."""
    return jax.tree.map(lambda a: first_step(a, axis), jacobians)


def sequential_scan(params: Params, steps: Steps, c0: Array, activation: str) -> tuple[Array, tuple[Array, Array]]:
    """The last state, and the states and the gates of all steps, by `jax.lax.scan`; time is the first axis."""

    def advance(c, step):
        earlier = seen(step.z[..., 1, :], c)
        recurrent = gates_of_state(params, earlier, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = update(earlier, step.u, gates)
        return after, (after, gates)

    return lax.scan(advance, varying_as(c0, steps), steps, unroll=unroll())


def make_iteration(
    params: Params,
    steps: Steps,
    c0: Array,
    activation: str,
    solver: FixedPoint,
    axis_name: str | None = None,
    *,
    approximate: Callable[[Jacobians, Array], Array] = clipped,
) -> Callable[[Array], tuple[Array, Array]]:
    """One iteration as a function of the states: `apply(c)` is the next states, and the relative residual of `c`.

    Args:
      params: the parameters that the gates read the state with.
      steps: the steps, `(*batch, time, ...)`.
      c0: the state before the first step.
      activation: `"tanh"` or `"identity"`.
      solver: the settings; of these, the solver of the linear recurrences.
      axis_name: the mesh axis that time is spread over.
      approximate: the diagonal D that stands for the Jacobians, from the Jacobians and `diagonal(params)`.
    """
    weights = diagonal(params)

    def apply(c):
        earlier = seen(steps.z[..., 1, :], before(c, c0, -2, axis_name=axis_name))
        gates = jax.nn.sigmoid(steps.z + _recurrent(params, earlier, activation))
        i, f = gates[..., 0, :], gates[..., 1, :]
        after = i * steps.u + f * earlier
        d = approximate(jacobians_of(steps, earlier, gates, activation), weights)
        inputs = i * steps.u + (f - d) * earlier
        c_next = linear_recurrence(d, inputs, c0, solver=solver.recurrence, axis_name=axis_name)
        return c_next, relative(after - c, (after, earlier), axis_name=axis_name)

    return apply


def iterate_states(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None = None
) -> tuple[Array, Result]:
    """The states as a fixed point, `(*batch, time, features)`: the last iterate, converged or not, and its `Result`."""
    apply = make_iteration(params, steps, c0, activation, solver, axis_name)
    rtol = 32 * float(jnp.finfo(c0.dtype).eps) if solver.rtol is None else solver.rtol
    zeros = varying_as(jnp.zeros_like(steps.u), (*steps, c0))
    options: dict = {"average": overshoots(params), "axis_name": axis_name}
    return iterate(apply, zeros, rtol, most=solver.max_iterations, **options)


def _iterate_or_scan(
    params: Params, steps: Steps, c0: Array, activation: str, solver: FixedPoint, axis_name: str | None
) -> tuple[Array, Result]:
    """The states by the iteration; if it fails, what `solver.on_failure` says."""
    c, result = iterate_states(params, steps, c0, activation, solver, axis_name)

    def scan(c0, steps):
        last, (states, _) = sequential_scan(params, steps, c0, activation)
        return last, states

    return or_sequential(c, result, scan, varying_as(c0, steps), steps, solver, axis_name=axis_name), result


def _recurrent(params: Params, earlier: Array, activation: str) -> Array:
    """The gates' products with h_{t-1} at all steps, at the highest precision."""
    with jax.default_matmul_precision("highest"):
        return gates_of_state(params, earlier, activation)
