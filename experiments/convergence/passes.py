"""What is compared: passes of every kind, counted."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import ranjax
from ranjax.cell import ACTIVATIONS, Params, content, gates_of_input, gates_of_state, update
from ranjax.solvers.fixed_point import FixedPoint, Splitting, averaged, relative
from ranjax.solvers.adjoint import jacobian_product, jacobians_of
from ranjax.solvers.masks import Steps
from ranjax.solvers.recurrent import make_pass

LEVELS = (1e-3, 1e-4, 1e-6)
MOVED = 5e-4  # of every weight: the last learning rate of the WikiText-2 runs, about the most that a step of Adam moves

Pass = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # the next states, and the residual of these
History = list[tuple[jax.Array, jax.Array, jax.Array]]  # states of each pass, what it made of them, their residual


def variants(
    params: Params, x: jax.Array, activation: str, most: int, other_text: jax.Array
) -> dict[str, Callable[[], dict]]:
    """What can be compared, by name: how its passes go."""
    solve = partial(ranjax.solve, gates="recurrent", activation=activation, solver="sequential")
    expected = solve(params, x)[0]
    diagonal, frozen = (make_solved(params, x, activation, splitting) for splitting in get_args(Splitting))

    def guessed(params, x):
        return passes([diagonal] * most, expected, first=solve(params, x)[0])

    return {
        "diagonal": lambda: passes([diagonal] * most, expected),
        "frozen": lambda: passes([frozen] * most, expected),
        **of_few_digits(params, x, activation, most, expected),
        "gates with h = 0 first": lambda: passes([frozen] + [diagonal] * (most - 1), expected),
        "frozen three times first": lambda: passes([frozen] * 3 + [diagonal] * (most - 3), expected),
        "from the states of other text": lambda: guessed(params, other_text),
        "from the states of moved weights": lambda: guessed(moved(params), x),
        "not averaged": lambda: passes([diagonal] * most, expected, mix=alone),
        "frozen, not averaged": lambda: passes([frozen] * most, expected, mix=alone),
        "Anderson, depth 1": lambda: passes([diagonal] * most, expected, mix=partial(anderson, depth=1)),
        "Anderson, depth 2": lambda: passes([diagonal] * most, expected, mix=partial(anderson, depth=2)),
        **of_larger_jacobians(params, x, activation, most, expected),
    }


def of_few_digits(params: Params, x: jax.Array, activation: str, most: int, expected: jax.Array) -> dict:
    """Variants whose arithmetic is rounded more."""

    def narrow():
        single = make_solved(*jax.tree.map(lambda a: a.astype(jnp.float32), (params, x)), activation, "diagonal")
        return passes([single] * most, expected.astype(jnp.float32))

    def rough():
        with mock.patch("ranjax.solvers.recurrent._recurrent", rounded):
            return passes([make_solved(params, x, activation, "diagonal")] * most, expected)

    return {"float32": narrow, "bfloat16 products": rough}


def of_larger_jacobians(params: Params, x: jax.Array, activation: str, most: int, expected: jax.Array) -> dict:
    """Variants whose passes see more of the gates' Jacobian than its diagonal."""
    kernel = params["gates"]["recurrent_kernel"]

    def near(kernel):
        return passes([make_walked(params, x, activation, kernel)] * most, expected)

    return {
        "blocks of 10": lambda: near(block(kernel, 10)),
        "blocks of 50": lambda: near(block(kernel, 50)),
        "rank 10": lambda: near(low_rank(kernel, 10)),
        "rank 50": lambda: near(low_rank(kernel, 50)),
        "Newton": lambda: near(kernel),
    }


def as_solved(history: History, made: int) -> jax.Array:
    """What the solver goes on with."""
    c, after, residual = history[-1]
    step_before = jnp.zeros_like(c)
    if len(history) > 1 and jnp.array_equal(c, history[-2][1]):
        step_before = history[-2][1] - history[-2][0]
    settled = (jnp.arange(c.shape[-2]) < made)[:, None]
    return averaged(c, after, step_before, residual, settled)[0]


def alone(history: History, _: int) -> jax.Array:
    """What the last pass made."""
    return history[-1][1]


def anderson(history: History, _: int, depth: int) -> jax.Array:
    """The mix of the last passes with the least step."""
    history = history[-depth - 1 :]
    steps = jnp.stack([(after - c).ravel() for c, after, _ in history])
    gram = steps @ steps.T
    weights = jnp.linalg.solve(gram + 1e-12 * jnp.trace(gram) * jnp.eye(len(gram)), jnp.ones(len(gram)))
    return sum(w * after for w, (_, after, _) in zip(weights / weights.sum(), history, strict=True))


