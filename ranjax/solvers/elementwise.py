"""The states where the gates read the input only, or also their own feature of h_{t-1}: every step is elementwise.

One recurrence computes the states from the pre-activations, and one in reverse the gradients. No gate is stored.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ranjax.cell import ACTIVATIONS
from ranjax.kernels.base import Recurrence, Rows
from ranjax.scan import SOLVERS, State
from ranjax.sharding import before, varying_as
from ranjax.solvers.masks import States, Steps, seen

Operands = tuple[Array, Rows, Rows]  # c_0, the gates' weights on h_{t-1}, the rows z and u; or their (co)tangents


def fused(steps: Steps, c0: State, weights: Array | None, activation: str, solver: str) -> States:
    """The states of elementwise gates, time first; the recurrence has the batch first."""
    (time, *batch, features), dtype = steps.u.shape, c0.dtype
    z = jnp.moveaxis(steps.z.reshape(time, -1, 2, features), 0, 1)
    u = jnp.moveaxis(steps.u.reshape(time, -1, features), 0, 1)
    z, u, c0 = varying_as(z, (u,)), varying_as(u, (z,)), varying_as(c0, (z, u))
    constants = () if weights is None else tuple(varying_as(w, (z, u)) for w in weights.astype(dtype))
    c = cast(Array, _elementwise(c0.reshape(-1, features), constants, (z, u), activation, solver))
    return jnp.moveaxis(c, 1, 0).reshape(time, *batch, features)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _elementwise(c0: Array, weights: Rows, arrays: Rows, activation: str, solver: str) -> Array:
    """The states c_1 ... c_T, `(batch, time, features)`, of gates that read their own feature only."""

    def step(carry, weights, rows):
        c = _elementwise_step(carry[0], weights, rows, activation)
        return (c,), (c,)

    recurrence = Recurrence(step, (c0,), arrays, ((1, c0.dtype),), weights, affine=not weights, in_place=True)
    _, (c,) = SOLVERS[solver](recurrence)
    return c


@_elementwise.defjvp
def _elementwise_jvp(activation: str, solver: str, primals: Operands, tangents: Operands) -> tuple[Array, Array]:
    c = _elementwise(*primals, activation, solver)
    return c, Derivative(*primals, c, partial(_elementwise_step, activation=activation), solver).tangent(tangents)


class Derivative(NamedTuple):
    r"""The derivative of the states at a point, as a linear system that JAX can transpose and differentiate again.

    With the tangents q of all operands, J_t = dc_t / dc_{t-1} and B_t = dc_t / dq, the unknowns (q, dc) obey

    .. math::
        q = q, \qquad dc_t - J_t \, dc_{t-1} - B_t \, q = r_t

    with r = 0. The solution of the transposed system has the cotangents of the operands where this one has q: one
    recurrence in reverse recomputes the gates and writes all of them. The adjoint of the states, where this one has r,
    is a recurrence of its own. Only second derivatives read it, and XLA drops it from a first one.
    """

    c0: Array
    weights: Rows
    arrays: Rows
    c: Array
    step: Any
    solver: str

    def tangent(self, tangents: Operands) -> Array:
        """dc, from the tangents of the operands."""
        r = jnp.broadcast_to(_zero(tangents), self.c.shape).astype(self.c.dtype)
        system = _tied((tangents, r))
        return lax.custom_linear_solve(self.residual, system, self.solve, self.transpose_solve)[1]

    def residual(self, unknowns: tuple[Operands, Array]) -> tuple[Operands, Array]:
        """The left-hand side of the system."""
        tangents, d_c = _tied(unknowns)

        def after(c, c0, weights, arrays):
            """c_1 ... c_T from c_0 ... c_{T-1}."""
            rows = tuple(a.astype(c.dtype) for a in (arrays[0][..., 0, :], arrays[0][..., 1, :], arrays[1]))
            return self.step(before(c, c0, 1), weights, rows)

        @partial(jax.checkpoint, prevent_cse=False)  # else JAX stores gates with what a first derivative reads
        def product(point, direction):
            return jax.jvp(after, point, direction)[1]

        point = self.c, self.c0, self.weights, self.arrays
        return _tied((tangents, d_c - product(point, (d_c, *tangents))))

    def solve(self, _: Any, system: tuple[Operands, Array]) -> tuple[Operands, Array]:
        """The system by one recurrence."""
        ((d_c0, d_weights, d_arrays), r), count = system, len(self.weights)

        def step(carry, constants, rows):
            *rows, c, d_z_i, d_z_f, d_u, r = rows
            point, direction = (c, constants[:count], tuple(rows)), (carry[0], constants[count:], (d_z_i, d_z_f, d_u))
            d_c = jax.jvp(self.step, point, direction)[1] + r
            return (d_c,), (d_c,)

        arrays = *self.arrays, before(self.c, self.c0, 1), *d_arrays, r
        outs, constants = ((len(arrays) - 1, r.dtype),), (*self.weights, *d_weights)
        _, (d_c,) = SOLVERS[self.solver](Recurrence(step, (d_c0,), arrays, outs, constants, affine=True, in_place=True))
        return system[0], d_c

    def transpose_solve(self, _: Any, system: tuple[Operands, Array]) -> tuple[Operands, Array]:
        """The transposed system by two recurrences in reverse."""
        cotangents, g = system
        return jax.tree.map(jnp.add, cotangents, self.cotangents(g)), self.adjoint(g)

    def cotangents(self, g: Array) -> Operands:
        """One recurrence in reverse: dc_{t-1}, and the cotangents of the rows of step t, by the chain rule."""

        def step(carry, weights, rows):
            (d_before, *d_weights), (*rows, g, before) = carry, rows
            weights = tuple(jnp.broadcast_to(w, before.shape) for w in weights)  # their gradients are summed at the end
            _, chain = jax.vjp(self.step, before, weights, tuple(rows))
            d_before, d_step, d_rows = chain(d_before + g)
            return (d_before, *(a + b for a, b in zip(d_weights, d_step, strict=True))), d_rows

        zeros = (jnp.zeros_like(self.c0),) * (1 + len(self.weights))
        outs = tuple((n, a.dtype) for n, a in enumerate(self.arrays))
        recurrence = self._reversed(step, g)._replace(carry=zeros, outs=outs, affine=not self.weights)
        (d_c0, *d_weights), d_arrays = SOLVERS[self.solver](recurrence)
        return d_c0, tuple(d.sum(0) for d in d_weights), d_arrays

    def adjoint(self, g: Array) -> Array:
        """The total derivatives with regard to the states, from the direct ones."""

        def step(carry, weights, rows):
            *rows, g, before = rows
            d_c = carry[0] + g
            _, d_before = jax.jvp(lambda c: self.step(c, weights, tuple(rows)), (before,), (d_c,))  # J is diagonal
            return (d_before,), (d_c,)

        _, (d_c,) = SOLVERS[self.solver](self._reversed(step, g))
        return d_c

    def _reversed(self, step: Any, g: Array) -> Recurrence:
        """A recurrence in reverse whose steps read z, u, g and c_{t-1}."""
        arrays, outs = (*self.arrays, g), ((len(self.arrays), g.dtype),)
        zero, ahead = jnp.zeros_like(self.c0), (self.c, self.c0)
        return Recurrence(step, (zero,), arrays, outs, self.weights, ahead=ahead, reverse=True, affine=True)


def _tied(system: Any) -> Any:
    """The same values, each of which depends on all, by a term that is 0.

    JAX transposes a linear system only if all of its right-hand side is linear in what is differentiated, and here the
    initial state, say, may not be. XLA removes the term.
    """
    zero = _zero(system)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), system)


def _zero(system: Any) -> Array:
    """0, as a linear function of all arrays."""
    firsts = [lax.slice(leaf, (0,) * leaf.ndim, (1,) * leaf.ndim).reshape(()) for leaf in jax.tree.leaves(system)]
    total = sum(first.astype(firsts[0].dtype) for first in firsts)
    return lax.select(np.False_, total, jnp.zeros_like(total))


def _elementwise_step(c: Array, weights: Rows, rows: Rows, activation: str) -> Array:
    """c_t of elementwise gates; `weights` are those of both gates on h_{t-1}, or empty."""
    z_i, z_f, u = rows
    c = seen(z_f, c)
    if weights:
        h = ACTIVATIONS[activation](c)
        w_i, w_f = (lax.broadcast_to_rank(w, h.ndim) for w in weights)
        z_i, z_f = z_i + w_i * h, z_f + w_f * h
    return jax.nn.sigmoid(z_i) * u + jax.nn.sigmoid(z_f) * c
