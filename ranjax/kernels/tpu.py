"""The walk as a TPU kernel: a grid of (batch, features, time) blocks, the carry in vector memory from block to block.

Time is the innermost axis of the grid and is walked through in order; the other two are parallel. Rows are read and
written in tiles of eight, the height of a register.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ranjax.kernels import Outs, Rows, Step, planes

TILE = 8  # rows
LANES = 128
TIME = 256  # steps of a block
FEATURES = 512  # features of a block


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
    interpret: Any = False,
) -> tuple[Rows, Rows]:
    """See `ranjax.kernels`."""
    batch, time, *_, features = arrays[0].shape
    tall, wide = min(TIME, _multiple(time, TILE)), min(FEATURES, _multiple(features, LANES))
    blocks = pl.cdiv(time, tall)

    def block(k):
        return blocks - 1 - k if backwards else k

    def next_tile(k):
        tile = block(k) * (tall // TILE) - 1 if backwards else (block(k) + 1) * (tall // TILE)
        return jnp.clip(tile, 0, pl.cdiv(time, TILE) - 1)

    def sequence(rows):
        return pl.BlockSpec((1, rows, tall, wide), lambda b, j, k: (b, 0, block(k), j))

    state = pl.BlockSpec((1, 1, wide), lambda b, j, k: (b, 0, j))
    constant = pl.BlockSpec((1, wide), lambda b, j, k: (0, j))
    halo = pl.BlockSpec((1, 1, TILE, wide), lambda b, j, k: (b, 0, next_tile(k), j))
    planes_first = tuple(a[:, None] if a.ndim == 3 else jnp.swapaxes(a, 1, 2) for a in arrays)
    operands = (tuple(c[:, None] for c in carry), tuple(c[None] for c in constants), planes_first, ())
    in_specs = ((state,) * len(carry), (constant,) * len(constants), tuple(sequence(planes(a)) for a in arrays), ())
    if ahead is not None:
        states = ahead[0][:, None]
        operands = (*operands[:3], (states, states, ahead[1][:, None]))
        in_specs = (*in_specs[:3], (sequence(1), halo, state))

    ends = tuple(jax.ShapeDtypeStruct((batch, 1, features), c.dtype) for c in carry)
    like = tuple(arrays[number] for number, _ in outs)
    outputs = tuple(
        jax.ShapeDtypeStruct((batch, planes(a), time, features), dtype)
        for a, (_, dtype) in zip(like, outs, strict=True)
    )

    def kernel(*refs):
        tree = jax.tree.structure((operands, ends, outputs, ends))
        _walk_block(
            step,
            *jax.tree.unflatten(tree, refs),
            time=time,
            block=block(pl.program_id(2)),
            first=pl.program_id(2) == 0,
            backwards=backwards,
        )

    results = pl.pallas_call(
        kernel,
        out_shape=ends + outputs,
        grid=(batch, pl.cdiv(features, wide), blocks),
        in_specs=jax.tree.leaves(in_specs, is_leaf=lambda spec: isinstance(spec, pl.BlockSpec)),
        out_specs=(state,) * len(ends) + tuple(sequence(planes(a)) for a in like),
        scratch_shapes=tuple(pltpu.VMEM((1, wide), c.dtype) for c in carry),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="ranjax_walk",
    )(*jax.tree.leaves(operands))
    return (
        tuple(end[:, 0] for end in results[: len(ends)]),
        tuple(
            out[:, 0] if a.ndim == 3 else jnp.swapaxes(out, 1, 2)
            for out, a in zip(results[len(ends) :], like, strict=True)
        ),
    )


def _walk_block(
    step: Step,
    operands: Any,
    ends: Any,
    outputs: Any,
    carried: Any,
    *,
    time: int,
    block: Array,
    first: Array,
    backwards: bool,
) -> None:
    """One program: the steps of one block, from the carry that the block before it left."""
    carry_refs, constant_refs, array_refs, ahead_refs = operands
    tall, dtype = array_refs[0].shape[2], carried[0].dtype
    start = block * tall  # the time of the block's first row
    order = list(reversed(range(TILE))) if backwards else list(range(TILE))
    final = 0 if backwards else time - 1

    @pl.when(first)
    def _():
        for ref, initial in zip(carried, carry_refs, strict=True):
            ref[...] = initial[0]

    constants = tuple(ref[...] for ref in constant_refs)

    def tile_of(ref, plane, n):
        return ref[0, plane, pl.ds(pl.multiple_of(n * TILE, TILE), TILE), :].astype(dtype)

    def rows_ahead(n):
        """The rows of the tile that are read ahead, and the one from the tile that comes next."""
        states, halo, edge = ahead_refs
        last = tall // TILE - 1
        beyond = n == 0 if backwards else n == last
        neighbour = tile_of(states, 0, jnp.clip(n - 1 if backwards else n + 1, 0, last))
        neighbour = jnp.where(beyond, halo[0, 0].astype(dtype), neighbour)
        tile = tile_of(states, 0, n)
        if backwards:
            tile = jnp.concatenate([neighbour[TILE - 1 :], tile[: TILE - 1]])
        else:
            tile = jnp.concatenate([tile[1:], neighbour[:1]])
        return tile, edge[0].astype(dtype)

    def walk_tile(k, carry):
        n = tall // TILE - 1 - k if backwards else k
        tiles = [tile_of(ref, plane, n) for ref in array_refs for plane in range(ref.shape[1])]
        tile_ahead, edge = rows_ahead(n) if ahead_refs else (jnp.zeros(()), jnp.zeros(()))
        made: list[Rows] = [()] * TILE
        for r in order:
            moment = start + n * TILE + r
            rows = tuple(tile[r : r + 1] for tile in tiles)
            if ahead_refs:
                rows += (jnp.where(moment == final, edge, tile_ahead[r : r + 1]),)
            after, made[r] = step(carry, constants, rows)
            inside = moment < time  # the last block may reach beyond the sequence
            carry = tuple(jnp.where(inside, new, old) for new, old in zip(after, carry, strict=True))
        places = [(ref, plane) for ref in outputs for plane in range(ref.shape[1])]
        for (ref, plane), rows in zip(places, zip(*made, strict=True), strict=True):
            ref[0, plane, pl.ds(pl.multiple_of(n * TILE, TILE), TILE), :] = jnp.concatenate(rows).astype(ref.dtype)
        return carry

    carry = lax.fori_loop(0, tall // TILE, walk_tile, tuple(ref[...] for ref in carried))
    for ref, end, row in zip(carried, ends, carry, strict=True):
        ref[...] = row
        end[0] = row


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of
