"""The states where the gates read the input only, or also their own feature of h_{t-1}: every step is elementwise.

One recurrence computes the states from the pre-activations, and one in reverse the gradients. No gate is stored.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.cell import ACTIVATIONS
from ranjax.kernels.base import Recurrence, Rows
from ranjax.scan import SOLVERS, State
from ranjax.sharding import varying_as
from ranjax.solvers.masks import States, Steps, seen


def fused(steps: Steps, c0: State, weights: Array | None, activation: str, solver: str) -> States:
    """The states of elementwise gates, time first; the recurrence has the batch first."""
    (time, *batch, features), dtype = steps.u.shape, c0.dtype
    z = jnp.moveaxis(steps.z.reshape(time, -1, 2, features), 0, 1)
    u = jnp.moveaxis(steps.u.reshape(time, -1, features), 0, 1)
    z, u, c0 = varying_as(z, (u,)), varying_as(u, (z,)), varying_as(c0, (z, u))
    constants = () if weights is None else tuple(varying_as(w, (z, u)) for w in weights.astype(dtype))
    c = cast(Array, _elementwise(c0.reshape(-1, features), constants, (z, u), activation, solver))
    return jnp.moveaxis(c, 1, 0).reshape(time, *batch, features)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _elementwise(c0: Array, weights: Rows, arrays: Rows, activation: str, solver: str) -> Array:
    """The states c_1 ... c_T, `(batch, time, features)`, of gates that read their own feature only.

    The rule for reverse mode recomputes the gates from `arrays` and the states.
    """

    def step(carry, weights, rows):
        c = _elementwise_step(carry[0], weights, rows, activation)
        return (c,), (c,)

    recurrence = Recurrence(step, (c0,), arrays, ((1, c0.dtype),), weights, affine=not weights, in_place=True)
    _, (c,) = SOLVERS[solver](recurrence)
    return c


def _elementwise_forward(c0, weights, arrays, activation, solver):
    c = _elementwise(c0, weights, arrays, activation, solver)
    return c, (c0, weights, arrays, c)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _elementwise_backward(activation, solver, residuals, g):
    """One recurrence in reverse: dc_{t-1}, and the cotangents of the rows of step t, by the chain rule of one step."""
    c0, weights, arrays, c = residuals

    def step(carry, weights, rows):
        (d_before, *d_weights), (*rows, g, before) = carry, rows
        weights = tuple(jnp.broadcast_to(w, before.shape) for w in weights)  # their gradients are summed at the end
        _, chain = jax.vjp(partial(_elementwise_step, activation=activation), before, weights, tuple(rows))
        d_before, d_step, d_rows = chain(d_before + g)
        return (d_before, *(a + b for a, b in zip(d_weights, d_step, strict=True))), d_rows

    zeros = (jnp.zeros_like(c0),) * (1 + len(weights))
    outs = tuple((n, a.dtype) for n, a in enumerate(arrays))
    recurrence = Recurrence(step, zeros, (*arrays, g), outs, weights, ahead=(c, c0), reverse=True, affine=not weights)
    (d_c0, *d_weights), d_arrays = SOLVERS[solver](recurrence)
    return d_c0, tuple(d.sum(0) for d in d_weights), d_arrays


_elementwise.defvjp(_elementwise_forward, _elementwise_backward)


def _elementwise_step(c: Array, weights: Rows, rows: Rows, activation: str) -> Array:
    """c_t of elementwise gates; `weights` are those of both gates on h_{t-1}, or empty."""
    z_i, z_f, u = rows
    c = seen(z_f, c)
    if weights:
        h = ACTIVATIONS[activation](c)
        w_i, w_f = (lax.broadcast_to_rank(w, h.ndim) for w in weights)
        z_i, z_f = z_i + w_i * h, z_f + w_f * h
    return jax.nn.sigmoid(z_i) * u + jax.nn.sigmoid(z_f) * c
