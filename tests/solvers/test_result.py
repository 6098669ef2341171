"""The result of a solver: status, message, and its way through `jit` and `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import problem, solve

from ranjax import FixedPoint
from ranjax.solvers.result import Result, Status

pytestmark = pytest.mark.core


def result_of(status, iterations=100, residual=3e-3):
    return Result(jnp.int32(status), jnp.int32(iterations), jnp.float32(residual))


def test_statuses_are_ordered():
    assert [int(status) for status in Status] == [0, 1, 2]
    assert list(Status) == [Status.SUCCESS, Status.MAX_ITERATIONS, Status.NOT_FINITE]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (result_of(0, 0, 0.0), "Solved without iterating."),
        (result_of(0, 12, 3e-7), "Converged within 12 iterations, with a relative residual of at most 3.0e-07."),
        (
            result_of(1),
            "Not converged: 100 iterations (`max_iterations`) ended with a relative residual of 3.0e-03, above the "
            "tolerance. With on_failure='sequential' (the default) the returned values come from the sequential scan; "
            "with on_failure='nan' they are NaN. Raise `max_iterations` or the tolerance, lower `chunk`, or use "
            "solver='sequential'.",
        ),
        (
            result_of(2, 1, np.nan),
            "Not converged: a residual became NaN or infinite, within 1 iteration. With on_failure='sequential' (the "
            "default) the returned values come from the sequential scan; with on_failure='nan' they are NaN. Check "
            "inputs and parameters for NaN and infinity. If all are finite, the iteration overflowed, or an earlier "
            "chunk failed with on_failure='nan': use solver='sequential'.",
        ),
    ],
)
def test_message(result, message):
    assert result.message == message


def test_the_message_of_several_results_is_that_of_the_worst():
    results = jax.tree.map(lambda *a: jnp.stack(a), result_of(0, 12, 3e-7), result_of(1), result_of(0, 7, 1e-7))
    assert results.message.startswith("1 of 3 solves: Not converged: 100 iterations")
    np.testing.assert_array_equal(results.converged, [True, False, True])


def test_inside_jit_converged_is_an_array_and_there_is_no_message():
    @jax.jit
    def decided(result):
        with pytest.raises(TypeError, match="`message` needs concrete values"):
            _ = result.message
        return jnp.where(result.converged, 1, 0)

    assert int(decided(result_of(0))) == 1
    assert int(decided(result_of(2))) == 0


@pytest.mark.parametrize("solver", ["sequential", "fixed_point", FixedPoint(chunk=12)], ids=str)
def test_the_result_under_jit_grad_and_vmap(solver, x64):
    params, x, c0 = problem(30)

    def loss(x):
        states, result = solve(params, x, c0, solver=solver)
        return jnp.sum(jnp.sin(states)), result

    (_, expected), _ = jax.value_and_grad(loss, has_aux=True)(x)
    (_, result), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    _, results = jax.vmap(loss)(jnp.stack([x, x]))
    for found in (expected, result, jax.tree.map(lambda a: a[1], results)):
        assert (found.status.dtype, found.iterations.dtype) == (jnp.int32, jnp.int32)
        assert int(found.status) == Status.SUCCESS
        assert (int(found.iterations) == 0) == (solver == "sequential")
        assert int(found.iterations) == int(expected.iterations)
