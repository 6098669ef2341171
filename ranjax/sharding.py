"""Sequences whose time is spread over the devices of a mesh axis, inside `jax.shard_map`.

Every device has as many consecutive steps as the others, in the order of its index on the axis. `axis_name` None stands
for a sequence that is whole, here and wherever the name is an argument.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec


def varying_as(array: Array, others: Iterable[Array]) -> Array:
    """`array`, of a type that tells `shard_map` it may differ between devices wherever one of the others does."""
    missing = frozenset[str]().union(*map(varying_axes, others)) - varying_axes(array)
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, tuple(sorted(missing)), to="varying")
    return lax.pvary(array, tuple(sorted(missing)))  # pyright: ignore[reportAttributeAccessIssue]  # before JAX 0.9


def varying_axes(array: Array) -> frozenset[str]:
    """The mesh axes that an array may differ along; JAX has had two names for them."""
    kind = jax.typeof(array)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def automatic(function: Callable, *arguments: Any, like: Array, others: tuple[PartitionSpec, ...] = ()) -> Any:
    """What `function` makes of the arguments, its first result sharded as `like`, where types name shardings: of arrays
    on an explicit mesh, and of those from elsewhere while such a mesh is set. XLA splits the work, as on an automatic
    one.

    Args:
      others: how further results are split.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arguments)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), jax.sharding.get_abstract_mesh())
    if not mesh.explicit_axes or mesh.manual_axes:
        return function(*arguments)
    split = tuple(NamedSharding(mesh, spec) for spec in (jax.typeof(like).sharding.spec, *others))
    return jax.sharding.auto_axes(function, out_sharding=split if others else split[0])(*arguments)


def check_spread(name: str, arrays: Iterable[Array], axis_name: str | None) -> None:
    """Raises a ValueError where all devices were given the same, if types tell (with `check_vma=False` none does)."""
    if axis_name is None or axis_name not in varying_axes(lax.axis_index(axis_name)):
        return
    if not any(axis_name in varying_axes(array) for array in arrays):
        raise ValueError(
            f"{name} must be spread over the mesh axis {axis_name!r} along time; got the same on all its devices. Name "
            f"the axis in the `in_specs` of `jax.shard_map`, or leave out `axis_name` where time is whole."
        )


def before(states: Array, initial: Array, axis: int, reverse: bool = False, axis_name: str | None = None) -> Array:
    """The state that each step starts from, on the axis of time; in reverse that of the step after.

    Args:
      states: of all steps.
      initial: that before the first one (in reverse, after the last one) of the whole sequence.
    """
    edge, size = jnp.expand_dims(initial, axis), states.shape[axis]
    if size == 0:
        return states
    begin, end = (1, size) if reverse else (0, size - 1)
    others = lax.slice_in_dim(states, begin, end, axis=axis)
    if axis_name is not None:
        last = lax.index_in_dim(states, 0 if reverse else size - 1, axis)
        edge = jnp.where(_first(reverse, axis_name), edge, _passed_on(last, reverse, axis_name))
    return jnp.concatenate([others, edge] if reverse else [edge, others], axis)


def steps_before(time: int, axis_name: str | None) -> Array | int:
    """How many steps of the sequence come before this device's `time` steps."""
    return 0 if axis_name is None else time * lax.axis_index(axis_name)


def steps_walked(time: int, reverse: bool, axis_name: str | None) -> Array:
    """How many steps of the sequence a walk has behind it before each of this device's `time` steps."""
    size = 1 if axis_name is None else lax.axis_size(axis_name)
    earlier = steps_before(time, axis_name) + jnp.arange(time)
    return size * time - 1 - earlier if reverse else earlier


def at_the_edge(value: Array, reverse: bool, axis_name: str | None) -> Array:
    """`value` on the device where the sequence begins (in reverse, ends), 0 on the others."""
    return value if axis_name is None else jnp.where(_first(reverse, axis_name), value, 0)


def chained(walk: Callable[[Array], tuple[Array, Any]], initial: Array, reverse: bool, axis_name: str | None) -> Any:
    """What a walk makes of the whole sequence, one device after another: each waits for the carry of the one before.

    Args:
      walk: carry -> (carry, outputs), over a device's steps.
      initial: the carry that the whole starts from.
    """
    if axis_name is None:
        return walk(initial)[1]
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def turn(n, loop):
        carry, kept = loop
        mine = index == (size - 1 - n if reverse else n)
        after, outputs = walk(carry)
        kept = jax.tree.map(lambda new, old: jnp.where(mine, new, old), outputs, kept)
        return varying_as(lax.psum(jnp.where(mine, after, 0), axis_name), (initial,)), kept

    shapes = jax.eval_shape(walk, initial)[1]
    nothing = jax.tree.map(lambda a: varying_as(jnp.zeros(a.shape, a.dtype), (initial,)), shapes)
    return lax.fori_loop(0, size, turn, (initial, nothing))[1]


def summed(value: Array, axis_name: str | None) -> Array:
    """The sum over all devices."""
    return value if axis_name is None else lax.psum(value, axis_name)


def largest(value: Array, axis_name: str | None) -> Array:
    """The largest of all devices' values, for each element; infinite where one is NaN, which `pmax` passes over."""
    return value if axis_name is None else lax.pmax(_no_nan(value), axis_name)


def largest_anywhere(value: Array, axis_name: str | None) -> Array:
    """The same over the whole mesh, so that all devices go on, or none: one that waits for others must not be alone.

    The axes are those where the value may differ, or, with `check_vma=False`, where nothing tells that, all there are.
    Where time is not spread, no device waits for another, and each goes on as long as it must.
    """
    if axis_name is None:
        return value
    axes = varying_axes(value) or frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return lax.pmax(_no_nan(value), tuple(sorted(axes | {axis_name})))


def _no_nan(value: Array) -> Array:
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
    return lax.axis_index(axis_name) == (lax.axis_size(axis_name) - 1 if reverse else 0)


def _passed_on(value: Array, reverse: bool, axis_name: str) -> Array:
    """What the device before has (in reverse, the one after); anything on the first one."""
    size = lax.axis_size(axis_name)
    return lax.ppermute(value, axis_name, [(k, (k + (-1 if reverse else 1)) % size) for k in range(size)])
