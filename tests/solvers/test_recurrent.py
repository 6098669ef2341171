"""Gates on all of h_{t-1}, solved for all steps at once: the states of the sequential scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from networks import FEATURES, problem, solve

import ranjax
from ranjax import RAN, FixedPoint, RANCell
from ranjax.cell import content, gates_of_input
from ranjax.solvers import adjoint, recurrent
from ranjax.solvers.fixed_point import iterate
from ranjax.solvers.masks import Steps


@pytest.mark.quick
@pytest.mark.parametrize(
    ("time", "options", "solver"),
    [
        (0, {}, FixedPoint()),
        (1, {}, FixedPoint()),
        (3, {"activation": "identity"}, FixedPoint()),
        (40, {"projection": 3}, FixedPoint()),
        (257, {}, FixedPoint()),
        (257, {"activation": "identity"}, FixedPoint()),
        (40, {"projection": 3}, FixedPoint(chunk=12)),
        (257, {}, FixedPoint(chunk=12)),
    ],
    ids=str,
)
def test_equals_the_equations(time, options, solver, x64):
    params, x, c0 = problem(time, **options)
    activation = options.get("activation", "tanh")
    states, result = solve(params, x, c0, solver=solver, activation=activation)
    assert bool(result.converged)
    assert int(result.iterations) <= time + 1
    if time:
        expected, _ = oracle.ran(params, x, c0, activation)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_as_many_iterations_as_steps_suffice(x64):
    """Plus the one that finds it, also for chaotic states, which need nearly as many."""
    _, result = solve(*problem(64, scale=16), solver=FixedPoint(max_iterations=65))
    assert bool(result.converged)
    assert int(result.iterations) > 40


@pytest.mark.parametrize(("scale", "time"), [(1, 2048), (2, 2048), (4, 512), (16, 2048)])
def test_a_failure_is_reported_and_the_states_are_right(scale, time, x64):
    """With weights on h far above those of a trained model the states may be chaotic, and the iteration fails."""
    params, x, c0 = problem(time, scale=scale)
    states, result = jax.jit(solve)(params, x, c0)
    expected, _ = oracle.ran(params, x, c0, "tanh")
    nearby = {
        **params,
        "gates": {**params["gates"], "recurrent_kernel": params["gates"]["recurrent_kernel"] * (1 + 2e-16)},
    }
    rounding = np.abs(oracle.ran(nearby, x, c0, "tanh")[0] - expected).max()
    assert np.abs(states - expected).max() <= max(1e-10, 100 * rounding)
    before = jnp.concatenate([c0[:, None], states[:, :-1]], axis=1)
    step = jax.vmap(lambda c, x: ranjax.cell.step(params, c, x), (1, 1), 1)
    assert float(jnp.abs(step(before, x) - states).max()) <= 1e-12
    assert bool(result.converged) == (scale <= 2)


@pytest.mark.parametrize(
    ("part", "recurrence"), [("sequence", "auto"), ("segment", "associative"), ("spike", "chunked"), ("spike", "auto")]
)
def test_tolerances_are_relative_at_every_step(part, recurrence):
    """States and gradients of a small sequence beside a large one, of a small segment after one, after one input."""
    cell, rng = RANCell(FEATURES), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 100, 5)), jnp.float32)
    starts, loud = jnp.zeros((2, 100), bool), np.zeros((2, 100), bool)
    if part == "sequence":
        loud[0] = True
    else:
        loud[:, : 50 if part == "segment" else 1] = True
        starts = starts.at[:, 50].set(part == "segment")
    quiet = ~loud & (np.arange(100) >= 50)
    x, weight = jnp.where(loud[..., None], 1e6 * x, x), jnp.where(loud, 1e3, 1.0)[..., None]
    variables = RAN(cell).init(jax.random.key(0), x)
    variables["params"]["cell"]["gates"]["recurrent_kernel"] *= 2

    @partial(jax.jit, static_argnums=0)
    def of(solver):
        def weighed(x):
            h = RAN(cell, solver).apply(variables, x, segment_starts=starts)
            return jnp.sum(weight * h), h

        return jax.grad(weighed, has_aux=True)(x)

    solver = FixedPoint(recurrence=recurrence, on_failure="nan")
    for got, expected in zip(of(solver), of("sequential"), strict=True):
        np.testing.assert_allclose(got[quiet], expected[quiet], rtol=0, atol=3e-5 * np.abs(expected[quiet]).max())


def test_float32_equals_the_sequential_scan_to_rounding():
    arrays = problem(300, dtype=jnp.float32)
    states, result = solve(*arrays)
    expected, _ = solve(*arrays, solver="sequential")
    assert bool(result.converged)
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("recurrence", ["associative", "chunked"])
def test_every_solver_of_the_linear_recurrences(recurrence, x64):
    arrays = problem(130)
    states, _ = solve(*arrays, solver=FixedPoint(recurrence=recurrence, on_failure="nan"))
    np.testing.assert_allclose(states, solve(*arrays, solver="sequential")[0], atol=1e-12)


@pytest.mark.parametrize("most", [2, 100])
def test_narrow_parameters_are_multiplied_in_the_dtype_of_the_states(most):
    """The dtype of the products does not depend on whether the iteration fails."""
    params, x, c0 = problem(30, dtype=jnp.float32)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    u, z = content(wide, x), gates_of_input(wide, x)
    steps = Steps(jnp.swapaxes(u, 0, 1), jnp.swapaxes(z, 0, 1))
    solver = FixedPoint(max_iterations=most)
    got, expected = (
        recurrent.recurrent_states(p, steps, c0, "tanh", adjoint.Method(solver))[0] for p in (narrow, wide)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("large", [0, 1])
def test_the_residual_is_relative_to_the_larger_state(x64, large):
    params, x, c0 = problem(2, batch=1)
    params["gates"]["recurrent_kernel"] *= 0
    params["gates"]["bias"] = params["gates"]["bias"].at[1].set(-9.0)  # all is forgotten
    c = 1e3 * large * jnp.ones((1, 2, FEATURES))
    earlier = jnp.stack([c0, c[:, 0]], 1)
    after = jax.vmap(lambda c, x: ranjax.cell.step(params, c, x), (1, 1), 1)(earlier, x)
    scale = jnp.maximum(jnp.abs(after).max(-1), jnp.abs(earlier).max(-1))
    steps = Steps(content(params, x), gates_of_input(params, x))
    _, residual = recurrent.make_iteration(params, steps, c0, "tanh", FixedPoint())(c)
    np.testing.assert_allclose(residual, (jnp.abs(after - c).max(-1) / scale).max(), rtol=1e-12)


@pytest.mark.parametrize("recurrence", ["pallas", "sequential"])
def test_states_and_gradients_use_the_selected_recurrence(recurrence):
    cell, x = RANCell(4), jnp.ones((1, 9, 3))
    params = cell.init(jax.random.key(0), jnp.zeros((1, 4)), x[:, 0])["params"]

    def total(x):
        return jnp.sum(ranjax.solve(params, x, gates="recurrent", solver=FixedPoint(recurrence=recurrence))[0])

    forward, gradient = (str(jax.make_jaxpr(program)(x)).count("pallas_call") for program in (total, jax.grad(total)))
    assert 0 < forward < gradient if recurrence == "pallas" else forward == gradient == 0


def test_iterations_of_diagonal_gates_are_newtons(x64):
    """Nothing is averaged, although they overshoot."""
    params, x, c0 = problem(100, gates="diagonal", scale=3)
    solver, steps = FixedPoint(max_iterations=4), Steps(content(params, x), gates_of_input(params, x))
    found, result = recurrent.iterate_states(params, steps, c0, "tanh", solver)
    apply = recurrent.make_iteration(params, steps, c0, "tanh", solver)
    c = jnp.zeros_like(found)
    for _ in range(4):
        c, residual = apply(c)
    np.testing.assert_allclose(found, c, rtol=0, atol=1e-12)
    assert float(result.residual) == pytest.approx(float(residual))


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_newton_solves_diagonal_gates_in_few_iterations(x64, activation):
    """The Jacobian is diagonal: every iteration squares a residual below 1."""
    cell = RANCell(8, "diagonal", activation, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(0), (2, 300, 5), jnp.float64)
    params = cell.init(jax.random.key(1), jnp.zeros((2, 8), jnp.float64), x[:, 0])["params"]
    options = {"gates": "diagonal", "activation": activation}

    def loss(solver, params, x):
        c, result = ranjax.solve(params, x, solver=solver, **options)
        return jnp.sum(jnp.sin(c)), (c, result)

    (_, (sequential, _)), expected = jax.value_and_grad(partial(loss, "sequential"), (0, 1), has_aux=True)(params, x)
    (_, (c, result)), found = jax.value_and_grad(partial(loss, "newton"), (0, 1), has_aux=True)(params, x)
    np.testing.assert_allclose(c, sequential, rtol=0, atol=1e-12)
    assert bool(result.converged)
    assert int(result.iterations) <= 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


def test_under_vmap(x64):
    """Every network has iterations of its own."""
    params, x, c0 = problem(60)
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    inputs = jnp.stack([x, 3 * x])
    for solver in (FixedPoint(on_failure="nan"), FixedPoint(chunk=25)):
        states, result = jax.vmap(partial(solve, solver=solver), (0, 0, None))(many, inputs, c0)
        for n in range(2):
            expected, its = solve(jax.tree.map(lambda p, n=n: p[n], many), inputs[n], c0, solver=solver)
            np.testing.assert_allclose(states[n], expected, rtol=0, atol=1e-12)
            assert int(result.iterations[n]) == int(its.iterations)


def test_frozen_gates_take_more_iterations_than_the_diagonal(x64):
    """With one feature the diagonal is the Jacobian, and the iteration is Newton's."""
    params, x = one_feature()
    steps, c0 = Steps(content(params, x), gates_of_input(params, x)), jnp.zeros((1, 1))

    def iterations(**options):
        apply = recurrent.make_iteration(params, steps, c0, "tanh", FixedPoint(), **options)
        return int(iterate(apply, jnp.zeros_like(steps.u), 1e-13, most=100)[1].iterations)

    assert iterations() <= 8 < iterations(approximate=lambda jacobians, _: jacobians.f)


def one_feature():
    cell = RANCell(1, param_dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 400, 3)))
    params = cell.init(jax.random.key(1), jnp.zeros((1, 1)), x[:, 0])["params"]
    params["gates"] |= {"bias": jnp.array([[0.0], [1.0]]), "recurrent_kernel": jnp.full((1, 2, 1), 0.3)}
    return params, x
