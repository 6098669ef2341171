"""What is compared: passes of every kind, counted."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ranjax
from ranjax.cell import ACTIVATIONS, step
from ranjax.fixed_point import FixedPoint, relative

LEVELS = (1e-3, 1e-4, 1e-6)


Pass = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # the next states, and the residual of these


def passes(applied: Iterable[Pass], expected: jax.Array, mixed: bool = False) -> dict:
    """Residual and error of the states before each pass, from zeros; `mixed` as by Anderson."""
    c, residuals, errors, history = jnp.zeros_like(expected), [], [], []
    for apply in applied:
        errors.append(float(jnp.max(jnp.abs(c - expected)) / jnp.max(jnp.abs(expected))))
        after, residual = apply(c)
        residuals.append(float(residual))
        if not residuals[-1] > LEVELS[-1] / 100:
            break
        history = [*history, (c, after)][-3:]
        c = anderson(history) if mixed else after
    row = {f"passes_{level:g}": next((k for k, r in enumerate(residuals) if r <= level), None) for level in LEVELS}
    row |= {f"passes_error_{level:g}": next((k for k, e in enumerate(errors) if e <= level), None) for level in LEVELS}
    return row | {"residuals": [float(f"{r:.2e}") for r in residuals]}


def make_blocked(params: dict, x: jax.Array, c0: jax.Array, activation: str, size: int) -> Pass:
    """A pass with blocks of so many features of the Jacobian in place of its diagonal; all of it: Newton's method."""
    features = c0.shape[-1]
    mask = jnp.arange(features)[:, None] // size == jnp.arange(features) // size

    def of_step(c, x):
        def f(c):
            return step(params, c, x, activation)

        return f(c), jnp.where(mask, jax.jacfwd(f)(c), 0)

    def apply(x, c0, c):
        earlier = jnp.concatenate([c0[:, None], c[:, :-1]], axis=1)
        after, blocks = jax.vmap(of_step)(earlier[0], x[0])

        def walk(c, rows):
            after, block, earlier = rows
            c = after + block @ (c - earlier)
            return c, c

        _, c_next = jax.lax.scan(walk, c0[0], (after, blocks, earlier[0]))
        return c_next[None], relative(after[None] - c, (after[None], earlier))

    return partial(jax.jit(apply), x, c0)


def anderson(history: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The mix of the last passes with the least step."""
    steps = jnp.stack([(after - before).ravel() for before, after in history])
    gram = steps @ steps.T
    weights = jnp.linalg.solve(gram + 1e-12 * jnp.trace(gram) * jnp.eye(len(gram)), jnp.ones(len(gram)))
    return sum(w * after for w, (_, after) in zip(weights / weights.sum(), history, strict=True))


def rounded(params: dict, earlier: jax.Array, activation: str, *_: str) -> jax.Array:
    """What h_{t-1} gives to the gates, its factors rounded to bfloat16, as products are by default on a TPU."""
    kernel, h = params["gates"]["recurrent_kernel"], ACTIVATIONS[activation](earlier)
    return jnp.tensordot(*(jax.lax.reduce_precision(a, 8, 7) for a in (h, kernel)), 1)


def windows(params: dict, x: jax.Array, activation: str, size: int) -> dict:
    """Passes of windows that are solved one after another, each from the last state of the one before."""
    solver = FixedPoint(rtol=1e-4, window=None)
    solve = jax.jit(partial(ranjax.solve, gates="recurrent", activation=activation, solver=solver))
    c0, counts = jnp.zeros((1, params["content"]["kernel"].shape[1])), []
    for start in range(0, x.shape[1], size):
        states, record = solve(params, x[:, start : start + size], c0)
        c0 = states[:, -1]
        counts.append(int(record.iterations) - 1 if record.converged else None)  # the last one checks
    if None in counts:
        return {"passes_0.0001": None}
    return {"passes_0.0001": float(np.mean(counts)), "most_passes_0.0001": max(counts)}
