"""The iterations that are compared, and the counts of each.

The keys and names of the results ("passes", "windows") are those of the recorded file, passes.jsonl.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ranjax
from ranjax.cell import ACTIVATIONS, Params, content, gates_of_input, gates_of_state, update
from ranjax.scan import linear_recurrence
from ranjax.solvers.adjoint import Jacobians, clipped, diagonal, jacobian_product, jacobians_of
from ranjax.solvers.fixed_point import FixedPoint, averaged, relative
from ranjax.solvers.masks import Steps
from ranjax.solvers.recurrent import make_iteration

LEVELS = (1e-3, 1e-4, 1e-6)
MOVED = 5e-4  # of every weight: the last learning rate of the WikiText-2 runs, about the largest step of Adam

Iteration = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # c -> the next c, and the residual of this one
Approximation = Callable[[Jacobians, jax.Array], jax.Array]  # what stands for the Jacobian; see `make_iteration`
History = list[tuple[jax.Array, jax.Array, jax.Array]]  # of each iteration: its start, its output, its residual


def frozen(jacobians: Jacobians, weights: jax.Array) -> jax.Array:
    """The forget gate in place of the Jacobian, as if the gates did not depend on the state."""
    return jacobians.f


def variants(
    params: Params, x: jax.Array, activation: str, most: int, other_text: jax.Array
) -> dict[str, Callable[[], dict]]:
    """The iterations that are compared, by name; each is a function that runs and counts it.

    Args:
      params: of one layer.
      x: its inputs, `(1, time, in)`.
      activation: of the layer.
      most: the largest number of iterations.
      other_text: other inputs, whose states are one of the initial guesses.
    """
    solve = partial(ranjax.solve, gates="recurrent", activation=activation, solver="sequential")
    expected = solve(params, x)[0]
    of_diagonal = make_solved(params, x, activation)
    of_frozen = make_solved(params, x, activation, frozen)

    def guessed(params, x):
        return count([of_diagonal] * most, expected, first=solve(params, x)[0])

    return {
        "diagonal": lambda: count([of_diagonal] * most, expected),
        "frozen": lambda: count([of_frozen] * most, expected),
        **rounded_variants(params, x, activation, most, expected),
        "gates with h = 0 first": lambda: count([of_frozen] + [of_diagonal] * (most - 1), expected),
        "frozen three times first": lambda: count([of_frozen] * 3 + [of_diagonal] * (most - 3), expected),
        "from the states of other text": lambda: guessed(params, other_text),
        "from the states of moved weights": lambda: guessed(moved(params), x),
        "not averaged": lambda: count([of_diagonal] * most, expected, mix=alone),
        "frozen, not averaged": lambda: count([of_frozen] * most, expected, mix=alone),
        "Anderson, depth 1": lambda: count([of_diagonal] * most, expected, mix=partial(anderson, depth=1)),
        "Anderson, depth 2": lambda: count([of_diagonal] * most, expected, mix=partial(anderson, depth=2)),
        **larger_jacobians(params, x, activation, most, expected),
    }


def rounded_variants(params: Params, x: jax.Array, activation: str, most: int, expected: jax.Array) -> dict:
    """Variants with less precise arithmetic."""

    def single():
        narrow = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
        return count([make_solved(*narrow, activation)] * most, expected.astype(jnp.float32))

    def rounded():
        return count([make_rounded(params, x, activation)] * most, expected)

    return {"float32": single, "bfloat16 products": rounded}


def larger_jacobians(params: Params, x: jax.Array, activation: str, most: int, expected: jax.Array) -> dict:
    """Variants that use more of the gates' Jacobian than its diagonal."""
    kernel = params["gates"]["recurrent_kernel"]

    def near(kernel):
        return count([make_newton(params, x, activation, kernel)] * most, expected)

    return {
        "blocks of 10": lambda: near(block(kernel, 10)),
        "blocks of 50": lambda: near(block(kernel, 50)),
        "rank 10": lambda: near(low_rank(kernel, 10)),
        "rank 50": lambda: near(low_rank(kernel, 50)),
        "Newton": lambda: near(kernel),
    }


def count(
    iterations: Iterable[Iteration],
    expected: jax.Array,
    first: jax.Array | None = None,
    mix: Callable[[History, int], jax.Array] | None = None,
) -> dict:
    """Residual and error of the states at the start of each iteration, and the iterations needed for each level.

    Args:
      iterations: in the order in which they are applied.
      expected: the states of the sequential scan.
      first: initial guess; None: zeros.
      mix: the start of the next iteration, from the history and the number of iterations so far; None: as the solver.
    """
    c = jnp.zeros_like(expected) if first is None else first
    mix = as_solved if mix is None else mix
    residuals, errors, history = [], [], []
    for apply in iterations:
        errors.append(float(jnp.max(jnp.abs(c - expected)) / jnp.max(jnp.abs(expected))))
        history = [*history, (c, *apply(c))][-3:]
        residuals.append(float(history[-1][2]))
        if not residuals[-1] > LEVELS[-1] / 100:
            break
        c = mix(history, len(residuals))
    row = {f"passes_{level:g}": first_within(residuals, level) for level in LEVELS}
    row |= {f"passes_error_{level:g}": first_within(errors, level) for level in LEVELS}
    return row | {"residuals": [float(f"{r:.2e}") for r in residuals]}


def first_within(values: list[float], level: float) -> int | None:
    """The index of the first value of at most this level."""
    return next((k for k, value in enumerate(values) if value <= level), None)


