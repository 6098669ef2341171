"""Every walk against the one in plain JAX: steps of several kinds, both directions, odd sizes, split time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ranjax.kernels import gpu, tpu
from ranjax.kernels import reference as plain
from ranjax.kernels.base import Walk


def gpu_split(walk):
    """As on a chip that batch and features cannot fill, lanes or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SHORTEST", 4)
        return gpu.solve(walk, interpret=True)


def gpu_lanes(walk):
    """Without segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "FEW", 0)
        return gpu.solve(walk, interpret=True)


def tpu_interpreted(walk):
    return tpu.solve(walk, interpret=True)


def tpu_blocks(walk):
    """As where a sequence is longer and wider than one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TIME", 16)
        patch.setattr(tpu, "FEATURES", 128)
        return tpu.solve(walk, interpret=True)


def tpu_simulated(walk):
    """With the memories and semaphores of a TPU in the simulation, which visits parallel blocks in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TIME", 16)
        return tpu.solve(walk, interpret=pltpu.InterpretParams())


def on_a_gpu(walk):
    return gpu.solve(walk)


def on_a_tpu(walk):
    return tpu.solve(walk)


def needs(platform, solve):
    absent = jax.default_backend() != platform
    return pytest.param(solve, marks=pytest.mark.skipif(absent, reason=f"needs a {platform.upper()}"))


SOLVERS = (plain.associative, plain.chunked, gpu_lanes, gpu_split, tpu_interpreted, tpu_blocks, tpu_simulated)
SOLVERS += (needs("gpu", on_a_gpu), needs("tpu", on_a_tpu))
solvers = pytest.mark.parametrize("solve", SOLVERS, ids=lambda solve: solve.__name__)
directions = pytest.mark.parametrize("backwards", [False, True])


def linear(carry, _, rows):
    (c,), (a, b) = carry, rows
    return (a * c + b,), (a * c + b,)


def reading_ahead(carry, _, rows):
    (c,), (a, b, following) = carry, rows
    return (a * c + b,), (c * following, c)


def with_constants(carry, constants, rows):
    """Not affine, and a carry of two arrays."""
    (c, total), (w,), (a, b) = carry, constants, rows
    c = a * jnp.tanh(jax.lax.broadcast_to_rank(w, c.ndim) * c) + b
    return (c, total + c), (c,)


KINDS = ("linear", "reading ahead", "planes", "with constants")


def problem(kind, batch, time, features, dtype=jnp.float32):
    rng = np.random.default_rng(time)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.uniform(-1, 1, shape), dtype)

    c, total, w, edge = draw(batch, features), draw(batch, features), draw(features), draw(batch, features)
    a, b, states = (draw(batch, time, features, dtype=dtype) for _ in range(3))
    if kind == "linear":
        return Walk(linear, (c,), (a, b), ((1, jnp.float32),), affine=True)
    if kind == "with constants":
        return Walk(with_constants, (c, total), (a, b), ((0, jnp.float32),), constants=(w,))
    reading = Walk(
        reading_ahead, (c,), (a, b), ((0, jnp.float32), (1, jnp.bfloat16)), ahead=(states, edge), affine=True
    )
    if kind == "planes":
        return reading._replace(arrays=(jnp.stack([a, b], axis=2),), outs=((0, jnp.float32),))
    return reading


@solvers
@directions
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_sequential_walk(solve, backwards, kind):
    compare(solve, problem(kind, 2, 19, 130)._replace(backwards=backwards))


@pytest.mark.quick
@solvers
@directions
@pytest.mark.parametrize(("time", "features"), [(1, 3), (8, 128), (130, 5)])
def test_lengths_and_widths(solve, backwards, time, features):
    compare(solve, problem("reading ahead", 2, time, features)._replace(backwards=backwards))


def compare(solve, walk):
    expected = plain.sequential(walk)
    for got, want in zip(jax.tree.leaves(jax.jit(lambda: solve(walk))()), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        eps = float(jnp.finfo(want.dtype).eps)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * eps * max(1, np.abs(want).max()))


@solvers
def test_narrow_arrays_are_walked_in_the_dtype_of_the_carry(solve):
    walk = problem("linear", 1, 40, 3, jnp.bfloat16)
    (end,), (states,) = jax.jit(lambda: solve(walk))()
    h = np.asarray(walk.carry[0], np.float64)
    for t in range(40):
        a, b = (np.asarray(array[:, t], np.float64) for array in walk.arrays)
        h = a * h + b
        np.testing.assert_allclose(states[:, t], h, rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, states[:, -1], rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("solve", "platform", "call"), [(tpu.solve, "tpu", "tpu_custom_call"), (gpu.solve, "cuda", "triton")]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "bits"), [(2, 32), (4, 32), (4, 64)])  # of integers; on a GPU: segments, lanes
def test_lowers_on_a_machine_without_the_device(solve, platform, call, kind, batch, bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    walk = problem(kind, batch, 300, 700)._replace(backwards=True)
    known = {"device_kind": "NVIDIA H100", "num_cores": None, "platform": "cuda"}
    fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]  # newer versions have more
    device = jax.sharding.AbstractDevice(**{name: known[name] for name in fields})
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda arrays: solve(walk._replace(arrays=arrays))).trace(walk.arrays)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert call in lowered
    assert ("barrier" in lowered) == (platform == "cuda" and batch == 4 and walk.affine)


@pytest.mark.parametrize(("solve", "features", "kernel"), [(gpu.solve, 2**10, True), (gpu.solve, 2**11, False)])
def test_the_kernel_of_a_gpu_counts_in_32_bits(solve, features, kernel):
    array, c = jax.ShapeDtypeStruct((1, 2**20, features), jnp.float32), jax.ShapeDtypeStruct((1, features), jnp.float32)
    walk = Walk(linear, (), (), ((1, jnp.float32),), affine=True)
    traced = jax.make_jaxpr(lambda c, a, b: solve(walk._replace(carry=(c,), arrays=(a, b))))(c, array, array)
    assert ("pallas_call" in str(traced)) == kernel


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_kernel_of_a_tpu_has_no_float64(x64, dtype):
    walk = problem("linear", 1, 8, 8)._replace(carry=(jnp.zeros((1, 8), dtype),))
    assert ("pallas_call" in str(jax.make_jaxpr(lambda: tpu.solve(walk))())) == (dtype == jnp.float32)


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
def test_how_a_gpu_is_filled(monkeypatch, batch, time, features, tiling):
    monkeypatch.setattr(gpu, "LOADS", 16)
    monkeypatch.setattr(gpu, "LANES", 16)
    array = jax.ShapeDtypeStruct((batch, time, features), jnp.float32)
    walk = Walk(linear, (), (array, array), (), affine=True)
    assert gpu.Tiling.of(walk) == tiling
    assert gpu.Tiling.of(walk._replace(affine=False)) == (64, 1, 1)
