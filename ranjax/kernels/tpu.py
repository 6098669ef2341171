"""A recurrence as a TPU kernel: a grid of (batch, features, time) blocks, with the carry in vector memory.

Time is the innermost axis of the grid and runs in order, so the carry passes from block to block; the other two axes
are parallel. Rows are read and written in tiles of eight, the height of a register.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ranjax.kernels.base import Recurrence, Rows, planes
from ranjax.kernels.reference import chunked

TILE = 8  # rows
LANES = 128
TIME = 256  # steps of a block
FEATURES = 512  # features of a block


def run(recurrence: Recurrence, *, interpret: Any = False) -> tuple[Rows, Rows]:
    """Runs the recurrence by the kernel, in float64 by `chunked`; `interpret=True` works on any platform, slowly."""
    if recurrence.carry[0].dtype == jnp.float64:
        return chunked(recurrence)
    (batch, time, features), blocks = recurrence.sizes, Blocks.of(recurrence)
    operands, specs = _operands(recurrence, blocks)
    ends = tuple(jax.ShapeDtypeStruct((batch, 1, features), c.dtype) for c in recurrence.carry)
    written = [(planes(recurrence.arrays[number]), dtype) for number, dtype in recurrence.outs]
    outputs = tuple(jax.ShapeDtypeStruct((batch, rows, time, features), dtype) for rows, dtype in written)
    tree = jax.tree.structure((operands, ends, outputs, ends))

    def kernel(*refs):
        _run_block(recurrence, blocks, *jax.tree.unflatten(tree, refs))

    results = pl.pallas_call(
        kernel,
        out_shape=ends + outputs,
        grid=(batch, pl.cdiv(features, blocks.wide), blocks.count),
        in_specs=specs,
        out_specs=(blocks.state,) * len(ends) + tuple(blocks.sequence(rows) for rows, _ in written),
        scratch_shapes=tuple(pltpu.VMEM((1, blocks.wide), c.dtype) for c in recurrence.carry),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ranjax_recurrence",
    )(*jax.tree.leaves(operands))
    found = tuple(out[:, 0] if out.shape[1] == 1 else jnp.swapaxes(out, 1, 2) for out in results[len(ends) :])
    return tuple(end[:, 0] for end in results[: len(ends)]), found


class Blocks(NamedTuple):
    """How time and features are cut into blocks; blocks run in the order of the recurrence."""

    tall: int
    wide: int
    count: int
    tiles: int
    reverse: bool

    @classmethod
    def of(cls, recurrence: Recurrence) -> "Blocks":
        _, time, features = recurrence.sizes
        tall = min(TIME, pl.cdiv(time, TILE) * TILE)
        wide = min(FEATURES, pl.cdiv(features, LANES) * LANES)
        return cls(tall, wide, pl.cdiv(time, tall), pl.cdiv(time, TILE), recurrence.reverse)

    def at(self, k: Any) -> Any:
        """The block of time that runs as number `k`."""
        return self.count - 1 - k if self.reverse else k

    def sequence(self, rows: int) -> pl.BlockSpec:
        """The block of an array `(batch, planes, time, features)`."""
        return pl.BlockSpec((1, rows, self.tall, self.wide), lambda b, j, k: (b, 0, self.at(k), j))

    @property
    def state(self) -> pl.BlockSpec:
        """The block of an array `(batch, 1, features)`."""
        return pl.BlockSpec((1, 1, self.wide), lambda b, j, k: (b, 0, j))

    @property
    def halo(self) -> pl.BlockSpec:
        """The tile after a block; the last tile, for the last block."""

        def index(b, j, k):
            each = self.tall // TILE
            tile = self.at(k) * each - 1 if self.reverse else (self.at(k) + 1) * each
            return b, 0, _within(tile, self.tiles - 1), j

        return pl.BlockSpec((1, 1, TILE, self.wide), index)


class Operands(NamedTuple):
    """The inputs of the kernel, or the references to them; planes come before time."""

    carry: Any
    constants: Any
    arrays: Any
    ahead: Any


def _operands(recurrence: Recurrence, blocks: Blocks) -> tuple[Operands, list[pl.BlockSpec]]:
    """The operands and their block specifications."""
    constant = pl.BlockSpec((1, blocks.wide), lambda b, j, k: (0, j))
    specs = [blocks.state] * len(recurrence.carry) + [constant] * len(recurrence.constants)
    specs += [blocks.sequence(planes(a)) for a in recurrence.arrays]
    ahead = ()
    if recurrence.ahead is not None:
        states, boundary = (a[:, None] for a in recurrence.ahead)
        ahead = states, states, boundary
        specs += [blocks.sequence(1), blocks.halo, blocks.state]
    arrays = tuple(a[:, None] if planes(a) == 1 else jnp.swapaxes(a, 1, 2) for a in recurrence.arrays)
    operands = Operands(
        tuple(c[:, None] for c in recurrence.carry), tuple(c[None] for c in recurrence.constants), arrays, ahead
    )
    return operands, specs


def _run_block(recurrence: Recurrence, blocks: Blocks, refs: Operands, ends: Any, outputs: Any, carried: Any) -> None:
    """One program: the steps of one block, from the carry of the block before it."""
    k, tiles = pl.program_id(2), blocks.tall // TILE
    start = blocks.at(k) * blocks.tall  # the time of the block's first row

    @pl.when(k == 0)
    def _():
        for ref, initial in zip(carried, refs.carry, strict=True):
            ref[...] = initial[0]

    def several(n, carry):
        n = tiles - 1 - n if recurrence.reverse else n
        carry, out_rows = _run_tile(recurrence, refs, carry, n, start + n * TILE)
        places = [(ref, plane) for ref in outputs for plane in range(ref.shape[1])]
        for (ref, plane), rows in zip(places, zip(*out_rows, strict=True), strict=True):
            ref[0, plane, _tile(n), :] = jnp.concatenate(rows).astype(ref.dtype)
        return carry

    carry = lax.fori_loop(jnp.int32(0), jnp.int32(tiles), several, tuple(ref[...] for ref in carried))
    for ref, end, row in zip(carried, ends, carry, strict=True):
        ref[...] = row
        end[0] = row


def _run_tile(recurrence: Recurrence, refs: Operands, carry: Rows, n: Any, start: Any) -> tuple[Rows, list[Rows]]:
    """Runs tile `n` of a block, which begins at time `start`: the carry, and the output rows of every step."""
    time, dtype = recurrence.sizes[1], carry[0].dtype
    constants = tuple(ref[...] for ref in refs.constants)
    tiles = [ref[0, plane, _tile(n), :].astype(dtype) for ref in refs.arrays for plane in range(ref.shape[1])]
    if refs.ahead:
        tiles.append(_tile_ahead(recurrence, refs, n, start))
    out_rows: list[Rows] = [()] * TILE
    for r in reversed(range(TILE)) if recurrence.reverse else range(TILE):
        after, out_rows[r] = recurrence.step(carry, constants, tuple(tile[r : r + 1] for tile in tiles))
        inside = start + r < time  # the last block may extend beyond the sequence
        carry = tuple(jnp.where(inside, new, old) for new, old in zip(after, carry, strict=True))
    return carry, out_rows


def _tile_ahead(recurrence: Recurrence, refs: Operands, n: Any, start: Any) -> Array:
    """For every row of a tile the row of the next step; the boundary row for the last step of the recurrence."""
    states, halo, boundary = refs.ahead
    dtype, last = recurrence.carry[0].dtype, states.shape[2] // TILE - 1
    beyond = n == 0 if recurrence.reverse else n == last
    neighbour = states[0, 0, _tile(_within(n - 1 if recurrence.reverse else n + 1, last)), :]
    neighbour = jnp.where(beyond, halo[0, 0], neighbour)
    tile = states[0, 0, _tile(n), :]
    if recurrence.reverse:
        rows = jnp.concatenate([neighbour[TILE - 1 :], tile[: TILE - 1]])
    else:
        rows = jnp.concatenate([tile[1:], neighbour[:1]])
    moments = start + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    final = 0 if recurrence.reverse else recurrence.sizes[1] - 1
    return jnp.where(moments == final, boundary[0].astype(dtype), rows.astype(dtype))


def _within(n: Any, last: int) -> Any:
    """`n` clipped to 0 ... `last`, with 32 bits, also where JAX has 64-bit integers."""
    return lax.max(jnp.int32(0), lax.min(n, jnp.int32(last)))


def _tile(n: Any) -> Any:
    """The slice of tile `n`."""
    return pl.ds(pl.multiple_of(n * TILE, TILE), TILE)
