"""Sequences whose time is spread over the devices of a mesh axis, inside `jax.shard_map`.

Every device has as many consecutive steps as the others, in the order of its index on the axis. `axis_name` None stands
for a sequence that is whole, here and wherever the name is an argument.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array, lax


def varying_as(array: Array, others: Iterable[Array]) -> Array:
    """`array`, of a type that tells `shard_map` it may differ between devices wherever one of the others does."""
    for other in others:
        if not _axes(other) <= _axes(array):
            array = jnp.where(False, other[(0,) * other.ndim].astype(array.dtype), array)
    return array


def _axes(array: Array) -> frozenset[str]:
    """The mesh axes that an array may differ along; JAX has had two names for them."""
    kind = jax.typeof(array)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def before(states: Array, initial: Array, axis: int, reverse: bool = False, axis_name: str | None = None) -> Array:
    """The state that each step starts from, on the axis of time; in reverse that of the step after.

    Args:
      states: of all steps.
      initial: that before the first one (in reverse, after the last one) of the whole sequence.
    """
    size = states.shape[axis]
    edge = jnp.expand_dims(initial, axis)
    if axis_name is not None:
        last = lax.slice_in_dim(states, 0, 1, axis=axis) if reverse else lax.slice_in_dim(states, size - 1, size, axis=axis)
        edge = jnp.where(_first(reverse, axis_name), edge, _passed_on(last, reverse, axis_name))
    if reverse:
        return jnp.concatenate([lax.slice_in_dim(states, 1, size, axis=axis), edge], axis)
    return jnp.concatenate([edge, lax.slice_in_dim(states, 0, size - 1, axis=axis)], axis)


def at_the_edge(value: Array, reverse: bool, axis_name: str | None) -> Array:
    """`value` on the device where the sequence begins (in reverse, ends), 0 on the others."""
    return value if axis_name is None else jnp.where(_first(reverse, axis_name), value, 0)


def carry_in(product: Array, last: Array, initial: Array, reverse: bool, axis_name: str) -> Array:
    """The carry that a device's part of an affine walk starts from.

    Args:
      product: of the walk's slopes over this device's steps.
      last: the carry that this device's part ends with when it starts from 0.
      initial: the carry that the whole starts from.
    """
    products, lasts = lax.all_gather((product, last), axis_name)
    _, starts = lax.scan(lambda c, p: (p[0] * c + p[1], c), varying_as(initial, (lasts,)), (products, lasts), reverse=reverse)
    return lax.dynamic_index_in_dim(starts, lax.axis_index(axis_name), keepdims=False)


def _first(reverse: bool, axis_name: str) -> Array:
    return lax.axis_index(axis_name) == (lax.axis_size(axis_name) - 1 if reverse else 0)


def _passed_on(value: Array, reverse: bool, axis_name: str) -> Array:
    """What the device before has (in reverse, the one after); anything on the first one."""
    size = lax.axis_size(axis_name)
    return lax.ppermute(value, axis_name, [(k, (k + (-1 if reverse else 1)) % size) for k in range(size)])
