"""The walk as a GPU kernel: one channel a thread, its carry in registers, the next rows on their way from memory.

Where batch and features are too few to fill the chip and the steps are affine, time is split into segments: a first
walk reduces each segment to one affine map, a second finds the carries the segments start from, a third walks
through all segments at once. The route is Pallas on Triton.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ranjax.kernels import Outs, Rows, Step, affine_map

WARPS = 2
CHANNELS = 32 * WARPS  # of one program: one a thread
AHEAD = 8  # rows on their way while as many are worked on
THREADS = 2**16  # that keep the chip busy
SHORTEST = 64  # steps of a segment


def walk(
    step: Step,
    carry: Rows,
    constants: Rows,
    arrays: Rows,
    outs: Outs,
    *,
    ahead: tuple[Array, Array] | None = None,
    backwards: bool = False,
    affine: bool = False,
    in_place: bool = False,
    interpret: bool = False,
) -> tuple[Rows, Rows]:
    """See `ranjax.kernels`."""
    batch, time, *_, features = arrays[0].shape
    count = segments(batch * features, time) if affine else 1
    call = partial(_call, constants=constants, arrays=arrays, ahead=ahead, backwards=backwards, interpret=interpret)
    carry = tuple(c[:, None] for c in carry)
    if count > 1:
        still = jnp.broadcast_to(jnp.zeros_like(carry[0]), (batch, count, features))
        (offset, slope), _ = call(affine_map(step), (still, still + 1), outs=())
        carry = (_starts(carry[0], slope, offset, interpret),)
    ends, outputs = call(step, carry, outs=outs)
    return tuple(end[:, -1] for end in ends), outputs


def segments(channels: int, time: int) -> int:
    """Into how many pieces time is split."""
    return max(1, min(THREADS // channels, time // SHORTEST))


def _starts(first: Array, slope: Array, offset: Array, interpret: bool) -> Array:
    """The carries that the segments start from, by a walk over the segments."""

    def step(carry, _, rows):
        (c,), (slope, offset) = carry, rows
        return (slope * c + offset,), (c,)

    _, (starts,) = _call(step, (first,), (), (slope, offset), ((0, first.dtype),), None, False, interpret)
    return starts


def _call(
    step: Step,
    carry: Rows,
    constants: Rows,
    arrays: Rows,
    outs: Outs,
    ahead: tuple[Array, Array] | None,
    backwards: bool,
    interpret: bool,
) -> tuple[Rows, Rows]:
    """One launch; the carries are `(batch, segments, features)`."""
    (batch, time, *_, features), segments = arrays[0].shape, carry[0].shape[1]
    blocks = pl.cdiv(features, CHANNELS)
    operands = (carry, constants, arrays, ahead or ())
    ends = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in carry)
    outputs = tuple(jax.ShapeDtypeStruct(arrays[number].shape, dtype) for number, dtype in outs)

    def kernel(*refs):
        refs, (end_refs, out_refs) = refs[: -len(ends + outputs)], _split(refs[-len(ends + outputs) :], (ends, outputs))
        program = pl.program_id(0)
        _walk_segment(
            step,
            _split(refs, operands),
            end_refs,
            out_refs,
            place=(program // (segments * blocks), program // blocks % segments, program % blocks),
            length=pl.cdiv(time, segments),
            backwards=backwards,
        )

    results = pl.pallas_call(
        kernel,
        out_shape=ends + outputs,
        grid=(batch * segments * blocks,),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="ranjax_walk",
    )(*jax.tree.leaves(operands))
    return results[: len(ends)], results[len(ends) :]


def _walk_segment(
    step: Step,
    operands: Any,
    ends: Any,
    outputs: Any,
    *,
    place: tuple[Array, Array, Array],
    length: int,
    backwards: bool,
) -> None:
    """One program: the channels of one block, over one segment of one sequence."""
    carry, constants, arrays, ahead = operands
    (_, time, *_, features), dtype = arrays[0].shape, carry[0].dtype
    b, segment, block = place
    channels = pl.ds(block * CHANNELS, CHANNELS)
    inside = block * CHANNELS + jnp.arange(CHANNELS) < features
    start = segment * length
    stop = jnp.minimum(start + length, time)

    def load(ref, *index):
        return plgpu.load(ref.at[(*index, channels)], mask=inside, other=0).astype(dtype)

    def moment(n):
        n = jnp.minimum(n, time - 1)
        return time - 1 - n if backwards else n

    edge = load(ahead[1], b) if ahead else jnp.zeros(())

    def rows(n):
        found = [load(ref, b, moment(n), *plane) for ref in arrays for plane in _planes(ref)]
        if ahead:
            found.append(jnp.where(n + 1 < time, load(ahead[0], b, moment(n + 1)), edge))
        return tuple(found)

    def advance(n, now, carry):
        after, made = step(carry, weights, now)
        going = n < stop
        places = [(ref, plane) for ref in outputs for plane in _planes(ref)]
        for (ref, plane), row in zip(places, made, strict=True):
            at = ref.at[(b, moment(n), *plane, channels)]
            plgpu.store(at, row.astype(ref.dtype), mask=inside & going)
        return tuple(jnp.where(going, new, old) for new, old in zip(after, carry, strict=True))

    def several(k, loop):
        carry, now = loop
        first = start + k * AHEAD
        following = tuple(rows(first + AHEAD + r) for r in range(AHEAD))
        for r in range(AHEAD):
            carry = advance(first + r, now[r], carry)
        return carry, following

    weights = tuple(load(ref) for ref in constants)
    initial = tuple(load(ref, b, segment) for ref in carry)
    loop = initial, tuple(rows(start + r) for r in range(AHEAD))
    carry, _ = lax.fori_loop(0, pl.cdiv(length, AHEAD), several, loop)
    for ref, row in zip(ends, carry, strict=True):
        plgpu.store(ref.at[(b, segment, channels)], row, mask=inside)


def _planes(ref: Any) -> list[tuple[Array, ...]]:
    """What stands between the indices of time and channel, for each row."""
    return [()] if len(ref.shape) == 3 else [(jnp.int32(plane),) for plane in range(ref.shape[2])]


def _split(refs: Any, like: Any) -> Any:
    """The flat references in the tree of the operands."""
    return jax.tree.unflatten(jax.tree.structure(like), refs)
