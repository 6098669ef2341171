"""The devices that a run is trained on, as a mesh of the axes `AXES`, and how its arrays are spread over them.

The batch is split over `data`; parameters are split over `model` along their longest axis that it divides; time is
split over `time`. Everything is exact on any mesh but for the order of sums. XLA does the splitting, from the places of
the arrays; but for the output layer, whose chunks it would not split, and for time: these run in `jax.shard_map`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ranjax.errors import UserError
from ranjax.training.config import MESH_AXES as AXES
from ranjax.training.config import Config, mesh_sizes


def make_mesh(config: Config) -> Mesh:
    """The mesh of the settings. Where they do not name `data`: as many devices as divide the batch.

    Raises:
      UserError: for more devices than there are, or a number that does not divide theirs.
    """
    there, sizes = jax.device_count(), mesh_sizes(config.mesh)
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    parts = config.batch_size // config.accumulate
    most = max((n for n in range(1, there // others + 1) if parts % n == 0), default=1)
    sizes = {axis: sizes.get(axis, most if axis == "data" else 1) for axis in AXES}
    asked = math.prod(sizes.values())
    if asked > there:
        raise UserError(f"--mesh {config.mesh} takes {asked} devices; there are {there}. Give another one.")
    if config.mesh and there % asked:
        raise UserError(f"--mesh {config.mesh} takes {asked} devices; that must divide the {there} there are.")
    if jax.process_count() > 1 and asked != there:
        raise UserError(
            f"a mesh of {asked} devices leaves out some of the {there} of all processes. Give a --batch-size that "
            f"{there // others} divides, or a --mesh of all."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds, devices=jax.devices()[:asked])


def described(mesh: Mesh) -> list[str]:
    """A sentence on the devices, where there are several."""
    there, used = jax.device_count(), mesh.size
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return [] if there == 1 else [f"it runs on {used} of {there} devices" + (f": {axes}" if axes else "")]


def shardings(mesh: Mesh, state: Any) -> Any:
    """Where the arrays of a training state belong."""
    whole = NamedSharding(mesh, P())

    def split(a):
        return NamedSharding(mesh, _longest(a.shape, mesh.shape["model"]))

    placed = jax.tree.map(lambda _: whole, state)
    parameters = {name: jax.tree.map(split, getattr(state, name)) for name in ("params", "optimizer", "average")}
    return placed._replace(carry=jax.tree.map(lambda _: NamedSharding(mesh, P("data")), state.carry), **parameters)


def _longest(shape: tuple[int, ...], parts: int) -> P:
    """A matrix is split along its longest axis that so many parts divide, the last of several; vectors are whole."""
    axes = [n for n, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or len(shape) < 2 or not axes:
        return P()
    longest = max(axes, key=lambda n: (shape[n], n))
    return P(*("model" if n == longest else None for n in range(len(shape))))


def put(tree: Any, places: Any) -> Any:
    """The arrays in their places; every process has all of them, and keeps the parts of its devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(a, place):
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, place, lambda index: a[index])

    return jax.tree.map(one, tree, places)


def put_text(mesh: Mesh, text: np.ndarray) -> jax.Array:
    """The text, `(batch, tokens)`, each row on the devices that train on it."""
    return put(text, NamedSharding(mesh, P("data")))


def on_data(array: jax.Array, mesh: Mesh | None, axis: int) -> jax.Array:
    """The array, the batch being its axis `axis`, split over `data`."""
    return (
        array if mesh is None else lax.with_sharding_constraint(array, NamedSharding(mesh, P(*[None] * axis, "data")))
    )


def over_batch(total: Callable, mesh: Mesh | None) -> Callable:
    """`total(params, rows, targets)`, a sum over the batch, computed by each device for its own sequences."""
    if mesh is None or mesh.shape["data"] == 1 or mesh.shape["time"] > 1:  # inside `over_time`
        return total

    def summed(*given):
        return lax.psum(total(*given), "data")

    return jax.shard_map(
        summed, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), axis_names=_manual(mesh)
    )


def over_streams(window: Callable, mesh: Mesh) -> Callable:
    """`window(params, state, tokens, targets) -> (state, sum)`, each device for its own streams."""

    def summed(*given):
        state, total = window(*given)
        return state, lax.psum(total, "data")

    specs = P(), P("data"), P("data"), P("data")
    return jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()), axis_names=_manual(mesh))


def over_time(part: Callable, mesh: Mesh | None) -> Callable:
    """`part(params, carry, key, tokens, targets) -> (loss, nats, carry, iterations)`, time split over its axis."""
    if mesh is None or mesh.shape["time"] == 1:
        return part

    def one(*given):
        loss, nats, carry, iterations = part(*given)
        of_all = (lax.pmean(lax.psum(a, "time"), "data") for a in (loss, nats))
        return *of_all, carry, lax.pmean(iterations, ("data", "time"))

    specs = P(), P("data"), P(), P("data", "time"), P("data", "time")
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=(P(), P(), P("data"), P()))


def _manual(mesh: Mesh) -> set[str]:
    """The axes that `shard_map` is over; XLA splits over `model` in it too."""
    return set[str](AXES) - ({"model"} if mesh.shape["model"] > 1 else set())
