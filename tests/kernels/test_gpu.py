"""The GPU kernel, interpreted where there is no GPU: equal to the sequential solver, with segments and with lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import compare, compare_narrow, directions, kinds, lengths_and_widths, linear, lowered, needs, problem

from ranjax import linear_recurrence
from ranjax.kernels import gpu
from ranjax.kernels.base import Recurrence


def gpu_split(recurrence):
    """With segments, as on a chip that batch and features do not fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SHORTEST", 4)
        return gpu.run(recurrence, interpret=True)


def gpu_lanes(recurrence):
    """With lanes, without segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "FEW", 0)
        return gpu.run(recurrence, interpret=True)


def on_a_gpu(recurrence):
    return gpu.run(recurrence)


solvers = pytest.mark.parametrize(
    "solve", [gpu_lanes, gpu_split, needs("gpu", on_a_gpu)], ids=lambda solve: solve.__name__
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
@pytest.mark.parametrize(("batch", "bits"), [(2, 32), (4, 32), (4, 64)])  # of integers; with segments, with lanes
def test_lowers_for_cuda_on_any_machine(kind, batch, bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    text = lowered(gpu.run, kind, batch, "cuda")
    assert "triton" in text
    assert ("barrier" in text) == (batch == 4 and kind != "with constants")


@pytest.mark.parametrize(("features", "kernel"), [(2**10, True), (2**11, False)])
def test_arrays_beyond_32_bit_indices_are_solved_in_chunks(features, kernel):
    array, c = jax.ShapeDtypeStruct((1, 2**20, features), jnp.float32), jax.ShapeDtypeStruct((1, features), jnp.float32)
    recurrence = Recurrence(linear, (), (), ((1, jnp.float32),), affine=True)
    traced = jax.make_jaxpr(lambda c, a, b: gpu.run(recurrence._replace(carry=(c,), arrays=(a, b))))(c, array, array)
    assert ("pallas_call" in str(traced)) == kernel


@pytest.mark.parametrize(
    ("batch", "time", "features", "tiling"),
    [
        (8, 1024, 512, (32, 16, 1)),
        (16, 1024, 1024, (32, 4, 1)),
        (8, 10, 512, (64, 1, 1)),
        (8, 35, 512, (32, 2, 1)),
        (1, 65536, 64, (64, 1, 1024)),
        (256, 4096, 1024, (64, 1, 1)),
        (64, 1024, 1024, (64, 1, 1)),
        (1, 255, 64, (32, 16, 1)),
        (1, 256, 64, (64, 1, 4)),
    ],
)
def test_tiling_by_shape(monkeypatch, batch, time, features, tiling):
    monkeypatch.setattr(gpu, "LOADS", 16)
    monkeypatch.setattr(gpu, "LANES", 16)
    array = jax.ShapeDtypeStruct((batch, time, features), jnp.float32)
    recurrence = Recurrence(linear, (), (array, array), (), affine=True)
    assert gpu.Tiling.of(recurrence) == tiling
    assert gpu.Tiling.of(recurrence._replace(affine=False)) == (64, 1, 1)


@pytest.mark.shipped
@pytest.mark.parametrize(("time", "tiling"), [(65, (32, 4, 1)), (200, (32, 8, 1))])
def test_the_shipped_tiling_interpreted(time, tiling):
    recurrence = problem("linear", 2, time, 40)
    assert (gpu.LOADS, gpu.LANES) == (16, 16)
    assert gpu.Tiling.of(recurrence) == tiling
    compare(lambda recurrence: gpu.run(recurrence, interpret=True), recurrence)


def test_works_where_jit_is_disabled():
    a = jnp.full((1, 9, 2), 0.5)
    expected = linear_recurrence(a, a, solver="sequential")
    with jax.disable_jit():
        np.testing.assert_allclose(linear_recurrence(a, a, solver="pallas"), expected, rtol=1e-6)
