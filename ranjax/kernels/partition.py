"""Kernels on arrays that are sharded, under `jit` alone: every device runs one on its own sequences and features.

XLA cannot split a kernel and would gather its operands on every device. It is given the rule here: along the batch and
along the features nothing is exchanged; time, and planes, are whole on each device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from ranjax.kernels.base import Recurrence, Rows, Solver


def partitioned(solver: Solver) -> Solver:
    """The same solver, split by XLA along the batch and the features. Under `vmap` its batch grows."""

    def solve(recurrence: Recurrence) -> tuple[Rows, Rows]:
        operands = recurrence.carry, recurrence.arrays, recurrence.constants, recurrence.ahead
        leaves, tree = jax.tree.flatten(operands)
        axes, results = _axes(recurrence)
        rule = f"{', '.join(axes)} -> {', '.join(results)}"

        def run(*leaves):
            carry, arrays, constants, ahead = jax.tree.unflatten(tree, leaves)
            return solver(recurrence._replace(carry=carry, arrays=arrays, constants=constants, ahead=ahead))

        @custom_vmap
        def call(*leaves):
            split = custom_partitioning(run)
            partition = _on_each(run, axes, results)
            split.def_partition(partition, sharding_rule=rule, need_replication_factors=_whole(axes))
            return split(*leaves)

        @call.def_vmap
        def batched(size, mapped, *leaves):  # pyright: ignore[reportUnusedFunction]
            constant = [one == "f" for one in axes]
            if any(m and c for m, c in zip(mapped, constant, strict=True)):
                found = jax.vmap(run, [0 if m else None for m in mapped])(*leaves)  # by the kernel's own rule
                return found, jax.tree.map(lambda _: True, found)
            found = call(*(a if c else _merged(a, m, size) for a, m, c in zip(leaves, mapped, constant, strict=True)))
            parted = jax.tree.map(lambda a: a.reshape(size, a.shape[0] // size, *a.shape[1:]), found)
            return parted, jax.tree.map(lambda _: True, parted)

        return call(*leaves)

    return solve


def _axes(recurrence: Recurrence) -> tuple[list[str], list[str]]:
    """The axes of each operand and of each result, one letter an axis; planes are numbered."""
    arrays = ["b t f" if a.ndim == 3 else f"b t p{n} f" for n, a in enumerate(recurrence.arrays)]
    carries = ["b f"] * len(recurrence.carry)
    ahead = [] if recurrence.ahead is None else ["b t f", "b f"]
    operands = carries + arrays + ["f"] * len(recurrence.constants) + ahead
    return operands, carries + [arrays[number] for number, _ in recurrence.outs]


def _whole(axes: list[str]) -> tuple[str, ...]:
    """The axes that are not split, in the order in which they appear, which XLA asks for."""
    return tuple(dict.fromkeys(axis for one in axes for axis in one.split() if axis not in ("b", "f")))


def _on_each(run: Any, axes: list[str], of_results: list[str]) -> Any:
    """Each device runs the solver on its sequences and features, of which it has all steps."""

    def partition(mesh, operands, results):
        if mesh.empty:
            raise NotImplementedError(
                "a kernel inside `jax.shard_map` over some axes of a mesh only: name all of them in its `axis_names`."
            )
        found = [_split(one, a.sharding) for one, a in zip(axes, operands, strict=True)]
        names = {axis: name for one in found for axis, name in one.items() if name is not None}

        def placed(one):
            spec = PartitionSpec(*(names.get(axis) for axis in one.split()))
            return NamedSharding(mesh, spec)

        split, leaves = tuple(map(placed, axes)), list(map(placed, of_results))
        return mesh, run, jax.tree.unflatten(jax.tree.structure(results), leaves), split

    return partition


def _split(axes: str, sharding: NamedSharding) -> dict[str, Any]:
    """What the batch and the features of an operand are sharded over."""
    return {axis: over for axis, over in zip(axes.split(), sharding.spec, strict=False) if axis in ("b", "f")}


def _merged(array: jax.Array, mapped: bool, size: int) -> jax.Array:
    """An array `(size, batch, ...)` as `(size * batch, ...)`; one that is not mapped is repeated."""
    if not mapped:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape(size * array.shape[1], *array.shape[2:])
