"""Recurrences of several kinds, and the comparison of a solver with the sequential one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax.kernels import reference
from ranjax.kernels.base import Recurrence

directions = pytest.mark.parametrize("reverse", [False, True])
KINDS = ("linear", "reading ahead", "planes", "with constants")
kinds = pytest.mark.parametrize("kind", KINDS)
lengths_and_widths = pytest.mark.parametrize(("time", "features"), [(1, 3), (8, 128), (130, 5)])


def needs(platform, solve):
    absent = jax.default_backend() != platform
    return pytest.param(solve, marks=pytest.mark.skipif(absent, reason=f"needs a {platform.upper()}"))


def linear(carry, _, rows):
    (c,), (a, b) = carry, rows
    return (a * c + b,), (a * c + b,)


def reading_ahead(carry, _, rows):
    (c,), (a, b, following) = carry, rows
    return (a * c + b,), (c * following, c)


def with_constants(carry, constants, rows):
    """Not affine, with a carry of two arrays."""
    (c, total), (w,), (a, b) = carry, constants, rows
    c = a * jnp.tanh(jax.lax.broadcast_to_rank(w, c.ndim) * c) + b
    return (c, total + c), (c,)


def problem(kind, batch, time, features, dtype=jnp.float32):
    rng = np.random.default_rng(time)

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.uniform(-1, 1, shape), dtype)

    c, total, w, boundary = draw(batch, features), draw(batch, features), draw(features), draw(batch, features)
    a, b, states = (draw(batch, time, features, dtype=dtype) for _ in range(3))
    if kind == "linear":
        return Recurrence(linear, (c,), (a, b), ((1, jnp.float32),), affine=True)
    if kind == "with constants":
        return Recurrence(with_constants, (c, total), (a, b), ((0, jnp.float32),), constants=(w,))
    reading = Recurrence(
        reading_ahead, (c,), (a, b), ((0, jnp.float32), (1, jnp.bfloat16)), ahead=(states, boundary), affine=True
    )
    if kind == "planes":
        return reading._replace(arrays=(jnp.stack([a, b], axis=2),), outs=((0, jnp.float32),))
    return reading


def compare(solve, recurrence):
    """Carry and outputs of `solve` equal those of the sequential solver to rounding."""
    expected = reference.sequential(recurrence)
    for got, want in zip(jax.tree.leaves(jax.jit(lambda: solve(recurrence))()), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        eps = float(jnp.finfo(want.dtype).eps)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * eps * max(1, np.abs(want).max()))


def compare_narrow(solve):
    """Narrow arrays are computed with in the dtype of the carry."""
    recurrence = problem("linear", 1, 40, 3, jnp.bfloat16)
    (end,), (states,) = jax.jit(lambda: solve(recurrence))()
    h = np.asarray(recurrence.carry[0], np.float64)
    for t in range(40):
        a, b = (np.asarray(array[:, t], np.float64) for array in recurrence.arrays)
        h = a * h + b
        np.testing.assert_allclose(states[:, t], h, rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, states[:, -1], rtol=1e-6)


def lowered(solve, kind, batch, platform):
    """The program of a kernel, lowered for a platform that this machine need not have."""
    recurrence = problem(kind, batch, 300, 700)._replace(reverse=True)
    known = {"device_kind": "NVIDIA H100", "num_cores": None, "platform": "cuda"}
    fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]  # newer versions have more
    device = jax.sharding.AbstractDevice(**{name: known[name] for name in fields})
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda arrays: solve(recurrence._replace(arrays=arrays))).trace(recurrence.arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()