def as_solved(history: History, done: int) -> jax.Array:
    """The start of the solver's next iteration."""
    c, after, residual = history[-1]
    step_before = jnp.zeros_like(c)
    if len(history) > 1 and jnp.array_equal(c, history[-2][1]):
        step_before = history[-2][1] - history[-2][0]
    settled = (jnp.arange(c.shape[-2]) < done)[:, None]
    return averaged(c, after, step_before, residual, settled)[0]


def alone(history: History, _: int) -> jax.Array:
    """The output of the last iteration."""
    return history[-1][1]


def anderson(history: History, _: int, depth: int) -> jax.Array:
    """Anderson's mix: the combination of the last outputs with the smallest step."""
    history = history[-depth - 1 :]
    steps = jnp.stack([(after - c).ravel() for c, after, _ in history])
    gram = steps @ steps.T
    weights = jnp.linalg.solve(gram + 1e-12 * jnp.trace(gram) * jnp.eye(len(gram)), jnp.ones(len(gram)))
    return sum(w * after for w, (_, after, _) in zip(weights / weights.sum(), history, strict=True))


def given(params: Params, x: jax.Array) -> tuple[Steps, jax.Array]:
    """The steps of a layer with the inputs `x`, and a zero state before the first."""
    steps = Steps(content(params, x), gates_of_input(params, x))
    return steps, jnp.zeros((1, params["content"]["kernel"].shape[1]), x.dtype)


def make_solved(params: Params, x: jax.Array, activation: str, approximate: Approximation = clipped) -> Iteration:
    """The solver's iteration."""
    steps, c0 = given(params, x)
    return jax.jit(make_iteration(params, steps, c0, activation, FixedPoint(), approximate=approximate))


def make_rounded(params: Params, x: jax.Array, activation: str) -> Iteration:
    """The solver's iteration with the factors of products rounded to bfloat16, the default on a TPU."""
    steps, c0 = given(params, x)
    weights = diagonal(params)

    def apply(c):
        earlier = jnp.concatenate([c0[:, None], c[:, :-1]], axis=1)
        gates = jax.nn.sigmoid(steps.z + rounded_product(params, earlier, activation))
        i, f = gates[..., 0, :], gates[..., 1, :]
        after, d = i * steps.u + f * earlier, clipped(jacobians_of(steps, earlier, gates, activation), weights)
        c_next = linear_recurrence(d, i * steps.u + (f - d) * earlier, c0)
        return c_next, relative(after - c, (after, earlier))

    return jax.jit(apply)


def rounded_product(params: Params, earlier: jax.Array, activation: str) -> jax.Array:
    """The gates' products with h_{t-1}, both factors rounded to bfloat16."""
    kernel, h = params["gates"]["recurrent_kernel"], ACTIVATIONS[activation](earlier)
    return jnp.tensordot(*(jax.lax.reduce_precision(a, 8, 7) for a in (h, kernel)), 1)


def make_newton(params: Params, x: jax.Array, activation: str, kernel: jax.Array) -> Iteration:
    """An iteration with the Jacobian of gates with this `kernel` on h; with their own kernel: Newton's method."""
    near = {"gates": {"recurrent_kernel": kernel}}

    def apply(steps, c0, c):
        earlier = jnp.concatenate([c0[:, None], c[:, :-1]], axis=1)
        gates = jax.nn.sigmoid(steps.z + gates_of_state(params, earlier, activation))
        after, jacobians = update(earlier, steps.u, gates), jacobians_of(steps, earlier, gates, activation)

        def advance(c, rows):
            after, earlier, jacobians = rows
            c = after + jacobian_product(near, jacobians, c - earlier)
            return c, c

        rows = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (after, earlier, jacobians))
        _, c_next = jax.lax.scan(advance, c0, rows)
        return jnp.moveaxis(c_next, 0, 1), relative(after - c, (after, earlier))

    return partial(jax.jit(apply), *given(params, x))


def block(kernel: jax.Array, size: int) -> jax.Array:
    """The weights between features of the same block."""
    blocks = jnp.arange(len(kernel)) // size
    return jnp.where((blocks[:, None] == blocks)[:, None], kernel, 0)


def low_rank(kernel: jax.Array, rank: int) -> jax.Array:
    """For each gate the nearest weights of this rank, except for the diagonal, which is kept."""
    left, values, right = jnp.linalg.svd(jnp.moveaxis(kernel, 1, 0), full_matrices=False)
    near = jnp.moveaxis((left * values[:, None])[..., :rank] @ right[:, :rank], 0, 1)
    return near + block(kernel - near, 1)


def moved(params: Params) -> Params:
    """Every weight plus or minus `MOVED`, at random."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    signs = [jax.random.rademacher(key, p.shape, p.dtype) for key, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [p + MOVED * sign for p, sign in zip(leaves, signs, strict=True)])


def chunks(params: Params, x: jax.Array, activation: str, size: int) -> dict:
    """Iterations to a residual of 1e-4 if chunks of this size are solved one after another: mean and maximum."""
    solver = FixedPoint(rtol=1e-4, chunk=None)
    solve = jax.jit(partial(ranjax.solve, gates="recurrent", activation=activation, solver=solver))
    _, c0 = given(params, x)
    counts = []
    for start in range(0, x.shape[1], size):
        states, result = solve(params, x[:, start : start + size], c0)
        if not result.converged:
            return {"passes_0.0001": None}
        c0 = states[:, -1]
        counts.append(int(result.iterations) - 1)  # the last one checks
    return {"passes_0.0001": float(np.mean(counts)), "most_passes_0.0001": max(counts)}
