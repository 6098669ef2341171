"""Sequences whose time is spread over the devices of a mesh axis, inside `jax.shard_map`.

Every device holds the same number of consecutive steps, in the order of its index on the axis. Wherever `axis_name` is
an argument, None means that every device holds the whole sequence.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec


def varying_as(array: Array, others: Iterable[Array]) -> Array:
    """`array` typed as varying over every mesh axis that one of `others` varies over, for `shard_map`."""
    missing = frozenset[str]().union(*map(varying_axes, others)) - varying_axes(array)
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, tuple(sorted(missing)), to="varying")
    return lax.pvary(array, tuple(sorted(missing)))  # pyright: ignore[reportAttributeAccessIssue]  # before JAX 0.9


def alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each typed as varying over every mesh axis that one of them varies over."""
    return tuple(varying_as(array, arrays) for array in arrays)


def varying_axes(array: Array) -> frozenset[str]:
    """The mesh axes that an array may vary over; the attribute's name depends on the version of JAX."""
    kind = jax.typeof(array)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def automatic(function: Callable, *arguments: Any, like: Array, others: tuple[PartitionSpec, ...] = ()) -> Any:
    """`function(*arguments)`, also on a mesh with explicit axes, where XLA splits the work as on an automatic mesh.

    Args:
      function: what to call.
      arguments: its arguments, trees of arrays.
      like: an array; the first result is sharded as this one.
      others: the sharding of further results.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arguments)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), jax.sharding.get_abstract_mesh())
    if not mesh.explicit_axes or mesh.manual_axes:
        return function(*arguments)
    split = tuple(NamedSharding(mesh, spec) for spec in (jax.typeof(like).sharding.spec, *others))
    return jax.sharding.auto_axes(function, out_sharding=split if others else split[0])(*arguments)


def rows_of(table: Array, indices: Array) -> Array:
    """`jnp.take(table, indices, axis=0)`, sharded as the indices are on a mesh with explicit axes."""
    kind = jax.typeof(indices).sharding
    if not kind.mesh.explicit_axes or kind.mesh.manual_axes:
        return jnp.take(table, indices, axis=0)
    split = NamedSharding(kind.mesh, PartitionSpec(*kind.spec, *(None,) * (table.ndim - 1)))
    return table.at[indices].get(mode="fill", fill_value=jnp.nan, out_sharding=split)


def placed_as(array: Array, like: Array, first: int = 0) -> Array:
    """The array, sharded as `like` is on a mesh with explicit axes.

    Args:
      array: of as many axes as `like` has from `first` on.
      like: an array.
      first: how many of its axes are left out.
    """
    kind = jax.typeof(like).sharding
    if not kind.mesh.explicit_axes or kind.mesh.manual_axes:
        return array
    return jax.sharding.reshard(array, NamedSharding(kind.mesh, PartitionSpec(*kind.spec[first:])))


def check_spread(name: str, arrays: Iterable[Array], axis_name: str | None) -> None:
    """Raises a ValueError if all devices hold the same steps; `check_vma=False` disables the check."""
    if axis_name is None or axis_name not in varying_axes(lax.axis_index(axis_name)):
        return
    if not any(axis_name in varying_axes(array) for array in arrays):
        raise ValueError(
            f"{name} must be spread over the mesh axis {axis_name!r} along time; got the same on all its devices. Name "
            f"the axis in the `in_specs` of `jax.shard_map`, or omit `axis_name` where time is not spread."
        )


def before(states: Array, initial: Array, axis: int, reverse: bool = False, axis_name: str | None = None) -> Array:
    """The state that each step starts from: that of the step before, in reverse that of the step after.

    Args:
      states: the states of all steps.
      initial: the state before the first step of the whole sequence (in reverse, after the last).
      axis: the axis of time in `states`.
      reverse: whether the recurrence runs from the last step to the first.
      axis_name: the mesh axis that time is spread over.
    """
    boundary, size = jnp.expand_dims(initial, axis), states.shape[axis]
    if size == 0:
        return states
    begin, end = (1, size) if reverse else (0, size - 1)
    others = lax.slice_in_dim(states, begin, end, axis=axis)
    boundary = placed_as(boundary, states)
    if axis_name is not None:
        last = lax.index_in_dim(states, 0 if reverse else size - 1, axis)
        boundary = jnp.where(_first(reverse, axis_name), boundary, _from_neighbour(last, reverse, axis_name))
    return jnp.concatenate([others, boundary] if reverse else [boundary, others], axis)


def steps_before(time: int, axis_name: str | None) -> Array | int:
    """The number of steps of the sequence before this device's `time` steps."""
    return 0 if axis_name is None else time * lax.axis_index(axis_name)


