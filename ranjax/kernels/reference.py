"""Solvers of a recurrence in plain JAX, for every platform: sequential, associative and chunked."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ranjax.kernels.base import Recurrence, Rows, affine_map, apply_map, planes
from ranjax.sharding import before, varying_as

CHUNK = 64  # steps
LONG = 4096  # steps from which sums are compensated; before, they lose a digit or so of float32


def sequential(recurrence: Recurrence) -> tuple[Rows, Rows]:
    """A loop over the steps. Rows are read and written where they are: time is not moved to the front."""
    if recurrence.affine and isinstance(recurrence.sizes[1], int) and recurrence.sizes[1] >= LONG:
        (carry, _), outputs = sequential(_compensated(recurrence))
        return (carry,), outputs
    time, dtype = recurrence.sizes[1], recurrence.carry[0].dtype
    places, buffers = _buffers(recurrence)

    def moment(n):
        return time - 1 - n if recurrence.reverse else n

    def rows(array, n):
        return _rows(lax.dynamic_index_in_dim(array, moment(n), 1, keepdims=False).astype(dtype), planes(array))

    def advance(n, loop, last):
        carry, buffers = loop
        found = tuple(row for array in buffers[: len(recurrence.arrays)] for row in rows(array, n))
        carry, out_rows = recurrence.step(carry, recurrence.constants, found + last)
        buffers = list(buffers)
        for place, row in zip(places, _outputs(recurrence, out_rows), strict=True):
            buffers[place] = lax.dynamic_update_index_in_dim(buffers[place], row, moment(n), 1)
        return carry, tuple(buffers)

    loop = recurrence.carry, buffers
    if recurrence.ahead is None:
        carry, buffers = lax.fori_loop(0, time, lambda n, loop: advance(n, loop, ()), loop)
    else:
        states, boundary = recurrence.ahead
        loop = lax.fori_loop(0, time - 1, lambda n, loop: advance(n, loop, rows(states, n + 1)), loop)
        carry, buffers = advance(time - 1, loop, (boundary.astype(dtype),))
    return carry, tuple(buffers[place] for place in places)


def _compensated(recurrence: Recurrence) -> Recurrence:
    """The recurrence with the rounding error of the carry as a second one, added at the next step (Kahan)."""

    def step(carry, constants, rows):
        (c, lost), zero = carry, jnp.zeros_like(carry[0])
        _, out_rows = recurrence.step((c,), constants, rows)

        def affine(c):
            return recurrence.step((c,), constants, rows)[0][0]

        offset, kept = jax.jvp(affine, (zero,), (c,))
        addend = offset + jax.jvp(affine, (zero,), (lost,))[1]
        total = kept + addend
        lost = addend - (total - kept)
        return (total, jnp.where(jnp.isfinite(lost), lost, 0)), out_rows

    (first,) = recurrence.carry
    return recurrence._replace(step=step, carry=(first, jnp.zeros_like(first)), affine=False, in_place=False)


def associative(recurrence: Recurrence) -> tuple[Rows, Rows]:
    """An associative scan over the affine maps of the steps; steps that are not affine run sequentially."""
    if not recurrence.affine:
        return sequential(recurrence)
    (first,) = recurrence.carry
    rows = tuple(row for array in recurrence.arrays for row in _rows(array.astype(first.dtype), planes(array)))
    if recurrence.ahead is not None:
        states, boundary = recurrence.ahead
        rows += (_following(states.astype(first.dtype), boundary, recurrence.reverse),)

    def compose(earlier, later):
        (a, b), (a_, b_) = earlier, later
        return a_ * a, a_ * b + b_

    zeros = jnp.zeros_like(rows[0])
    (offset, slope), _ = affine_map(recurrence.step)((zeros, zeros + 1), recurrence.constants, rows)
    slope, offset = lax.associative_scan(compose, (slope, offset), reverse=recurrence.reverse, axis=1)
    after = slope * first[:, None] + offset
    _, out_rows = recurrence.step((before(after, first, 1, recurrence.reverse),), recurrence.constants, rows)
    return (after[:, 0 if recurrence.reverse else -1],), _outputs(recurrence, out_rows)


def chunked(recurrence: Recurrence) -> tuple[Rows, Rows]:
    """All chunks in parallel, sequentially inside a chunk.

    A first loop reduces each chunk to one affine map of the carry. A second, over the chunks, finds the carries that
    they start from. A third runs all chunks. No array as long as the sequence is allocated besides the outputs, unless
    the length is no multiple of the chunk: the remaining steps run last, and the others are copied.
    """
    batch, time, features = recurrence.sizes
    count = time // CHUNK
    if not recurrence.affine or count < 2:
        return sequential(recurrence)
    chunks, dtype = _chunks(recurrence, count), recurrence.carry[0].dtype
    zeros = varying_as(jnp.zeros((batch * count, features), dtype), recurrence.arrays)
    reduction = chunks._replace(step=affine_map(recurrence.step), carry=(zeros, zeros + 1), outs=(), affine=False)
    maps, _ = sequential(reduction._replace(in_place=False))
    maps = tuple(m.reshape(batch, count, features) for m in maps)
    last, (starts,) = sequential(
        Recurrence(apply_map, recurrence.carry, maps, ((0, dtype),), reverse=recurrence.reverse, affine=True)
    )
    _, outputs = sequential(chunks._replace(carry=(starts.reshape(zeros.shape),)))
    outputs = tuple(out.reshape(batch, count * CHUNK, *out.shape[2:]) for out in outputs)
    if count * CHUNK == time:
        return last, outputs
    last, rest = sequential(_part(recurrence, count * CHUNK, time)._replace(carry=last))
    pairs = zip(rest, outputs, strict=True) if recurrence.reverse else zip(outputs, rest, strict=True)
    return last, tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def _chunks(recurrence: Recurrence, count: int) -> Recurrence:
    """The first `count` chunks as sequences of one batch; the carry is still that of the recurrence."""
    batch, _, features = recurrence.sizes
    part = _part(recurrence, 0, count * CHUNK)

    def split(array):
        return array.reshape(batch * count, CHUNK, *array.shape[2:])

    ahead = None
    if part.ahead is not None:
        states, boundary = part.ahead
        firsts = (
            states[:, CHUNK - 1 :: CHUNK] if recurrence.reverse else states[:, ::CHUNK]
        )  # the first step of each chunk
        boundaries = _following(firsts, boundary, recurrence.reverse)
        ahead = split(states), boundaries.reshape(batch * count, features)
    return part._replace(arrays=tuple(map(split, part.arrays)), ahead=ahead)


def _part(recurrence: Recurrence, start: int, stop: int) -> Recurrence:
    """Steps `start` to `stop` of a recurrence, in the order in which they run."""
    time = recurrence.sizes[1]

    def cut(array):
        return array[:, time - stop : time - start] if recurrence.reverse else array[:, start:stop]

    ahead = recurrence.ahead
    if ahead is not None:
        states, boundary = ahead
        if stop < time:
            boundary = states[:, time - 1 - stop if recurrence.reverse else stop]
        ahead = cut(states), boundary
    return recurrence._replace(arrays=tuple(map(cut, recurrence.arrays)), ahead=ahead)


def _following(rows: Array, boundary: Array, reverse: bool) -> Array:
    """For every step of a recurrence the row of the next step; the boundary row for the last step."""
    return before(rows, boundary.astype(rows.dtype), 1, not reverse)


def _buffers(recurrence: Recurrence) -> tuple[list[int], Rows]:
    """The index of each output's buffer, and the buffers: the arrays, and new ones for outputs not written in place."""
    places, buffers = [], recurrence.arrays
    for number, dtype in recurrence.outs:
        if recurrence.in_place and buffers[number].dtype == dtype:
            places.append(number)
        else:
            places.append(len(buffers))
            buffers += (varying_as(jnp.zeros(buffers[number].shape, dtype), recurrence.arrays),)
    return places, buffers


def _rows(array: Array, count: int) -> Rows:
    """The rows of an array's planes, or the one row of an array without planes."""
    return (array,) if count == 1 else tuple(array[..., plane, :] for plane in range(count))


def _outputs(recurrence: Recurrence, rows: Rows) -> Rows:
    """The rows of the outputs; rows of several planes are stacked."""
    remaining, stacked = iter(rows), []
    for number, dtype in recurrence.outs:
        found = [next(remaining) for _ in range(planes(recurrence.arrays[number]))]
        stacked.append((found[0] if len(found) == 1 else jnp.stack(found, axis=-2)).astype(dtype))
    return tuple(stacked)
