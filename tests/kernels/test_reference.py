"""The solvers in plain JAX equal the sequential one: steps of several kinds, both directions, odd sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import compare, compare_narrow, directions, kinds, lengths_and_widths, linear, problem

from ranjax.kernels import reference
from ranjax.kernels.base import Recurrence

solvers = pytest.mark.parametrize("solve", [reference.associative, reference.chunked], ids=lambda solve: solve.__name__)


@solvers
@directions
@kinds
def test_equals_the_sequential_solver(solve, reverse, kind):
    compare(solve, problem(kind, 2, 19, 130)._replace(reverse=reverse))


@pytest.mark.quick
@solvers
@directions
@lengths_and_widths
def test_lengths_and_widths(solve, reverse, time, features):
    compare(solve, problem("reading ahead", 2, time, features)._replace(reverse=reverse))


@solvers
def test_narrow_arrays_in_the_dtype_of_the_carry(solve):
    compare_narrow(solve)


@pytest.mark.shipped
@directions
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_chunks_of_the_shipped_length(reverse, time):
    assert reference.CHUNK == 64
    compare(reference.chunked, problem("reading ahead", 2, time, 3)._replace(reverse=reverse))


def test_sequential_solver_equals_a_loop():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3))
    recurrence = Recurrence(linear, (jnp.asarray(c),), (jnp.asarray(a), jnp.asarray(b)), ((1, jnp.float32),))
    (end,), (states,) = reference.sequential(recurrence)
    for t in range(9):
        c = a[:, t] * c + b[:, t]
        np.testing.assert_allclose(states[:, t], c, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end, c, rtol=1e-4, atol=1e-5)


@pytest.mark.quick
@pytest.mark.shipped
@pytest.mark.parametrize("solve", [reference.sequential, reference.chunked], ids=lambda solve: solve.__name__)
@directions
def test_errors_do_not_grow_with_the_length(solve, reverse):
    """Decays of 1 and inputs of one sign: plain sums are off by 4e-5 after 10,000 steps and 4e-4 after 100,000."""
    for time in (reference.LONG, 100_000):
        ones, inputs = jnp.ones((1, time, 1)), jnp.full((1, time, 1), 1e-3)
        recurrence = Recurrence(linear, (jnp.zeros((1, 1)),), (ones, inputs), ((1, jnp.float32),), affine=True)
        (end,), (states,) = solve(recurrence._replace(reverse=reverse))
        expected = float(np.float32(1e-3)) * time
        assert abs(float(end[0, 0]) - expected) / expected < (1e-7 if solve is reference.sequential else 2e-5)
        np.testing.assert_allclose(states[0, 0 if reverse else -1], end[0], rtol=2e-6)


def test_compensated_sums_have_the_values_of_plain_ones():
    for kind in ("linear", "reading ahead", "planes"):
        recurrence = problem(kind, 2, 19, 5)
        expected = reference.sequential(recurrence)
        with pytest.MonkeyPatch.context() as context:
            context.setattr(reference, "LONG", 1)
            compare_all(reference.sequential(recurrence), expected)


def compare_all(found, expected):
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-5)