def steps_done(time: int, reverse: bool, axis_name: str | None) -> Array:
    """The number of steps that a recurrence has run before each of this device's `time` steps."""
    size = 1 if axis_name is None else lax.axis_size(axis_name)
    earlier = steps_before(time, axis_name) + jnp.arange(time)
    return size * time - 1 - earlier if reverse else earlier


def at_boundary(value: Array, reverse: bool, axis_name: str | None) -> Array:
    """`value` on the device that holds the first step (in reverse, the last), 0 on the others."""
    return value if axis_name is None else jnp.where(_first(reverse, axis_name), value, 0)


def chained(scan: Callable[[Array], tuple[Array, Any]], initial: Array, reverse: bool, axis_name: str | None) -> Any:
    """The outputs of a sequential scan over the whole sequence; each device waits for the carry of the one before.

    Args:
      scan: carry -> (carry, outputs), over the steps of one device.
      initial: the carry that the whole sequence starts from.
      reverse: whether the scan runs from the last step to the first.
      axis_name: the mesh axis that time is spread over.
    """
    if axis_name is None:
        return scan(initial)[1]
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def one_device(n, loop):
        carry, kept = loop
        mine = index == (size - 1 - n if reverse else n)
        after, outputs = scan(carry)
        kept = jax.tree.map(lambda new, old: jnp.where(mine, new, old), outputs, kept)
        return varying_as(lax.psum(jnp.where(mine, after, 0), axis_name), (initial,)), kept

    shapes = jax.eval_shape(scan, initial)[1]
    zeros = jax.tree.map(lambda a: varying_as(jnp.zeros(a.shape, a.dtype), (initial,)), shapes)
    return lax.fori_loop(0, size, one_device, (initial, zeros))[1]


def summed(value: Array, axis_name: str | None) -> Array:
    """The sum over all devices."""
    return value if axis_name is None else lax.psum(value, axis_name)


def largest(value: Array, axis_name: str | None) -> Array:
    """The elementwise maximum over all devices; infinite where a value is NaN, which `pmax` ignores."""
    return value if axis_name is None else lax.pmax(_no_nan(value), axis_name)


def largest_anywhere(value: Array, axis_name: str | None) -> Array:
    """The maximum over the whole mesh, so that the loops of all devices end at the same iteration.

    Devices exchange boundary states at every iteration, so none may stop before the others. The maximum is over the
    axes that the value varies over; with `check_vma=False`, where these are unknown, over all axes of the mesh. If time
    is not spread, devices do not wait for each other, and each has a value of its own.
    """
    if axis_name is None:
        return value
    axes = varying_axes(value) or frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return lax.pmax(_no_nan(value), tuple(sorted(axes | {axis_name})))


def _no_nan(value: Array) -> Array:
    """`value` with infinity for NaN."""
    return jnp.where(jnp.isnan(value), jnp.inf, value)


def last_state(states: Array, initial: Array, axis: int, axis_name: str | None) -> Array:
    """The state after the last step of the whole sequence, the same on all devices."""
    if not states.shape[axis]:
        return initial
    state = lax.index_in_dim(states, -1, axis, keepdims=False)
    if axis_name is None:
        return state
    return lax.psum(jnp.where(_first(True, axis_name), state, 0), axis_name)


def _first(reverse: bool, axis_name: str) -> Array:
    """Whether this device holds the first step (in reverse, the last)."""
    return lax.axis_index(axis_name) == (lax.axis_size(axis_name) - 1 if reverse else 0)


def _from_neighbour(value: Array, reverse: bool, axis_name: str) -> Array:
    """The value of the device before (in reverse, of the one after); undefined on the first device."""
    size = lax.axis_size(axis_name)
    return lax.ppermute(value, axis_name, [(k, (k + (-1 if reverse else 1)) % size) for k in range(size)])
