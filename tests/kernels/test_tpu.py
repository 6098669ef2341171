"""The TPU kernel, interpreted or simulated where there is no TPU: equal to the sequential solver."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from recurrences import compare, compare_narrow, directions, kinds, lengths_and_widths, lowered, needs, problem

from ranjax.kernels import tpu


def tpu_interpreted(recurrence):
    return tpu.run(recurrence, interpret=True)


def tpu_blocks(recurrence):
    """A sequence longer and wider than one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TIME", 16)
        patch.setattr(tpu, "FEATURES", 128)
        return tpu.run(recurrence, interpret=True)


def tpu_simulated(recurrence):
    """With simulated memories and semaphores of a TPU; parallel blocks run in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TIME", 16)
        return tpu.run(recurrence, interpret=pltpu.InterpretParams())


def on_a_tpu(recurrence):
    return tpu.run(recurrence)


solvers = pytest.mark.parametrize(
    "solve", [tpu_interpreted, tpu_blocks, tpu_simulated, needs("tpu", on_a_tpu)], ids=lambda solve: solve.__name__
)


@solvers
@directions
@kinds
def test_equals_the_sequential_solver(solve, reverse, kind):
    compare(solve, problem(kind, 2, 19, 130)._replace(reverse=reverse))


@pytest.mark.quick
@solvers
@directions
@lengths_and_widths
def test_lengths_and_widths_of_the_kernel(solve, reverse, time, features):
    compare(solve, problem("reading ahead", 2, time, features)._replace(reverse=reverse))


@solvers
def test_narrow_arrays_in_the_dtype_of_the_carry_of_the_kernel(solve):
    compare_narrow(solve)


@pytest.mark.quick
@kinds
@pytest.mark.parametrize(("batch", "bits"), [(2, 32), (4, 32), (4, 64)])  # bits of integers
def test_lowers_for_tpu_on_any_machine(kind, batch, bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    text = lowered(tpu.run, kind, batch, "tpu")
    assert "tpu_custom_call" in text
    assert "barrier" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_float64_is_solved_in_chunks(x64, dtype):
    recurrence = problem("linear", 1, 8, 8)._replace(carry=(jnp.zeros((1, 8), dtype),))
    assert ("pallas_call" in str(jax.make_jaxpr(lambda: tpu.run(recurrence))())) == (dtype == jnp.float32)
