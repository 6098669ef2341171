"""Every walk against the one in plain JAX: steps of several kinds, both directions, odd sizes, split time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ranjax.kernels import gpu, plain, tpu


def gpu_interpreted(*arguments, **options):
    return gpu.walk(*arguments, **options, interpret=True)


def gpu_split(*arguments, **options):
    """As on a chip that batch and features cannot fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SHORTEST", 4)
        return gpu.walk(*arguments, **options, interpret=True)


def tpu_interpreted(*arguments, **options):
    return tpu.walk(*arguments, **options, interpret=True)


def tpu_blocks(*arguments, **options):
    """As where a sequence is longer and wider than one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "TIME", 16)
        patch.setattr(tpu, "FEATURES", 128)
        return tpu.walk(*arguments, **options, interpret=True)


def tpu_simulated(*arguments, **options):
    """With the memories and semaphores of a TPU in the simulation."""
    return tpu.walk(*arguments, **options, interpret=pltpu.InterpretParams())


WALKS = (plain.associative, plain.chunked, gpu_interpreted, gpu_split, tpu_interpreted, tpu_blocks, tpu_simulated)


def linear(carry, _, rows):
    (c,), (a, b) = carry, rows
    return (a * c + b,), (a * c + b,)


def reading_ahead(carry, _, rows):
    (c,), (a, b, following) = carry, rows
    return (a * c + b,), (c * following, c)


def with_constants(carry, constants, rows):
    """Not affine, and a carry of two arrays."""
    (c, total), (w,), (a, b) = carry, constants, rows
    c = a * jnp.tanh(w * c) + b
    return (c, total + c), (c,)


# step, arrays of the carry, constants, shapes of the arrays between time and features, outputs, reads ahead, affine
KINDS = {
    "linear": (linear, 1, 0, ((), ()), ((1, jnp.float32),), False, True),
    "reading ahead": (reading_ahead, 1, 0, ((), ()), ((0, jnp.float32), (1, jnp.bfloat16)), True, True),
    "planes": (reading_ahead, 1, 0, ((2,),), ((0, jnp.float32),), True, True),
    "with constants": (with_constants, 2, 1, ((), ()), ((0, jnp.float32),), False, False),
}


def problem(carries, constants, planes, ahead, batch, time, features, dtype=jnp.float32):
    rng = np.random.default_rng(time)

    def draw(*shape):
        return jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)

    return (
        tuple(draw(batch, features) for _ in range(carries)),
        tuple(draw(features) for _ in range(constants)),
        tuple(draw(batch, time, *n, features).astype(dtype) for n in planes),
        (draw(batch, time, features), draw(batch, features)) if ahead else None,
    )


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
@pytest.mark.parametrize(
    ("kind", "backwards"),
    [("linear", False), ("reading ahead", False), ("reading ahead", True), ("planes", True), ("with constants", False)],
)
def test_equals_the_sequential_walk(walk, backwards, kind):
    compare(walk, backwards, kind, 19, 130)


@pytest.mark.quick
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
@pytest.mark.parametrize(("time", "features"), [(1, 3), (130, 5)])
def test_lengths_and_widths(walk, time, features):
    compare(walk, True, "reading ahead", time, features)


def compare(walk, backwards, kind, time, features):
    step, carries, constants, planes, outs, ahead, affine = KINDS[kind]
    *operands, ahead = problem(carries, constants, planes, ahead, 2, time, features)

    def run(walk):
        return jax.jit(lambda: walk(step, *operands, outs, ahead=ahead, backwards=backwards, affine=affine))()

    expected = run(plain.sequential)
    for got, want in zip(jax.tree.leaves(run(walk)), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        eps = float(jnp.finfo(want.dtype).eps)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * eps * max(1, np.abs(want).max()))


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
def test_narrow_arrays_are_walked_in_the_dtype_of_the_carry(walk):
    step, carries, constants, planes, outs, _, affine = KINDS["linear"]
    carry, constants, arrays, _ = problem(carries, constants, planes, False, 1, 40, 3, jnp.bfloat16)
    (end,), (states,) = walk(step, carry, constants, arrays, outs, affine=affine)
    h = np.asarray(carry[0], np.float64)
    for t in range(40):
        h = np.asarray(arrays[0][:, t], np.float64) * h + np.asarray(arrays[1][:, t], np.float64)
        np.testing.assert_allclose(states[:, t], h, rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, states[:, -1], rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("walk", "platform", "call"), [(tpu.walk, "tpu", "tpu_custom_call"), (gpu.walk, "cuda", "triton")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_lowers_on_a_machine_without_the_device(walk, platform, call, kind):
    step, carries, constants, planes, outs, ahead, affine = KINDS[kind]
    *operands, ahead = problem(carries, constants, planes, ahead, 2, 300, 700)
    f = jax.jit(lambda *operands: walk(step, *operands[:3], outs, ahead=operands[3], backwards=True, affine=affine))
    traced = f.trace(*operands, ahead)
    try:
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this version of jax lowers Triton kernels only for a GPU that it finds")
    assert call in text


def test_time_is_split_only_where_channels_are_few():
    assert gpu.segments(channels=8 * 512, time=1024) == 16
    assert gpu.segments(channels=8 * 512, time=100) == 1
    assert gpu.segments(channels=256 * 1024, time=4096) == 1