def passes(
    applied: Iterable[Pass],
    expected: jax.Array,
    first: jax.Array | None = None,
    mix: Callable[[History, int], jax.Array] = as_solved,
) -> dict:
    """Residual and error of the states before each pass, from `first` or zeros."""
    c, residuals, errors, history = jnp.zeros_like(expected) if first is None else first, [], [], []
    for apply in applied:
        errors.append(float(jnp.max(jnp.abs(c - expected)) / jnp.max(jnp.abs(expected))))
        history = [*history, (c, *apply(c))][-3:]
        residuals.append(float(history[-1][2]))
        if not residuals[-1] > LEVELS[-1] / 100:
            break
        c = mix(history, len(residuals))
    row = {f"passes_{level:g}": next((k for k, r in enumerate(residuals) if r <= level), None) for level in LEVELS}
    row |= {f"passes_error_{level:g}": next((k for k, e in enumerate(errors) if e <= level), None) for level in LEVELS}
    return row | {"residuals": [float(f"{r:.2e}") for r in residuals]}


def make_solved(params: Params, x: jax.Array, activation: str, splitting: Splitting) -> Pass:
    """A pass of the solver."""
    steps = Steps(content(params, x), gates_of_input(params, x))
    return jax.jit(make_pass(params, steps, zeros(params, x), activation, FixedPoint(splitting)))


def make_walked(params: Params, x: jax.Array, activation: str, kernel: jax.Array) -> Pass:
    """A pass with the Jacobian that the gates would have with this `kernel` on h; with their own: Newton's method."""
    near = {"gates": {"recurrent_kernel": kernel}}
    steps, c0 = Steps(content(params, x), gates_of_input(params, x)), zeros(params, x)

    def apply(steps, c0, c):
        earlier = jnp.concatenate([c0[:, None], c[:, :-1]], axis=1)
        gates = jax.nn.sigmoid(steps.z + gates_of_state(params, earlier, activation))
        after, jacobians = update(earlier, steps.u, gates), jacobians_of(steps, earlier, gates, activation)

        def walk(c, rows):
            after, earlier, jacobians = rows
            c = after + jacobian_product(near, jacobians, c - earlier)
            return c, c

        rows = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (after, earlier, jacobians))
        _, c_next = jax.lax.scan(walk, c0, rows)
        return jnp.moveaxis(c_next, 0, 1), relative(after - c, (after, earlier))

    return partial(jax.jit(apply), steps, c0)


def zeros(params: Params, x: jax.Array) -> jax.Array:
    """The state before the first step."""
    return jnp.zeros((1, params["content"]["kernel"].shape[1]), x.dtype)


def block(kernel: jax.Array, size: int) -> jax.Array:
    """The weights between features of the same block."""
    blocks = jnp.arange(len(kernel)) // size
    return jnp.where((blocks[:, None] == blocks)[:, None], kernel, 0)


def low_rank(kernel: jax.Array, rank: int) -> jax.Array:
    """Of the weights of each gate the nearest of so low a rank, but for the diagonal, which is kept."""
    left, values, right = jnp.linalg.svd(jnp.moveaxis(kernel, 1, 0), full_matrices=False)
    near = jnp.moveaxis((left * values[:, None])[..., :rank] @ right[:, :rank], 0, 1)
    return near + block(kernel - near, 1)


def moved(params: Params) -> Params:
    """Every weight up or down by `MOVED`, at random."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    signs = [jax.random.rademacher(key, p.shape, p.dtype) for key, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [p + MOVED * sign for p, sign in zip(leaves, signs, strict=True)])


def rounded(params: dict, earlier: jax.Array, activation: str, *_: str) -> jax.Array:
    """What h_{t-1} gives to the gates, its factors rounded to bfloat16, as products are by default on a TPU."""
    kernel, h = params["gates"]["recurrent_kernel"], ACTIVATIONS[activation](earlier)
    return jnp.tensordot(*(jax.lax.reduce_precision(a, 8, 7) for a in (h, kernel)), 1)


def windows(params: dict, x: jax.Array, activation: str, size: int) -> dict:
    """Passes of windows that are solved one after another, each from the last state of the one before."""
    solver = FixedPoint(rtol=1e-4, window=None)
    solve = jax.jit(partial(ranjax.solve, gates="recurrent", activation=activation, solver=solver))
    c0, counts = zeros(params, x), []
    for start in range(0, x.shape[1], size):
        states, record = solve(params, x[:, start : start + size], c0)
        c0 = states[:, -1]
        counts.append(int(record.iterations) - 1 if record.converged else None)  # the last one checks
    if None in counts:
        return {"passes_0.0001": None}
    return {"passes_0.0001": float(np.mean(counts)), "most_passes_0.0001": max(counts)}
