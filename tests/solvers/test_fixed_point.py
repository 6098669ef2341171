"""The iteration: tolerances, averages, failures, settings."""

import math
from functools import partial

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from networks import problem, solve

from ranjax import FixedPoint
from ranjax.cell import content, gates_of_input
from ranjax.solvers import recurrent
from ranjax.solvers.fixed_point import averaged, iterate, relative
from ranjax.solvers.masks import Steps
from ranjax.solvers.result import Status


def test_iterate_returns_the_iterate_of_its_residual():
    x, result = iterate(lambda x: (x / 2, jnp.max(x)), jnp.ones((1, 1)), 0.1, most=20)
    assert (float(x[0, 0]), int(result.iterations), float(result.residual)) == (0.0625, 5, 0.0625)


@pytest.mark.parametrize(("value", "status"), [(0.01, 0), (0.5, 1), (jnp.nan, 2), (jnp.inf, 2)])
def test_the_status_is_that_of_the_last_residual(value, status):
    _, result = iterate(lambda x: (x, jnp.float32(value)), jnp.ones((1, 1)), 0.1, most=3)
    assert (int(result.status), int(result.iterations)) == (status, 3 if status == 1 else 1)
    assert bool(result.converged) == (status == 0)


def test_alternating_errors_are_averaged_and_nothing_is_extrapolated(x64):
    """Each sequence separately, for x <- a x: a = -0.9 ends soon, and a = 0.9 takes as long as it does alone."""

    def iterations(*factors):
        a = jnp.array(factors)[:, None, None]
        first = jnp.full((len(factors), 200, 1), 0.5)  # exact steps are not averaged
        return int(iterate(lambda x: (a * x, jnp.max(jnp.abs(x[:, -1]))), first, 1e-6, most=999)[1].iterations)

    assert iterations(0.9) == iterations(0.9, -0.9) == 1 + math.ceil(math.log(2e-6) / math.log(0.9))
    assert iterations(0.9, 0.5) == iterations(0.9)
    assert iterations(-0.9) <= 6


def test_the_weight_of_the_average(x64):
    """One sequence for each ratio of the last two steps, of three time steps, the first of them exact."""
    ratios = jnp.array([-0.5, -3.0, 0.5, 3.0])[:, None, None]
    before = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)))
    step, settled = ratios * before, (jnp.arange(3) < 1)[:, None]
    weight = jnp.array([1 / 3, 1 / 2, 0, 0])[:, None, None]  # |r_{k-1}|^2 a (a - 1) / (|r_{k-1}|^2 (a - 1)^2), capped
    found, after = averaged(jnp.ones_like(step), 1 + step, before, jnp.float64(0.9), settled)
    np.testing.assert_allclose(found, 1 + jnp.where(settled, 1, 1 - weight) * step)
    np.testing.assert_allclose(after, jnp.where(weight > 0, 0, step))  # so the next iteration is not averaged
    found, after = averaged(jnp.ones_like(step), 1 + step, before, jnp.float64(1.0), settled)
    np.testing.assert_allclose(found, 1 + step)  # no average at a residual of 1


@pytest.mark.parametrize("reverse", [False, True])
def test_every_iteration_makes_a_step_exact(reverse, x64):
    """Averages do not undo it: x_t = b_t - 0.9 x_{t-1}, in reverse - 0.9 x_{t+1}."""
    time = 9
    b = 0.1 * jnp.asarray(np.random.default_rng(0).normal(size=(2, time, 1)))
    shift = -0.9 * jnp.eye(time, k=1 if reverse else -1)
    expected = np.linalg.solve(np.eye(time) - shift, b)
    far = np.arange(time)[None, :: -1 if reverse else 1, None]

    def apply(x):
        after = b + shift @ x
        return after, jnp.max(jnp.abs(after - x))

    run = partial(iterate, apply, jnp.zeros_like(b), 1e-12, reverse=reverse)
    for most in range(time):
        np.testing.assert_allclose(jnp.where(far < most, run(most=most)[0] - expected, 0), 0, atol=1e-15)
    assert float(jnp.abs(run(most=5)[0] - run(most=5, average=False)[0]).max()) > 0.01  # there were averages


