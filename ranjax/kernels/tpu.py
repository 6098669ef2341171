"""The walk as a TPU kernel: a grid of (batch, features, time) blocks, the carry in vector memory from block to block.

Time is the innermost axis of the grid and is walked through in order; the other two are parallel. Rows are read and
written in tiles of eight, the height of a register.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ranjax.kernels.base import Rows, Walk, planes
from ranjax.kernels.reference import chunked

TILE = 8  # rows
LANES = 128
TIME = 256  # steps of a block
FEATURES = 512  # features of a block


def solve(walk: Walk, *, interpret: Any = False) -> tuple[Rows, Rows]:
    """Walks by the kernel, for which there is no float64; `interpret` runs it anywhere, slowly."""
    if walk.carry[0].dtype == jnp.float64:
        return chunked(walk)
    (batch, time, features), blocks = walk.sizes, Blocks.of(walk)
    operands, specs = _operands(walk, blocks)
    ends = tuple(jax.ShapeDtypeStruct((batch, 1, features), c.dtype) for c in walk.carry)
    written = [(planes(walk.arrays[number]), dtype) for number, dtype in walk.outs]
    outputs = tuple(jax.ShapeDtypeStruct((batch, rows, time, features), dtype) for rows, dtype in written)
    tree = jax.tree.structure((operands, ends, outputs, ends))

    def kernel(*refs):
        _walk_block(walk, blocks, *jax.tree.unflatten(tree, refs))

    results = pl.pallas_call(
        kernel,
        out_shape=ends + outputs,
        grid=(batch, pl.cdiv(features, blocks.wide), blocks.count),
        in_specs=specs,
        out_specs=(blocks.state,) * len(ends) + tuple(blocks.sequence(rows) for rows, _ in written),
        scratch_shapes=tuple(pltpu.VMEM((1, blocks.wide), c.dtype) for c in walk.carry),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ranjax_walk",
    )(*jax.tree.leaves(operands))
    found = tuple(out[:, 0] if out.shape[1] == 1 else jnp.swapaxes(out, 1, 2) for out in results[len(ends) :])
    return tuple(end[:, 0] for end in results[: len(ends)]), found


class Blocks(NamedTuple):
    """How time and features are cut; blocks are visited in the order of the walk."""

    tall: int
    wide: int
    count: int
    tiles: int
    backwards: bool

    @classmethod
    def of(cls, walk: Walk) -> "Blocks":
        _, time, features = walk.sizes
        tall = min(TIME, pl.cdiv(time, TILE) * TILE)
        wide = min(FEATURES, pl.cdiv(features, LANES) * LANES)
        return cls(tall, wide, pl.cdiv(time, tall), pl.cdiv(time, TILE), walk.backwards)

    def at(self, k: Any) -> Any:
        """The block of time that is visited as number `k`."""
        return self.count - 1 - k if self.backwards else k

    def sequence(self, rows: int) -> pl.BlockSpec:
        """Of an array `(batch, planes, time, features)`."""
        return pl.BlockSpec((1, rows, self.tall, self.wide), lambda b, j, k: (b, 0, self.at(k), j))

    @property
    def state(self) -> pl.BlockSpec:
        """Of an array `(batch, 1, features)`."""
        return pl.BlockSpec((1, 1, self.wide), lambda b, j, k: (b, 0, j))

    @property
    def halo(self) -> pl.BlockSpec:
        """The tile that comes next after a block, as far as there is one."""

        def index(b, j, k):
            each = self.tall // TILE
            tile = self.at(k) * each - 1 if self.backwards else (self.at(k) + 1) * each
            return b, 0, _within(tile, self.tiles - 1), j

        return pl.BlockSpec((1, 1, TILE, self.wide), index)


class Operands(NamedTuple):
    """What the kernel reads, or the references to it: planes before time."""

    carry: Any
    constants: Any
    arrays: Any
    ahead: Any


def _operands(walk: Walk, blocks: Blocks) -> tuple[Operands, list[pl.BlockSpec]]:
    """The operands, and how each is cut."""
    constant = pl.BlockSpec((1, blocks.wide), lambda b, j, k: (0, j))
    specs = [blocks.state] * len(walk.carry) + [constant] * len(walk.constants)
    specs += [blocks.sequence(planes(a)) for a in walk.arrays]
    ahead = ()
    if walk.ahead is not None:
        states, edge = (a[:, None] for a in walk.ahead)
        ahead = states, states, edge
        specs += [blocks.sequence(1), blocks.halo, blocks.state]
    arrays = tuple(a[:, None] if planes(a) == 1 else jnp.swapaxes(a, 1, 2) for a in walk.arrays)
    operands = Operands(tuple(c[:, None] for c in walk.carry), tuple(c[None] for c in walk.constants), arrays, ahead)
    return operands, specs


def _walk_block(walk: Walk, blocks: Blocks, refs: Operands, ends: Any, outputs: Any, carried: Any) -> None:
    """One program: the steps of one block, from the carry that the block before it left."""
    k, tiles = pl.program_id(2), blocks.tall // TILE
    start = blocks.at(k) * blocks.tall  # the time of the block's first row

    @pl.when(k == 0)
    def _():
        for ref, initial in zip(carried, refs.carry, strict=True):
            ref[...] = initial[0]

    def several(n, carry):
        n = tiles - 1 - n if walk.backwards else n
        carry, made = _walk_tile(walk, refs, carry, n, start + n * TILE)
        places = [(ref, plane) for ref in outputs for plane in range(ref.shape[1])]
        for (ref, plane), rows in zip(places, zip(*made, strict=True), strict=True):
            ref[0, plane, _tile(n), :] = jnp.concatenate(rows).astype(ref.dtype)
        return carry

    carry = lax.fori_loop(jnp.int32(0), jnp.int32(tiles), several, tuple(ref[...] for ref in carried))
    for ref, end, row in zip(carried, ends, carry, strict=True):
        ref[...] = row
        end[0] = row


def _walk_tile(walk: Walk, refs: Operands, carry: Rows, n: Any, start: Any) -> tuple[Rows, list[Rows]]:
    """The steps of tile number `n` of a block, which begins at the time `start`: the carry, and every step's rows."""
    time, dtype = walk.sizes[1], carry[0].dtype
    constants = tuple(ref[...] for ref in refs.constants)
    tiles = [ref[0, plane, _tile(n), :].astype(dtype) for ref in refs.arrays for plane in range(ref.shape[1])]
    if refs.ahead:
        tiles.append(_tile_ahead(walk, refs, n, start))
    made: list[Rows] = [()] * TILE
    for r in reversed(range(TILE)) if walk.backwards else range(TILE):
        after, made[r] = walk.step(carry, constants, tuple(tile[r : r + 1] for tile in tiles))
        inside = start + r < time  # the last block may reach beyond the sequence
        carry = tuple(jnp.where(inside, new, old) for new, old in zip(after, carry, strict=True))
    return carry, made


