"""The states of a whole sequence, from what its inputs contribute to each step.

Where the gates see the input only, the states are one linear recurrence. Where they read h_{t-1}, the recurrence
c_t = F_t(c_{t-1}) is not linear; its derivative is: dc_t = J_t dc_{t-1} + r_t, with J_t = f_t + (the gates' answer to
h_{t-1}) and r_t what the weights and the inputs contribute. Everything in r_t is a product over all steps at once, so
only c and the linear system for dc (in reverse mode its transpose) are walked through step by step, and no loop
accumulates the gradient of a weight. Time is the first axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from ranjax.cell import Params, gates_of_state, update
from ranjax.scan import linear_recurrence

States = Float[Array, "time *batch features"]
Gates = Float[Array, "time *batch 2 features"]
State = Float[Array, "*batch features"]
Mask = Bool[Array, "time *batch"]


class Steps(NamedTuple):
    """What each step is given, all of it known before the walk.

    Attributes:
      u: content W_c x, in the dtype of the state.
      z: the inputs' part of both gates' pre-activations, in the dtype of the state.
      starts: where a segment starts: c_{t-1} is 0 to the gates and to the decay. None: nowhere.
      padding: where the state passes unchanged. None: nowhere.
    """

    u: States
    z: Gates
    starts: Mask | None = None
    padding: Mask | None = None


def states(params: Params, steps: Steps, c0: State, *, activation: str, solver: str) -> States:
    """The states c_1 ... c_T from the state `c0`: one linear recurrence where the gates are known beforehand."""
    if len(steps.u) == 0:
        return steps.u
    if "recurrent_kernel" not in params["gates"]:
        return _linear_states(steps, c0, solver)
    weights = {"gates": {"recurrent_kernel": params["gates"]["recurrent_kernel"]}}
    if "projection" in params:
        weights["projection"] = params["projection"]
    return _sequential_states(weights, steps, c0, activation)


def _linear_states(steps: Steps, c0: State, solver: str) -> States:
    """The states where the gates see the input only."""
    i, f = jnp.moveaxis(jax.nn.sigmoid(steps.z), -2, 0)
    decay = _where(steps.padding, 1.0, _where(steps.starts, 0.0, f))
    inputs = _where(steps.padding, 0.0, i * steps.u)
    decay, inputs = (jnp.moveaxis(a, 0, -2) for a in (decay, inputs))
    return jnp.moveaxis(linear_recurrence(decay, inputs, c0, solver=solver), -2, 0)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _sequential_states(params: Params, steps: Steps, c0: State, activation: str) -> States:
    """The states c_1 ... c_T from the state `c0`, one `jax.lax.scan` step after another."""
    return _walk(params, steps, c0, activation)[0]


@_sequential_states.defjvp
def _sequential_states_jvp(activation, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    states, gates = _walk(params, steps, c0, activation)
    before = _where(steps.starts, 0.0, jnp.concatenate([c0[None], states[:-1]]))
    answer = gates * (1 - gates) * jnp.stack([steps.u, before], axis=-2)  # dc_t / dz_t

    # r_t: the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, before, activation), (params,), (d_params,))
    r = jnp.sum(answer * (d_steps.z + d_z), axis=-2) + gates[..., 0, :] * d_steps.u
    r = _where(steps.padding, 0.0, r)

    # J_t: what the decay passes on, and what the gates make of h_{t-1}.
    f = _where(steps.padding, 1.0, _where(steps.starts, 0.0, gates[..., 1, :]))
    answer = _where(steps.padding, 0.0, _where(steps.starts, 0.0, answer))
    at_step = partial(_jacobian_product, params, activation)
    r = r.at[0].add(at_step((before[0], f[0], answer[0]), d_c0))
    return states, _linear_solve(at_step, (before, f, answer), r)


def _walk(params: Params, steps: Steps, c0: State, activation: str) -> tuple[States, Gates]:
    """The states, and the gates that made them."""

    def walk(c, step):
        before = _where(step.starts, 0.0, c)
        recurrent = gates_of_state(params, before, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = _where(step.padding, c, update(before, step.u, gates))
        return after, (after, gates)

    return lax.scan(walk, c0, steps)[1]


def _jacobian_product(params: Params, activation: str, step: tuple[Array, Array, Array], v: Array) -> Array:
    """J_t v, for one step or for all of them."""
    before, f, answer = step
    _, d_z = jax.jvp(lambda c: gates_of_state(params, c, activation), (before,), (v,))
    return f * v + jnp.sum(answer * d_z, axis=-2)


def _linear_solve(at_step: Callable[[Any, Array], Array], steps: Any, r: States) -> States:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    zero = jnp.zeros_like(r[0])

    def solve(_, r):
        def walk(v, step):
            v = at_step(step[0], v) + step[1]
            return v, v

        return lax.scan(walk, zero, (steps, r))[1]

    def transpose_solve(_, g):
        def walk(v, step):
            v = v + step[1]
            return jax.linear_transpose(partial(at_step, step[0]), v)(v)[0], v

        return lax.scan(walk, zero, (steps, g), reverse=True)[1]

    def matvec(v):
        return v - at_step(steps, jnp.concatenate([zero[None], v[:-1]]))

    return lax.custom_linear_solve(matvec, r, solve, transpose_solve)


def _where(mask: Array | None, value: Array | float, otherwise: Array) -> Array:
    """`value` where the mask of the leading axes says so; without a mask nowhere."""
    if mask is None:
        return otherwise
    return jnp.where(mask.reshape(mask.shape + (1,) * (otherwise.ndim - mask.ndim)), value, otherwise)
