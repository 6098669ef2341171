"""The walk as a GPU kernel: one channel a thread, its carry in registers, the next rows on their way from memory.

Where batch and features are too few to fill the chip and the steps are affine, time is split into segments: a first
walk reduces each segment to one affine map, a second finds the carries the segments start from, a third walks
through all segments at once. The route is Pallas on Triton.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ranjax.kernels import Rows, Walk, affine_map, apply_map

WARPS = 2
CHANNELS = 32 * WARPS  # of one program: one a thread
AHEAD = 8  # rows on their way while as many are worked on
THREADS = 2**16  # that keep the chip busy
SHORTEST = 64  # steps of a segment


def solve(walk: Walk, *, interpret: bool = False) -> tuple[Rows, Rows]:
    """Walks by the kernel; `interpret` runs it anywhere, slowly."""
    batch, time, features = walk.sizes
    count = segments(batch * features, time) if walk.affine else 1
    walk = walk._replace(carry=tuple(c[:, None] for c in walk.carry))
    if count > 1:
        (first,) = walk.carry
        still = jnp.zeros((batch, count, features), first.dtype)
        reduction = walk._replace(step=affine_map(walk.step), carry=(still, still + 1), outs=())
        maps, _ = _launch(reduction, interpret)
        _, starts = _launch(Walk(apply_map, walk.carry, maps, ((0, first.dtype),)), interpret)
        walk = walk._replace(carry=starts)
    ends, outputs = _launch(walk, interpret)
    return tuple(end[:, -1] for end in ends), outputs


def segments(channels: int, time: int) -> int:
    """Into how many pieces time is split."""
    return max(1, min(THREADS // channels, time // SHORTEST))


def _launch(walk: Walk, interpret: bool) -> tuple[Rows, Rows]:
    """One launch; the carries are `(batch, segments, features)`."""
    (batch, time, features), segments = walk.sizes, walk.carry[0].shape[1]
    blocks = pl.cdiv(features, CHANNELS)
    operands = Operands(walk.carry, walk.constants, walk.arrays, walk.ahead or ())
    ends = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in walk.carry)
    outputs = tuple(jax.ShapeDtypeStruct(walk.arrays[number].shape, dtype) for number, dtype in walk.outs)
    tree = jax.tree.structure((operands, ends, outputs))

    def kernel(*refs):
        refs, end_refs, output_refs = jax.tree.unflatten(tree, refs)
        program, dtype = pl.program_id(0), walk.carry[0].dtype
        place = Place(program // (segments * blocks), program // blocks % segments, program % blocks, features, dtype)
        _walk_segment(walk, refs, end_refs, output_refs, place, pl.cdiv(time, segments))

    results = pl.pallas_call(
        kernel,
        out_shape=ends + outputs,
        grid=(batch * segments * blocks,),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="ranjax_walk",
    )(*jax.tree.leaves(operands))
    return results[: len(ends)], results[len(ends) :]


class Operands(NamedTuple):
    """What the kernel reads, or the references to it."""

    carry: Any
    constants: Any
    arrays: Any
    ahead: Any


class Place(NamedTuple):
    """Where a program stands: its sequence, its segment of time, its block of channels."""

    batch: Array
    segment: Array
    block: Array
    features: int
    dtype: Any

    @property
    def channels(self) -> Any:
        return pl.ds(self.block * CHANNELS, CHANNELS)

    @property
    def inside(self) -> Array:
        """Which of its channels there are."""
        return self.block * CHANNELS + jnp.arange(CHANNELS) < self.features

    def load(self, ref: Any, *index: Any) -> Array:
        return plgpu.load(ref.at[(*index, self.channels)], mask=self.inside, other=0).astype(self.dtype)

    def store(self, ref: Any, row: Array, *index: Any, where: Array | bool = True) -> None:
        plgpu.store(ref.at[(*index, self.channels)], row.astype(ref.dtype), mask=self.inside & where)


def _walk_segment(walk: Walk, refs: Operands, ends: Any, outputs: Any, place: Place, length: int) -> None:
    """One program. Rows are asked for `AHEAD` steps before they are needed."""
    start, time = place.segment * length, walk.sizes[1]
    stop = jnp.minimum(start + length, time)
    constants = tuple(place.load(ref) for ref in refs.constants)

    def advance(n, rows, carry):
        after, made = walk.step(carry, constants, rows)
        going = n < stop
        for (ref, plane), row in zip(_planes(outputs), made, strict=True):
            place.store(ref, row, place.batch, _moment(walk, n), *plane, where=going)
        return tuple(jnp.where(going, new, old) for new, old in zip(after, carry, strict=True))

    def several(k, loop):
        carry, now = loop
        first = start + k * AHEAD
        later = tuple(_rows(walk, refs, place, first + AHEAD + r) for r in range(AHEAD))
        for r in range(AHEAD):
            carry = advance(first + r, now[r], carry)
        return carry, later

    initial = tuple(place.load(ref, place.batch, place.segment) for ref in refs.carry)
    loop = initial, tuple(_rows(walk, refs, place, start + r) for r in range(AHEAD))
    carry, _ = lax.fori_loop(0, pl.cdiv(length, AHEAD), several, loop)
    for ref, row in zip(ends, carry, strict=True):
        place.store(ref, row, place.batch, place.segment)


def _rows(walk: Walk, refs: Operands, place: Place, n: Array) -> Rows:
    """What step number `n` reads; beyond the last, what that one reads."""
    time = walk.sizes[1]
    found = [place.load(ref, place.batch, _moment(walk, n), *plane) for ref, plane in _planes(refs.arrays)]
    if refs.ahead:
        states, edge = refs.ahead
        following = place.load(states, place.batch, _moment(walk, n + 1))
        found.append(jnp.where(n + 1 < time, following, place.load(edge, place.batch)))
    return tuple(found)


def _moment(walk: Walk, n: Array) -> Array:
    """The time of step number `n`."""
    last = walk.sizes[1] - 1
    n = jnp.minimum(n, last)
    return last - n if walk.backwards else n


def _planes(refs: Any) -> list[tuple[Any, tuple[Array, ...]]]:
    """Every row of a step: its reference, and what stands between the indices of time and channel."""
    return [
        (ref, plane)
        for ref in refs
        for plane in ([()] if len(ref.shape) == 3 else [(jnp.int32(n),) for n in range(ref.shape[2])])
    ]
