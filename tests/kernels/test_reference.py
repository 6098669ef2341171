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
