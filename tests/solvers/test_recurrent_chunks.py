"""Long sequences solved chunk by chunk: states, gradients, memory, and the result of all chunks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import FEATURES, problem, solve

import ranjax
from ranjax import FixedPoint, RANCell
from ranjax.solvers.result import Status


def test_chunks_are_solved_one_after_another(x64):
    """As few chunks as possible, all of one length but for the last."""
    params, x, c0 = problem(64, scale=2)
    one = FixedPoint(chunk=22, on_failure="nan")
    states, result = solve(params, x, c0, solver=one)
    c, iterations = c0, []
    for part in (x[:, :22], x[:, 22:44], x[:, 44:]):
        some, its = solve(params, part, c, solver=one)
        c = some[:, -1]
        iterations.append(int(its.iterations))
    np.testing.assert_allclose(states[:, 44:], some, rtol=0, atol=1e-13)
    assert int(result.iterations) == max(iterations) < int(solve(params, x, c0)[1].iterations)

    broken = x.at[:, 30].set(jnp.nan)
    states, result = solve(params, broken, c0, solver=one)
    assert not bool(result.converged)
    np.testing.assert_array_equal(jnp.isnan(states).any((0, 2)), np.arange(64) >= 22)


def test_the_result_is_of_the_worst_chunk():
    """Of two chunks only the first fails."""
    cell, x = RANCell(6), np.random.default_rng(0).normal(size=(1, 40, 5)).astype(np.float32)
    x[:, 20:] *= 0.01
    params = cell.init(jax.random.key(0), jnp.zeros((1, 6)), x[:, 0])["params"]
    params["gates"]["bias"] -= 3.0

    def results(**options):
        solve = partial(ranjax.solve, params, gates="recurrent", solver=FixedPoint(chunk=20, **options))
        c, first = solve(x[:, :20])
        return first, solve(x[:, 20:], c[:, -1])[1], solve(x)[1]

    first, second, _ = results()
    assert int(second.iterations) < int(first.iterations)
    first, second, whole = results(max_iterations=int(second.iterations))
    assert (bool(first.converged), bool(second.converged), bool(whole.converged)) == (False, True, False)
    assert int(whole.status) == Status.MAX_ITERATIONS
    assert float(whole.residual) == pytest.approx(float(first.residual), rel=1e-2)


def test_memory_does_not_grow_with_the_iterations():
    params, x, c0 = problem(512, dtype=jnp.float32)
    features = FEATURES

    def temporaries(solver):
        of = jax.jit(jax.grad(lambda *a: jnp.sum(solve(*a, solver=solver)[0] ** 2), (0, 1, 2)))
        size = of.lower(params, x, c0).compile().memory_analysis().temp_size_in_bytes
        return size / (x.shape[0] * x.shape[1] * features * 4)

    few, many = (temporaries(FixedPoint(max_iterations=n)) for n in (2, 200))
    assert few == many < 22  # 21 with JAX 0.12, 19 with 0.10


@pytest.mark.parametrize("time", [8192, 7000])
def test_chunks_need_a_dozen_arrays(time):
    """Inputs, gradients and temporaries of the gradient in all, in arrays of the states' size."""
    x, c0 = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, time, FEATURES), (2, FEATURES)))
    params = jax.eval_shape(RANCell(FEATURES).init, jax.random.key(0), c0, c0)["params"]
    of = jax.jit(jax.grad(lambda *a: jnp.sum(solve(*a)[0] ** 2), (0, 1, 2)))
    used = of.lower(params, x, c0).compile().memory_analysis()
    total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    assert total / (2 * time * FEATURES * 4) <= 12


def test_a_gradient_that_vanishes_below_the_smallest_number_converges():
    """The cotangents of early chunks are flushed to 0."""
    params, x, c0 = problem(9000, dtype=jnp.float32)
    params["gates"]["bias"] += jnp.array([0.0, 1.5])[:, None]

    def last(x):
        return jnp.sum(solve(params, x, c0, solver=FixedPoint(chunk=500, on_failure="nan"))[0][:, -1] ** 2)

    gradient = jax.jit(jax.grad(last))(x)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    size = jnp.max(jnp.abs(gradient).reshape(2, 18, -1), axis=(0, 2))
    assert float(size[0]) < 1e-37
    assert 1e-38 < float(jnp.min(jnp.where(size > 0, size, 1))) < 1e-25  # one chunk is in between


def test_gradients_of_chunks_are_summed_in_the_dtype_of_the_states():
    params, x, c0 = problem(512, dtype=jnp.float32)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def of_weights(solver):
        def loss(p):
            return jnp.sum(jnp.sin(solve(p, x, c0, solver=solver)[0]))

        return jax.jit(jax.grad(loss))(params)["gates"]["recurrent_kernel"]

    few, many = (of_weights(FixedPoint(chunk=n)).astype(float) for n in (256, 4))
    np.testing.assert_allclose(many, few, rtol=2**-7, atol=1e-4)  # rounded once
