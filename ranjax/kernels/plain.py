"""Walks in plain JAX, for every platform: one step after another, all at once, and in chunks."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from ranjax.kernels import Outs, Rows, Step, affine_map, planes

CHUNK = 64  # steps


def sequential(
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
) -> tuple[Rows, Rows]:
    """One step after another. Rows are read and written in place: time is not moved to the front."""
    time, dtype = arrays[0].shape[1], carry[0].dtype
    places, buffers = [], list(arrays)
    for number, out in outs:
        free = in_place and arrays[number].dtype == out
        places.append(number if free else len(buffers))
        if not free:
            buffers.append(lax.empty(arrays[number].shape, out))

    def moment(n):
        return time - 1 - n if backwards else n

    def rows(array, n):
        return _rows(lax.dynamic_index_in_dim(array, moment(n), 1, keepdims=False).astype(dtype), array.ndim == 3)

    def advance(n, loop, last):
        carry, buffers = loop
        found = tuple(row for array in buffers[: len(arrays)] for row in rows(array, n))
        carry, made = step(carry, constants, found + last)
        buffers = list(buffers)
        for place, row in zip(places, _outputs(made, arrays, outs), strict=True):
            buffers[place] = lax.dynamic_update_index_in_dim(buffers[place], row, moment(n), 1)
        return carry, tuple(buffers)

    loop = carry, tuple(buffers)
    if ahead is None:
        carry, buffers = lax.fori_loop(0, time, lambda n, loop: advance(n, loop, ()), loop)
    else:
        states, edge = ahead
        loop = lax.fori_loop(0, time - 1, lambda n, loop: advance(n, loop, rows(states, n + 1)), loop)
        carry, buffers = advance(time - 1, loop, (edge.astype(dtype),))
    return carry, tuple(buffers[place] for place in places)


def associative(
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
) -> tuple[Rows, Rows]:
    """All steps at once: affine maps compose associatively. Steps that are not affine are walked through."""
    if not affine:
        return sequential(step, carry, constants, arrays, outs, ahead=ahead, backwards=backwards, in_place=in_place)
    (first,) = carry
    rows = tuple(row for array in arrays for row in _rows(array.astype(first.dtype), array.ndim == 3))
    if ahead is not None:
        rows += (following(ahead[0].astype(first.dtype), ahead[1], backwards),)

    def compose(earlier, later):
        (a, b), (a_, b_) = earlier, later
        return a_ * a, a_ * b + b_

    still = jnp.zeros_like(rows[0])
    (offset, slope), _ = affine_map(step)((still, still + 1), constants, rows)
    slope, offset = lax.associative_scan(compose, (slope, offset), reverse=backwards, axis=1)
    after = slope * first[:, None] + offset
    before = (following(after, first, not backwards),)
    _, made = step(before, constants, rows)
    return (after[:, 0 if backwards else -1],), _outputs(made, arrays, outs)


def chunked(
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
) -> tuple[Rows, Rows]:
    """All chunks at once, step by step inside, from the carries that a pass over the chunks finds.

    A first walk reduces each chunk to one affine map of the carry, a second, over those, finds what the chunks start
    from, a third walks through all of them: no array of the length of the sequence besides the outputs. Steps that
    fill no chunk come last in the walk.
    """
    batch, time, *_, features = arrays[0].shape
    count, first = time // CHUNK, carry[0]
    if not affine or count < 2:
        return sequential(step, carry, constants, arrays, outs, ahead=ahead, backwards=backwards, in_place=in_place)
    rest = time - count * CHUNK

    def chunks(array):
        whole = array[:, rest:] if backwards else array[:, : time - rest]
        return whole.reshape(batch * count, CHUNK, *array.shape[2:])

    def remainder(array):
        return array[:, :rest] if backwards else array[:, time - rest :]

    def spread(states):
        return states.reshape(batch * count, features)

    inside = partial(sequential, constants=constants, arrays=tuple(map(chunks, arrays)), backwards=backwards)
    beyond = None
    if ahead is not None:
        states, edge = ahead
        edges = _edges(states, edge, count, backwards)
        inside = partial(inside, ahead=(chunks(states), spread(edges)))
        beyond = remainder(states), edge
    still = spread(jnp.zeros((batch, count, features), first.dtype))
    maps, _ = inside(affine_map(step), (still, still + 1), outs=())
    maps = tuple(m.reshape(batch, count, features) for m in maps)
    last, (starts,) = sequential(_apply, carry, (), maps, ((0, first.dtype),), backwards=backwards)
    _, outputs = inside(step, (spread(starts),), outs=outs, in_place=in_place)
    outputs = tuple(out.reshape(batch, time - rest, *out.shape[2:]) for out in outputs)
    if rest == 0:
        return last, outputs
    last, tails = sequential(
        step, last, constants, tuple(map(remainder, arrays)), outs, ahead=beyond, backwards=backwards
    )
    pairs = zip(tails, outputs, strict=True) if backwards else zip(outputs, tails, strict=True)
    return last, tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def _apply(carry: Rows, _: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """One affine map of the carry, and the carry it found."""
    (c,), (offset, slope) = carry, rows
    return (slope * c + offset,), (c,)


def _edges(states: Array, edge: Array, count: int, backwards: bool) -> Array:
    """The row that the last step of each chunk reads ahead, `(batch, chunks, features)`."""
    time = states.shape[1]
    first = time - count * CHUNK - 1 if backwards else CHUNK  # the first of them, in time
    found = [states[:, first + k * CHUNK] for k in range(count) if 0 <= first + k * CHUNK < time]
    if len(found) < count:
        found.insert(0 if backwards else count, edge.astype(states.dtype))
    return jnp.stack(found, axis=1)


def following(rows: Array, edge: Array, backwards: bool) -> Array:
    """For every step of a walk the row of the step that comes next, and the edge for the last one."""
    edge = edge[:, None].astype(rows.dtype)
    if backwards:
        return jnp.concatenate([edge, rows[:, :-1]], axis=1)
    return jnp.concatenate([rows[:, 1:], edge], axis=1)


def _rows(array: Array, one: bool) -> Rows:
    """The rows of an array's planes, or the one row of an array without them."""
    return (array,) if one else tuple(array[..., plane, :] for plane in range(array.shape[-2]))


def _outputs(rows: Rows, arrays: Rows, outs: Outs) -> Rows:
    """The rows of the outputs, those of several planes stacked."""
    remaining, stacked = iter(rows), []
    for number, dtype in outs:
        found = [next(remaining) for _ in range(planes(arrays[number]))]
        stacked.append((jnp.stack(found, axis=-2) if arrays[number].ndim == 4 else found[0]).astype(dtype))
    return tuple(stacked)
