"""Meshes of eight CPU devices, and problems that are spread over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ranjax

needs_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
BATCH, TIME, SIZE, FEATURES = 4, 48, 5, 6


def mesh(**sizes):
    count = int(np.prod(tuple(sizes.values())))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])


def spread(function, devices, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=devices, in_specs=in_specs, out_specs=out_specs))


def drawn(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    decay = jax.nn.sigmoid(jax.random.normal(keys[0], (BATCH, TIME, FEATURES), jnp.float64))
    inputs = jax.random.normal(keys[1], (BATCH, TIME, FEATURES), jnp.float64)
    return decay, inputs, jax.random.normal(keys[2], (BATCH, FEATURES), jnp.float64)


def gradient(solve, *arrays):
    return jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(solve(*arrays)[0])), (0, 1, 2)))(*arrays)


def assert_close(a, b, tolerance=1e-11):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), a, b)


def layer_problem(gates, activation="tanh", projection=None):
    cell = ranjax.RANCell(FEATURES, gates, activation, projection, param_dtype=jnp.float64)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (BATCH, TIME, SIZE), jnp.float64)
    c0 = jax.random.normal(keys[1], (BATCH, FEATURES), jnp.float64)
    leaves, tree = jax.tree.flatten(jax.eval_shape(cell.init, keys[2], c0, x[:, 0])["params"])
    leaves = [
        0.5 * jax.random.normal(k, p.shape, p.dtype) for k, p in zip(jax.random.split(keys[3], len(leaves)), leaves)
    ]
    return cell, jax.tree.unflatten(tree, leaves), x, c0
