"""Kernels on sharded arrays, under `jit` alone: nothing is gathered. Interpreted, on eight CPU devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_close, layer_problem, mesh, needs_devices

import ranjax
from ranjax import linear_recurrence
from ranjax.kernels.base import Recurrence
from ranjax.kernels.partition import partitioned
from ranjax.kernels.reference import sequential

COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|collective-permute|all-to-all)\(")
recurrence = partial(linear_recurrence, solver="pallas")


def arrays(*shape):
    decay, inputs, initial = (np.random.default_rng(n).normal(size=shape).astype(np.float32) for n in range(3))
    return 1 / (1 + np.exp(-decay)), inputs, initial[..., 0, :]  # decays below 1


def derivatives(f):
    """States, and what their derivatives in each array are, as one function."""

    def both(*arrays):
        states, chain = jax.vjp(f, *arrays)
        return states, chain(jnp.cos(states))

    return both


@needs_devices
@pytest.mark.quick
def test_a_kernel_is_split_along_batch_and_features():
    """Without a rule XLA gathers its operands."""
    devices, given = mesh(batch=4, features=2), arrays(4, 9, 8)
    split = P("batch", None, "features"), P("batch", None, "features"), P("batch", "features")
    placed = [jax.device_put(a, NamedSharding(devices, spec)) for a, spec in zip(given, split)]
    compiled = jax.jit(derivatives(recurrence)).lower(*placed).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    states, gradients = compiled(*placed)
    assert states.sharding.is_equivalent_to(placed[1].sharding, states.ndim)
    assert_close((states, gradients), jax.jit(derivatives(linear_recurrence))(*given), 1e-5)


@needs_devices
@pytest.mark.parametrize("gates", ["input", "diagonal"])
def test_the_kernels_of_a_layer_are_split(gates):
    """Steps that read several planes and constants too; only the gradients of the weights are summed."""
    cell, params, x, _ = layer_problem(gates)
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    layer = ranjax.RAN(ranjax.RANCell(cell.features, gates), "pallas")

    def gradient(params, x):
        return jax.grad(lambda p, x: jnp.mean(jnp.sin(layer.apply({"params": {"cell": p}}, x))), (0, 1))(params, x)

    over = jax.device_put(x, NamedSharding(mesh(batch=4), P("batch")))
    compiled = jax.jit(gradient).lower(params, over)
    assert set(COLLECTIVE.findall(compiled.compile().as_text())) == {"all-reduce"}
    assert_close(jax.jit(gradient)(params, over), jax.jit(gradient)(params, x), 1e-5)


@needs_devices
def test_a_kernel_gets_the_whole_of_time():
    """XLA gathers what is sharded over time, and the answer is right."""
    given = arrays(2, 8, 3)
    over = NamedSharding(mesh(time=4), P(None, "time"))
    placed = *(jax.device_put(a, over) for a in given[:2]), given[2]
    assert_close(jax.jit(recurrence)(*placed), jax.jit(linear_recurrence)(*given), 1e-6)


@needs_devices
def test_a_mesh_that_is_named_in_part_is_refused():
    """XLA does not say there how the other axes are split."""
    given, spec = arrays(4, 9, 8), P("batch")
    over = jax.shard_map(
        recurrence, mesh=mesh(batch=2, features=2), in_specs=spec, out_specs=spec, axis_names={"batch"}, check_vma=False
    )
    with pytest.raises(Exception, match="name all of them in its `axis_names`"):
        jax.jit(over)(*given)


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, None, 0), (None, 0, None)])
def test_vmap_over_a_kernel(axes):
    """Arrays that are mapped and others that are not."""
    given = [a if axis is None else np.stack([a, 2 * a, -a], axis) for a, axis in zip(arrays(2, 5, 3), axes)]
    over, expected = (jax.jit(jax.vmap(derivatives(f), axes, (0, 0)))(*given) for f in (recurrence, linear_recurrence))
    assert_close(over, expected, 1e-5)


def test_vmap_over_a_constant():
    """The batch cannot hold what differs by constants: the solver itself is mapped."""
    _, inputs, initial = arrays(2, 5, 3)

    def decays(slope):
        def step(carry, constants, rows):
            c = constants[0][None] * carry[0] + rows[0]
            return (c,), (c,)

        given = Recurrence(step, (jnp.asarray(initial),), (jnp.asarray(inputs),), ((0, jnp.float32),), (slope,))
        return partitioned(sequential)(given)[1][0]

    slopes = jnp.array([[0.5, 0.9, -0.2], [1.0, 0.0, 0.3]])
    assert_close(jax.jit(jax.vmap(decays))(slopes), jnp.stack([decays(slope) for slope in slopes]), 1e-6)