def test_steps_whose_squares_overflow_are_not_averaged():
    step = jnp.full((1, 3, 2), 1e20)
    found, _ = averaged(0 * step, step, -step, jnp.float32(0.9), jnp.zeros((3, 1), bool))
    np.testing.assert_array_equal(found, step)


def test_the_divisor_of_the_residual_is_bounded_below():
    finfo = jnp.finfo(jnp.float32)
    state = jnp.full((1, 3, 2), 4 * finfo.tiny)
    assert relative(state / 4, (state, state)) == finfo.eps


@pytest.mark.parametrize("on_failure", ["sequential", "nan"])
def test_on_failure(on_failure, x64):
    arrays = problem()
    states, result = solve(*arrays, solver=FixedPoint(max_iterations=3, on_failure=on_failure))
    expected, _ = solve(*arrays, solver="sequential")
    assert (int(result.status), int(result.iterations)) == (Status.MAX_ITERATIONS, 3)
    assert float(result.residual) > 1e-9
    if on_failure == "sequential":
        np.testing.assert_array_equal(states, expected)
    else:
        assert bool(jnp.all(jnp.isnan(states)))


def test_iterates_are_exact_for_as_many_steps(x64):
    params, x, c0 = problem()
    steps = Steps(content(params, x), gates_of_input(params, x))
    c, result = recurrent.iterate_states(params, steps, c0, "tanh", FixedPoint(max_iterations=3))
    expected, _ = solve(params, x, c0, solver="sequential")
    assert not bool(result.converged)
    np.testing.assert_allclose(c[:, :3], expected[:, :3], atol=1e-14)
    assert float(jnp.abs(c - expected).max()) > 1e-9


def test_nan_ends_the_iteration_at_once(x64):
    params, x, c0 = problem()
    _, result = solve(params, x.at[0, 5].set(jnp.nan), c0)
    assert int(result.iterations) == 1
    assert int(result.status) == Status.NOT_FINITE


def test_a_looser_tolerance_takes_fewer_iterations(x64):
    arrays = problem(256)
    loose, tight = (solve(*arrays, solver=FixedPoint(rtol=rtol))[1] for rtol in (1e-3, 1e-12))
    assert 1 < int(loose.iterations) < int(tight.iterations)
    assert float(loose.residual) <= 1e-3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"recurrence": "magic"}, r"`recurrence` must be one of .*'sequential'"),
        ({"on_failure": "shrug"}, r"`on_failure` must be one of 'sequential', 'nan'; got 'shrug'"),
        ({"on_failure": "ignore"}, r"`on_failure` must be one of 'sequential', 'nan'; got 'ignore'"),
        ({"rtol": 0}, r"`rtol` must be a number above 0 and below 1, or None; got 0"),
        ({"adjoint_rtol": 2}, r"`adjoint_rtol` must be a number above 0"),
        ({"rtol": 1.0}, r"`rtol` must be a number above 0 and below 1, or None; got 1.0"),
        ({"rtol": jnp.float32(0.5)}, r"`rtol` must be a number above 0 .* got Array"),
        ({"adjoint_rtol": "1e-3"}, r"`adjoint_rtol` must be a number above 0 .* got '1e-3'"),
        ({"max_iterations": 0}, r"`max_iterations` must be a whole number, at least 1; got 0"),
        ({"max_iterations": None}, r"`max_iterations` must be a whole number, at least 1; got None"),
        ({"chunk": 0}, r"`chunk` must be a whole number, at least 1, or None; got 0"),
        ({"chunk": 10.5}, r"`chunk` must be a whole number, at least 1, or None; got 10.5"),
    ],
)
def test_bad_settings(setting, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the types would refuse some of them first
    with pytest.raises(ValueError, match=message):
        FixedPoint(**setting)