def _tile_ahead(walk: Walk, refs: Operands, n: Any, start: Any) -> Array:
    """For every row of a tile the row of the step that comes next, and the edge for the last step of the walk."""
    states, halo, edge = refs.ahead
    dtype, last = walk.carry[0].dtype, states.shape[2] // TILE - 1
    beyond = n == 0 if walk.backwards else n == last
    neighbour = states[0, 0, _tile(_within(n - 1 if walk.backwards else n + 1, last)), :]
    neighbour = jnp.where(beyond, halo[0, 0], neighbour)
    tile = states[0, 0, _tile(n), :]
    if walk.backwards:
        rows = jnp.concatenate([neighbour[TILE - 1 :], tile[: TILE - 1]])
    else:
        rows = jnp.concatenate([tile[1:], neighbour[:1]])
    moments = start + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    final = 0 if walk.backwards else walk.sizes[1] - 1
    return jnp.where(moments == final, edge[0].astype(dtype), rows.astype(dtype))


def _within(n: Any, last: int) -> Any:
    """`n` or what comes nearest to it from 0 to `last`; in 32 bits, also where JAX counts in 64, as in the loop."""
    return lax.max(jnp.int32(0), lax.min(n, jnp.int32(last)))


def _tile(n: Any) -> Any:
    return pl.ds(pl.multiple_of(n * TILE, TILE), TILE)
