"""Gates on h_{t-1} with time spread over a mesh: the states, gradients and results of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import BATCH, FEATURES, TIME, assert_close, drawn, gradient, layer_problem, mesh, needs_devices, spread

import ranjax
from ranjax import FixedPoint
from ranjax.cell import content, gates_of_input, gates_of_state
from ranjax.sharding import before, largest
from ranjax.solvers import adjoint, solve_adjoint
from ranjax.solvers.fixed_point import averaged, iterate
from ranjax.solvers.masks import Steps

pytestmark = needs_devices


@pytest.mark.quick
def test_an_average_is_of_the_whole_sequence(x64):
    """The average of one device alone would differ: on one the step changes its sign, on the other it does not."""
    _, step, _ = drawn()
    before = jnp.where(jnp.arange(TIME)[None, :, None] < TIME // 2, -3.0, 0.3) * step
    arrays, axes = (jnp.zeros_like(step), step, before), P(None, "time")
    others = jnp.float64(0.1), jnp.bool(False)
    over = spread(lambda *a: averaged(*a, *others, "time"), mesh(time=2), (axes,) * 3, (axes, axes))
    found, expected = over(*arrays), averaged(*arrays, *others)
    assert_close(found, expected)
    half, _ = averaged(*(a[:, : TIME // 2] for a in arrays), *others)
    assert float(jnp.abs(half - expected[0][:, : TIME // 2]).max()) > 0.01
    assert float(jnp.abs(expected[0] - step).max()) > 0.01


@pytest.mark.parametrize("reverse", [False, True])
def test_exact_steps_are_counted_over_the_whole_sequence(x64, reverse):
    """x_t = b_t - 0.9 x_{t-1}, 12 steps a device: after 15 iterations one device is exact, and 3 steps of the next."""
    b, zero = 0.1 * drawn()[1], jnp.zeros((BATCH, FEATURES))

    def run(b, axis_name=None):
        def apply(x):
            after = b - 0.9 * before(x, zero, -2, reverse, axis_name)
            return after, largest(jnp.max(jnp.abs(after - x)), axis_name)

        return iterate(apply, jnp.zeros_like(b), 1e-12, most=15, reverse=reverse, axis_name=axis_name)[0]

    axes = P(None, "time")
    assert_close(spread(partial(run, axis_name="time"), mesh(time=4), axes, axes)(b), run(b), 1e-14)


def test_iterations_of_the_gradient_equal_those_of_one_device(x64):
    """Averages included, long before convergence."""
    _, params, x, c0 = layer_problem("recurrent")
    params["gates"]["recurrent_kernel"] *= 4
    states, _ = ranjax.solve(params, x, c0, gates="recurrent", solver="sequential")
    steps, earlier = Steps(content(params, x), gates_of_input(params, x)), before(states, c0, -2)
    gates = jax.nn.sigmoid(steps.z + gates_of_state(params, earlier, "tanh"))
    arrays = adjoint.jacobians_of(steps, earlier, gates, "tanh"), drawn()[1]

    def run(jacobians, g, axis_name=None):
        return adjoint.iterate_system(params, jacobians, g, FixedPoint(max_iterations=7), axis_name, reverse=True)[0]

    axes = P(None, "time")
    assert_close(spread(partial(run, axis_name="time"), mesh(time=4), (axes, axes), axes)(*arrays), run(*arrays))


def test_the_result_is_the_same_on_all_devices(x64):
    """One of the sequences takes more iterations than the others; all devices run and report as many."""
    _, params, x, c0 = layer_problem("recurrent")
    x = x.at[0].multiply(3.0)
    axes = P("batch", "time")
    function = partial(ranjax.solve, gates="recurrent", solver=FixedPoint(), axis_name="time")
    states, result = spread(function, mesh(time=4, batch=2), (P(), axes, P("batch")), (axes, P()))(params, x, c0)
    expected, alone = ranjax.solve(params, x, c0, gates="recurrent", solver="fixed_point")
    assert_close(states, expected)
    assert int(result.iterations) == int(alone.iterations)
    assert bool(result.converged)
    np.testing.assert_allclose(result.residual, alone.residual, rtol=0.5)


@pytest.mark.parametrize("gates", ["recurrent", "diagonal"])
def test_devices_iterate_together_without_check_vma(x64, gates):
    """One half of the batch takes more iterations; with `check_vma=False` no device may stop before the others."""
    _, params, x, c0 = layer_problem(gates)
    x = x.at[: BATCH // 2].multiply(0.01).at[BATCH // 2 :].multiply(4.0)
    axes = P("batch", "time")
    function = partial(ranjax.solve, gates=gates, solver=FixedPoint(), axis_name="time")
    over = jax.shard_map(
        function, mesh=mesh(time=4, batch=2), in_specs=(P(), axes, P("batch")), out_specs=(axes, P()), check_vma=False
    )
    states, result = jax.jit(over)(params, x, c0)
    expected, alone = ranjax.solve(params, x, c0, gates=gates, solver=FixedPoint())
    assert_close(states, expected, 1e-10)
    assert int(result.iterations) == int(alone.iterations)
    whole = partial(ranjax.solve, gates=gates, solver=FixedPoint())
    assert_close(gradient(over, params, x, c0), gradient(whole, params, x, c0), 1e-9)


def test_with_the_batch_spread_devices_iterate_separately(x64):
    """Each half has its own iterations, and the gradients are those of one device."""
    _, params, x, c0 = layer_problem("recurrent")
    x = x.at[: BATCH // 2].multiply(0.01).at[BATCH // 2 :].multiply(4.0)

    def run(params, x, c0):
        states, result = ranjax.solve(params, x, c0, gates="recurrent", solver=FixedPoint(chunk=30))
        return states, result.iterations[None]

    axes = P("batch")
    over = spread(run, mesh(batch=2), (P(), axes, axes), (axes, axes))
    assert "all-reduce" not in over.lower(params, x, c0).compile().as_text()
    states, iterations = over(params, x, c0)
    halves = [run(params, x[n : n + 2], c0[n : n + 2]) for n in (0, 2)]
    assert_close(states, jnp.concatenate([states for states, _ in halves]))
    assert list(iterations) == [int(count[0]) for _, count in halves]
    assert iterations[0] < iterations[1]
    assert_close(gradient(over, params, x, c0), gradient(run, params, x, c0), 1e-9)


@pytest.mark.parametrize("gates", ["recurrent", "diagonal"])
def test_a_state_that_is_not_finite_is_reported(x64, gates):
    _, params, x, c0 = layer_problem(gates)
    x = x.at[1, 20].set(jnp.nan)
    axes = P("batch", "time")
    found = {}
    for failure in ("sequential", "nan"):
        function = partial(ranjax.solve, gates=gates, solver=FixedPoint(on_failure=failure), axis_name="time")
        over = spread(function, mesh(time=4, batch=2), (P(), axes, P("batch")), (axes, P()))
        found[failure], result = over(params, x, c0)
        assert int(result.status) == 2
    expected, _ = ranjax.solve(params, x, c0, gates=gates, solver="sequential")
    np.testing.assert_array_equal(jnp.isnan(found["sequential"]), jnp.isnan(expected))
    assert bool(jnp.all(jnp.isnan(found["nan"])))


def test_after_a_failure_the_devices_scan_one_after_another(x64):
    _, params, x, c0 = layer_problem("recurrent")
    kernel = params["gates"]["recurrent_kernel"]
    params = params | {"gates": params["gates"] | {"recurrent_kernel": 16 * kernel}}
    settings = FixedPoint(max_iterations=2)
    axes = P("batch", "time")
    function = partial(ranjax.solve, gates="recurrent", solver=settings, axis_name="time")
    over = spread(function, mesh(time=4, batch=2), (P(), axes, P("batch")), (axes, P()))
    whole = partial(ranjax.solve, gates="recurrent", solver="sequential")
    states, result = over(params, x, c0)
    assert not bool(result.converged)
    assert_close(states, whole(params, x, c0)[0], 1e-10)
    found, expected = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a)[0])), (1, 2)))(params, x, c0) for f in (over, whole)
    )
    scale = max(float(jnp.max(jnp.abs(g))) for g in expected)
    assert_close(found, expected, 1e-9 * scale)


@pytest.mark.parametrize("gates", ["recurrent", "diagonal"])
def test_with_time_spread_there_are_no_chunks(x64, gates):
    _, params, x, c0 = layer_problem(gates)
    axes = P("batch", "time")
    function = partial(ranjax.solve, gates=gates, solver=FixedPoint(chunk=5), axis_name="time")
    over = spread(function, mesh(time=4, batch=2), (P(), axes, P("batch")), (axes, P()))
    assert_close(over(params, x, c0)[0], ranjax.solve(params, x, c0, gates=gates, solver="sequential")[0])


@pytest.mark.parametrize("gates", ["recurrent", "diagonal"])
def test_solve_adjoint_over_time_and_batch(x64, gates):
    _, params, x, c0 = layer_problem(gates)
    g, axes = drawn()[1], P("batch", "time")
    run = partial(solve_adjoint, gates=gates, solver=FixedPoint(on_failure="nan"))
    over = spread(partial(run, axis_name="time"), mesh(time=4, batch=2), (P(), axes, axes, P("batch")), (axes, P()))
    found, result = over(params, x, g, c0)
    expected, alone = run(params, x, g, c0)
    assert_close(found, expected)
    assert int(result.iterations) == int(alone.iterations)
    assert int(result.status) == 0
