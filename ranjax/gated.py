"""The states of a whole sequence, from what its inputs contribute to each step.

Where each gate sees the input, or its own feature of h_{t-1} besides, a step is elementwise: one walk goes from the
pre-activations and the content straight to the states, and one walk back makes the gradients. Neither stores a gate.

Where the gates read all of h_{t-1}, the derivative of the recurrence c_t = F_t(c_{t-1}) is linear: dc_t = J_t dc_{t-1}
+ r_t, with J_t = f_t + (the gates' answer to h_{t-1}) and r_t what the weights and the inputs contribute. Everything in
r_t is a product over all steps at once, so only c and the linear system for dc (in reverse mode its transpose) are
walked through step by step, and no loop accumulates the gradient of a weight.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from ranjax.cell import ACTIVATIONS, Params, gates_of_state, update
from ranjax.kernels import Rows, Walk
from ranjax.scan import SOLVERS, linear_recurrence

States = Float[Array, "time *batch features"]
Gates = Float[Array, "time *batch 2 features"]
State = Float[Array, "*batch features"]
Mask = Bool[Array, "time *batch"]
FUSED = ("auto", "pallas")  # solvers that go from the pre-activations straight to the states


class Steps(NamedTuple):
    """What each step is given, all of it known before the walk; time is the first axis.

    Attributes:
      u: content W_c x.
      z: the inputs' part of both gates' pre-activations.
    """

    u: States
    z: Gates


def masked(steps: Steps, starts: Mask | None, padding: Mask | None) -> Steps:
    """The steps with masks, told by gates that are shut or open for certain.

    Where a segment starts, the forget gate's pre-activation is -inf: nothing of c_{t-1} gets through, and the gates do
    not see it (`_before`). In the padding it is +inf and the input gate's -inf: c_{t-1} passes unchanged.
    """
    if starts is None and padding is None:
        return steps
    i, f = steps.z[..., 0, :], steps.z[..., 1, :]
    if starts is not None:
        f = jnp.where(starts[..., None], -jnp.inf, f)
    if padding is not None:
        i, f = jnp.where(padding[..., None], -jnp.inf, i), jnp.where(padding[..., None], jnp.inf, f)
    return steps._replace(z=jnp.stack([i, f], axis=-2))


def states(params: Params, steps: Steps, c0: State, *, activation: str, solver: str) -> States:
    """The states c_1 ... c_T from the state `c0`."""
    if steps.u.size == 0:
        return steps.u.astype(c0.dtype)
    weights = params["gates"].get("recurrent_kernel")
    if solver in FUSED and (weights is None or weights.ndim == 2):
        return _fused(steps, c0, weights, activation, solver)
    steps = Steps(*(a.astype(c0.dtype) for a in steps))
    if weights is None:
        return _linear_states(steps, c0, solver)
    used = {"gates": {"recurrent_kernel": weights}}
    if "projection" in params:
        used["projection"] = params["projection"]
    return _sequential_states(used, steps, c0, activation)


def _linear_states(steps: Steps, c0: State, solver: str) -> States:
    """The states where the gates see the input only, as one linear recurrence."""
    i, f = jnp.moveaxis(jax.nn.sigmoid(steps.z), -2, 0)
    decay, inputs = jnp.moveaxis(f, 0, -2), jnp.moveaxis(i * steps.u, 0, -2)
    return jnp.moveaxis(linear_recurrence(decay, inputs, c0, solver=solver), -2, 0)


def _fused(steps: Steps, c0: State, weights: Array | None, activation: str, solver: str) -> States:
    """The states of elementwise gates; batch before time, as the walks want it."""
    (time, *batch, features), dtype = steps.u.shape, c0.dtype
    z = jnp.moveaxis(steps.z.reshape(time, -1, 2, features), 0, 1)
    u = jnp.moveaxis(steps.u.reshape(time, -1, features), 0, 1)
    constants = () if weights is None else tuple(weights.astype(dtype))
    c = cast(Array, _elementwise(c0.reshape(-1, features), constants, (z, u), activation, solver))
    return jnp.moveaxis(c, 1, 0).reshape(time, *batch, features)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _elementwise(c0: Array, weights: Rows, arrays: Rows, activation: str, solver: str) -> Array:
    """The states c_1 ... c_T, `(batch, time, features)`, of gates that see their own feature only.

    Its own rule for the reverse mode recomputes the gates from `arrays` and the states.
    """

    def step(carry, weights, rows):
        c = _step(carry[0], weights, rows, activation)
        return (c,), (c,)

    walk = Walk(step, (c0,), arrays, ((1, c0.dtype),), weights, affine=not weights, in_place=True)
    _, (c,) = SOLVERS[solver](walk)
    return c


def _elementwise_forward(c0, weights, arrays, activation, solver):
    c = _elementwise(c0, weights, arrays, activation, solver)
    return c, (c0, weights, arrays, c)


def _elementwise_backward(activation, solver, residuals, g):
    """Back in time: dc_{t-1} and what step t gives to its rows, by the chain rule of one step."""
    c0, weights, arrays, c = residuals

    def step(carry, weights, rows):
        (d_before, *d_weights), (*rows, g, before) = carry, rows
        weights = tuple(jnp.broadcast_to(w, before.shape) for w in weights)  # their gradients are summed at the end
        _, chain = jax.vjp(partial(_step, activation=activation), before, weights, tuple(rows))
        d_before, d_step, d_rows = chain(d_before + g)
        return (d_before, *(a + b for a, b in zip(d_weights, d_step, strict=True))), d_rows

    zeros = (jnp.zeros_like(c0),) * (1 + len(weights))
    outs = tuple((n, a.dtype) for n, a in enumerate(arrays))
    walk = Walk(step, zeros, (*arrays, g), outs, weights, ahead=(c, c0), backwards=True, affine=not weights)
    (d_c0, *d_weights), d_arrays = SOLVERS[solver](walk)
    return d_c0, tuple(d.sum(0) for d in d_weights), d_arrays


_elementwise.defvjp(_elementwise_forward, _elementwise_backward)


def _step(c: Array, weights: Rows, rows: Rows, activation: str) -> Array:
    """c_t of elementwise gates; `weights` are those of the input and the forget gate on h_{t-1}, if they see it."""
    z_i, z_f, u = rows
    c = _before(z_f, c)
    if weights:
        h = ACTIVATIONS[activation](c)
        z_i, z_f = z_i + weights[0] * h, z_f + weights[1] * h
    return jax.nn.sigmoid(z_i) * u + jax.nn.sigmoid(z_f) * c


def _before(z_f: Array, c: Array) -> Array:
    """c_{t-1} as the step sees it: nothing where a forget gate of -inf starts a segment."""
    return jnp.where(z_f == -jnp.inf, 0.0, c)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _sequential_states(params: Params, steps: Steps, c0: State, activation: str) -> States:
    """The states c_1 ... c_T from the state `c0`, one `jax.lax.scan` step after another."""
    return _walk(params, steps, c0, activation)[0]


@_sequential_states.defjvp
def _sequential_states_jvp(activation, primals, tangents):
    (params, steps, c0), (d_params, d_steps, d_c0) = primals, tangents
    states, gates = _walk(params, steps, c0, activation)
    seen = steps.z[..., 1, :]
    before = _before(seen, jnp.concatenate([c0[None], states[:-1]]))
    answer = gates * (1 - gates) * jnp.stack([steps.u, before], axis=-2)  # dc_t / dz_t

    # r_t: the weights and the inputs, at a fixed c_{t-1}.
    _, d_z = jax.jvp(lambda p: gates_of_state(p, before, activation), (params,), (d_params,))
    r = jnp.sum(answer * (d_steps.z + d_z), axis=-2) + gates[..., 0, :] * d_steps.u

    # J_t: what the decay passes on, and what the gates make of h_{t-1}.
    f, answer = gates[..., 1, :], _before(seen[..., None, :], answer)
    _, slope = jax.jvp(ACTIVATIONS[activation], (before,), (jnp.ones_like(before),))
    jacobians = Jacobians(f, answer, slope)
    first = jax.tree.map(lambda a: a[0], jacobians)
    r = r.at[0].add(_jacobian_product(params, first, d_c0))
    return states, _linear_solve(params, jacobians, r)


def _walk(params: Params, steps: Steps, c0: State, activation: str) -> tuple[States, Gates]:
    """The states, and the gates that made them."""

    def walk(c, step):
        before = _before(step.z[..., 1, :], c)
        recurrent = gates_of_state(params, before, activation)
        gates = jax.nn.sigmoid(step.z + recurrent.astype(c.dtype))
        after = update(before, step.u, gates)
        return after, (after, gates)

    return lax.scan(walk, c0, steps)[1]


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
    """The transpose of J_t, times v, for one step."""
    d_z, kernel = at.answer * v[..., None, :], turned["gates"]["recurrent_kernel"]
    if at.answer.shape[-2:] == kernel.shape:  # diagonal
        d_h = jnp.sum(d_z * kernel, axis=-2)
    else:
        d_h = jnp.dot(d_z.reshape(*v.shape[:-1], -1).astype(kernel.dtype), kernel)
    if "projection" in turned:
        d_h = jnp.dot(d_h, turned["projection"]["kernel"])
    return at.f * v + at.slope * d_h.astype(v.dtype)


def _linear_solve(params: Params, jacobians: Jacobians, r: States) -> States:
    """v_t = J_t v_{t-1} + r_t from zero, as a linear system that JAX can transpose."""
    zero = jnp.zeros_like(r[0])

    def solve(_, r):
        def walk(v, step):
            v = _jacobian_product(params, step[0], v) + step[1]
            return v, v

        return lax.scan(walk, zero, (jacobians, r))[1]

    def transpose_solve(_, g):
        turned = _transposed(params)

        def walk(v, step):
            v = v + step[1]
            return _transposed_jacobian_product(turned, step[0], v), v

        return lax.scan(walk, zero, (jacobians, g), reverse=True)[1]

    def matvec(v):
        return v - _jacobian_product(params, jacobians, jnp.concatenate([zero[None], v[:-1]]))

    return lax.custom_linear_solve(matvec, r, solve, transpose_solve)
