"""Walks in plain JAX, for every platform: one step after another, all at once, and in chunks."""

import jax.numpy as jnp
from jax import Array, lax

from ranjax.kernels.base import Rows, Walk, affine_map, apply_map, planes
from ranjax.sharding import before, varying_as

CHUNK = 64  # steps


def sequential(walk: Walk) -> tuple[Rows, Rows]:
    """One step after another. Rows are read and written in place: time is not moved to the front."""
    time, dtype = walk.sizes[1], walk.carry[0].dtype
    places, buffers = _buffers(walk)

    def moment(n):
        return time - 1 - n if walk.backwards else n

    def rows(array, n):
        return _rows(lax.dynamic_index_in_dim(array, moment(n), 1, keepdims=False).astype(dtype), planes(array))

    def advance(n, loop, last):
        carry, buffers = loop
        found = tuple(row for array in buffers[: len(walk.arrays)] for row in rows(array, n))
        carry, made = walk.step(carry, walk.constants, found + last)
        buffers = list(buffers)
        for place, row in zip(places, _outputs(walk, made), strict=True):
            buffers[place] = lax.dynamic_update_index_in_dim(buffers[place], row, moment(n), 1)
        return carry, tuple(buffers)

    loop = walk.carry, buffers
    if walk.ahead is None:
        carry, buffers = lax.fori_loop(0, time, lambda n, loop: advance(n, loop, ()), loop)
    else:
        states, edge = walk.ahead
        loop = lax.fori_loop(0, time - 1, lambda n, loop: advance(n, loop, rows(states, n + 1)), loop)
        carry, buffers = advance(time - 1, loop, (edge.astype(dtype),))
    return carry, tuple(buffers[place] for place in places)


def associative(walk: Walk) -> tuple[Rows, Rows]:
    """All steps at once: affine maps compose associatively. Steps that are not affine are walked through."""
    if not walk.affine:
        return sequential(walk)
    (first,) = walk.carry
    rows = tuple(row for array in walk.arrays for row in _rows(array.astype(first.dtype), planes(array)))
    if walk.ahead is not None:
        states, edge = walk.ahead
        rows += (_following(states.astype(first.dtype), edge, walk.backwards),)

    def compose(earlier, later):
        (a, b), (a_, b_) = earlier, later
        return a_ * a, a_ * b + b_

    still = jnp.zeros_like(rows[0])
    (offset, slope), _ = affine_map(walk.step)((still, still + 1), walk.constants, rows)
    slope, offset = lax.associative_scan(compose, (slope, offset), reverse=walk.backwards, axis=1)
    after = slope * first[:, None] + offset
    _, made = walk.step((before(after, first, 1, walk.backwards),), walk.constants, rows)
    return (after[:, 0 if walk.backwards else -1],), _outputs(walk, made)


def chunked(walk: Walk) -> tuple[Rows, Rows]:
    """All chunks at once, step by step inside, from the carries that a pass over the chunks finds.

    A first walk reduces each chunk to one affine map of the carry, a second, over those, finds what the chunks start
    from, a third walks through all of them: no array of the length of the sequence besides the outputs. Steps that
    fill no chunk come last in the walk; then the others are a copy, of the arrays and of the outputs.
    """
    batch, time, features = walk.sizes
    count = time // CHUNK
    if not walk.affine or count < 2:
        return sequential(walk)
    chunks, dtype = _chunks(walk, count), walk.carry[0].dtype
    still = varying_as(jnp.zeros((batch * count, features), dtype), walk.arrays)
    reduction = chunks._replace(step=affine_map(walk.step), carry=(still, still + 1), outs=(), affine=False)
    maps, _ = sequential(reduction._replace(in_place=False))
    maps = tuple(m.reshape(batch, count, features) for m in maps)
    last, (starts,) = sequential(Walk(apply_map, walk.carry, maps, ((0, dtype),), backwards=walk.backwards))
    _, outputs = sequential(chunks._replace(carry=(starts.reshape(still.shape),)))
    outputs = tuple(out.reshape(batch, count * CHUNK, *out.shape[2:]) for out in outputs)
    if count * CHUNK == time:
        return last, outputs
    last, rest = sequential(_part(walk, count * CHUNK, time)._replace(carry=last))
    pairs = zip(rest, outputs, strict=True) if walk.backwards else zip(outputs, rest, strict=True)
    return last, tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def _chunks(walk: Walk, count: int) -> Walk:
    """The walk's first `count` chunks side by side, as sequences of their own; the carry is still the walk's."""
    batch, _, features = walk.sizes
    part = _part(walk, 0, count * CHUNK)

    def split(array):
        return array.reshape(batch * count, CHUNK, *array.shape[2:])

    ahead = None
    if part.ahead is not None:
        states, edge = part.ahead
        firsts = states[:, CHUNK - 1 :: CHUNK] if walk.backwards else states[:, ::CHUNK]  # of each chunk, in the walk
        edges = _following(firsts, edge, walk.backwards)
        ahead = split(states), edges.reshape(batch * count, features)
    return part._replace(arrays=tuple(map(split, part.arrays)), ahead=ahead)


def _part(walk: Walk, start: int, stop: int) -> Walk:
    """The steps of a walk from number `start` to `stop`, in the order of the walk."""
    time = walk.sizes[1]

    def cut(array):
        return array[:, time - stop : time - start] if walk.backwards else array[:, start:stop]

    ahead = walk.ahead
    if ahead is not None:
        states, edge = ahead
        if stop < time:
            edge = states[:, time - 1 - stop if walk.backwards else stop]
        ahead = cut(states), edge
    return walk._replace(arrays=tuple(map(cut, walk.arrays)), ahead=ahead)


def _following(rows: Array, edge: Array, backwards: bool) -> Array:
    """For every step of a walk the row of the step that comes next, and the edge for the last one."""
    return before(rows, edge.astype(rows.dtype), 1, not backwards)


def _buffers(walk: Walk) -> tuple[list[int], Rows]:
    """The arrays, and the outputs that cannot be written over one of them; where each output is among these."""
    places, buffers = [], walk.arrays
    for number, dtype in walk.outs:
        if walk.in_place and buffers[number].dtype == dtype:
            places.append(number)
        else:
            places.append(len(buffers))
            buffers += (varying_as(jnp.zeros(buffers[number].shape, dtype), walk.arrays),)
    return places, buffers


def _rows(array: Array, count: int) -> Rows:
    """The rows of an array's planes, or the one row of an array without them."""
    return (array,) if count == 1 else tuple(array[..., plane, :] for plane in range(count))


def _outputs(walk: Walk, rows: Rows) -> Rows:
    """The rows of the outputs, those of several planes stacked."""
    remaining, stacked = iter(rows), []
    for number, dtype in walk.outs:
        found = [next(remaining) for _ in range(planes(walk.arrays[number]))]
        stacked.append((found[0] if len(found) == 1 else jnp.stack(found, axis=-2)).astype(dtype))
    return tuple(stacked)
