"""The walk as a GPU kernel: one channel a thread, its carry in registers, the next rows on their way from memory.

Where batch and features are too few to fill the chip and the steps are affine, time is walked through in several
places at once. A program has lanes: each takes a few steps of the program's next tile of time, and what a lane starts
from is found from the affine maps of the lanes before it; every row is read once. Where even that is not enough, time
is split into segments for programs of their own: a first walk reduces each segment to one affine map of the carry, a
second finds the carries that the segments start from, a third walks through all of them. The route is Pallas on Triton.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ranjax.kernels.base import Rows, Step, Walk, affine_map, apply_map, mapped, planes
from ranjax.kernels.reference import chunked

LOADS = 16  # of a thread on their way while as many are worked on; the time of compilation grows with their cube
THREADS = 2**16  # that keep the chip busy
WIDE = 64  # channels of a program without lanes
NARROW = 32  # and with lanes
FEWEST, LANES = 4, 16  # lanes, unless time is too short for them
FEW = 2**11  # channels that lanes alone cannot help
SHORTEST = 64  # steps of a segment


class Tiling(NamedTuple):
    """How a walk is spread over the chip.

    Attributes:
      channels: of a program.
      lanes: pieces of a tile of time that a program walks through side by side.
      segments: pieces of the whole of time that have a program each.
    """

    channels: int = WIDE
    lanes: int = 1
    segments: int = 1

    @classmethod
    def of(cls, walk: Walk) -> "Tiling":
        """A power of two of channels and of lanes; segments and lanes never together."""
        batch, time, features = walk.sizes
        channels = batch * features
        if not walk.affine or channels >= THREADS:
            return cls()
        if channels < FEW and time >= 4 * SHORTEST:
            return cls(segments=min(THREADS // channels, time // SHORTEST))
        wanted = min(max(FEWEST, THREADS // channels), LANES, pl.cdiv(time, 2 * ahead(walk)))
        lanes = 2 ** (wanted.bit_length() - 1)
        return cls(NARROW if lanes > 1 else WIDE, lanes)

    @property
    def threads(self) -> int:
        return self.channels * self.lanes


def ahead(walk: Walk) -> int:
    """How many steps a lane takes of a tile: so many rows are on their way."""
    rows = sum(planes(a) for a in walk.arrays) + (walk.ahead is not None)
    return max(1, LOADS // rows)


def solve(walk: Walk, *, interpret: bool = False) -> tuple[Rows, Rows]:
    """Walks by the kernel; `interpret` runs it anywhere, slowly."""
    if max(a.size for a in walk.arrays) >= 2**31:  # the kernel counts in 32 bits
        return chunked(walk)
    tiling = Tiling.of(walk)
    carry = tuple(c[:, None] for c in walk.carry)
    if tiling.segments > 1:
        (batch, _, features), (first,) = walk.sizes, walk.carry
        still = jnp.zeros((batch, tiling.segments, features), first.dtype)
        reduction = walk._replace(step=affine_map(walk.step), carry=(still, still + 1), outs=(), affine=False)
        maps, _ = _launch(reduction, tiling, interpret)
        starts = Walk(apply_map, walk.carry, maps, ((0, first.dtype),), affine=True)
        _, carry = solve(starts, interpret=interpret)
    ends, outputs = _launch(walk._replace(carry=carry), tiling, interpret)
    return tuple(end[:, -1] for end in ends), outputs


def _launch(walk: Walk, tiling: Tiling, interpret: bool) -> tuple[Rows, Rows]:
    """One launch; the carries are `(batch, segments, features)`."""
    batch, time, features = walk.sizes
    blocks, segments, dtype = pl.cdiv(features, tiling.channels), tiling.segments, walk.carry[0].dtype
    programs = batch * segments * blocks
    operands = Operands(walk.carry, walk.constants, walk.arrays, walk.ahead or ())
    ends = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in walk.carry)
    outputs = tuple(jax.ShapeDtypeStruct(walk.arrays[number].shape, dtype) for number, dtype in walk.outs)
    board = (jax.ShapeDtypeStruct((programs, 2, 2, tiling.threads), dtype),) if tiling.lanes > 1 else ()
    tree, results = jax.tree.structure((operands, ends, outputs, board)), (*ends, *outputs, *board)

    def kernel(*refs):
        refs, end_refs, output_refs, board = jax.tree.unflatten(tree, refs)
        place = Place.of(pl.program_id(0), segments, blocks, features, tiling, dtype)
        board = Board(board[0], place, not interpret) if board else None
        _walk_segment(walk, refs, end_refs, output_refs, board, place, pl.cdiv(time, segments))

    found = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct((math.prod(r.shape),), r.dtype) for r in results),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=pl.cdiv(tiling.threads, 32)),
        interpret=interpret,
        name="ranjax_walk",
    )(*(a.reshape(-1) for a in jax.tree.leaves(operands)))
    found = tuple(flat.reshape(r.shape) for flat, r in zip(found, results, strict=True))
    return found[: len(ends)], found[len(ends) : len(ends) + len(outputs)]


class Operands(NamedTuple):
    """What the kernel reads, or the references to it, flattened."""

    carry: Any
    constants: Any
    arrays: Any
    ahead: Any


class Place(NamedTuple):
    """Where a program stands, and its threads: each has a channel in one of the lanes."""

    program: Array
    batch: Array
    segment: Array
    channel: Array
    inside: Array
    lane: Array | int
    features: int
    tiling: Tiling
    dtype: Any

    @classmethod
    def of(cls, program: Array, segments: int, blocks: int, features: int, tiling: Tiling, dtype: Any) -> "Place":
        thread, channels = lax.iota(jnp.int32, tiling.threads), tiling.channels
        block, rest = _rem(program, blocks), _div(program, blocks)
        channel = block * channels + _rem(thread, channels)
        lane = _div(thread, channels) if tiling.lanes > 1 else 0
        batch, segment = _div(rest, segments), _rem(rest, segments)
        return cls(program, batch, segment, channel, channel < features, lane, features, tiling, dtype)

    def row(self, number: Array | int) -> Array:
        """Where the threads find theirs of a row of features, by its number in a flattened array."""
        return number * self.features + self.channel

    def load(self, ref: Any, index: Array) -> Array:
        """What threads beyond the last channel load is never stored."""
        return plgpu.load(ref.at[index], mask=self.inside).astype(self.dtype)

    def store(self, ref: Any, index: Array, values: Array, where: Array | bool = True) -> None:
        there = self.inside & where
        index = jnp.where(there, index, ref.size)  # nowhere, for masked threads
        plgpu.store(ref.at[index], values.astype(ref.dtype), mask=there)


class Board(NamedTuple):
    """Where the lanes of a program write their maps for each other, on one of two sides in turn."""

    ref: Any
    place: Place
    waits: bool

    def exchange(self, side: Array, maps: Rows, carry: Array) -> tuple[Array, Array]:
        """The carry that each lane starts from, and the one that the last lane leaves."""
        channels, lanes = self.place.tiling[:2]
        threads = lax.iota(jnp.int32, channels * lanes)
        first = (self.place.program * 2 + side) * 2 * channels * lanes
        for n, row in enumerate(maps):
            plgpu.store(self.ref.at[first + n * channels * lanes + threads], row)
        if self.waits:
            plgpu.debug_barrier()
        column, start, end = first + _rem(threads, channels), carry, carry
        for n in range(lanes):
            offset, slope = (plgpu.load(self.ref.at[column + (m * lanes + n) * channels]) for m in range(2))
            end = mapped(offset, slope, end)
            start = jnp.where(n < self.place.lane, end, start)
        return start, end


class Segment(NamedTuple):
    """What one program walks through: steps number `begin` to `stop`, each lane `many` at a time."""

    walk: Walk
    refs: Operands
    outputs: Any
    place: Place
    begin: Array
    stop: Array
    many: int
    constants: Rows
    edge: Array | None

    def first(self, k: Array | int) -> Array:
        """The number of the first step of each lane in tile number `k`."""
        return self.begin + k * (self.place.tiling.lanes * self.many) + self.place.lane * self.many

    def rows(self, k: Array | int) -> tuple[Rows, ...]:
        """What the steps of a tile read."""
        return tuple(_rows(self.walk, self.refs, self.edge, self.place, self.first(k) + r) for r in range(self.many))

    def through(self, step: Step, k: Array, carry: Rows, rows: tuple[Rows, ...]) -> Rows:
        """The carry of each lane after its steps in a tile; what they make is written."""
        for r in range(self.many):
            n = self.first(k) + r
            after, made = step(carry, self.constants, rows[r])
            carry = tuple(jnp.where(n < self.stop, new, old) for new, old in zip(after, carry, strict=True))
            if made:
                self.write(n, made)
        return carry

    def write(self, n: Array, made: Rows) -> None:
        """The rows that step number `n` has made."""
        written = [planes(self.walk.arrays[number]) for number, _ in self.walk.outs]
        places = _places(self.walk, self.place, self.outputs, written, n)
        for (ref, index), values in zip(places, made, strict=True):
            self.place.store(ref, index, values, where=n < self.stop)


def _walk_segment(
    walk: Walk, refs: Operands, ends: Any, outputs: Any, board: Board | None, place: Place, length: int
) -> None:
    """One program. Rows are asked for a tile before they are needed."""
    begin, time, many = place.segment * length, walk.sizes[1], ahead(walk)
    stop = jnp.minimum(begin + length, time)
    constants = tuple(place.load(ref, place.channel) for ref in refs.constants)
    edge = place.load(refs.ahead[1], place.row(place.batch)) if refs.ahead else None
    segment = Segment(walk, refs, outputs, place, begin, stop, many, constants, edge)

    def several(k, loop):
        carry, now = loop
        later = segment.rows(k + 1)
        if board is None:
            return segment.through(walk.step, k, carry, now), later
        still = jnp.zeros_like(carry[0])
        maps = segment.through(affine_map(walk.step), k, (still, still + 1), now)
        start, end = board.exchange(_rem(k, 2), maps, carry[0])
        segment.through(walk.step, k, (start,), now)
        return (end,), later

    state = place.row(place.batch * place.tiling.segments + place.segment)
    initial = tuple(place.load(ref, state) for ref in refs.carry)
    tiles = pl.cdiv(length, place.tiling.lanes * many)
    carry, _ = lax.fori_loop(0, tiles, several, (initial, segment.rows(0)))
    for ref, values in zip(ends, carry, strict=True):
        place.store(ref, state, values, where=place.lane == 0)


def _rows(walk: Walk, refs: Operands, edge: Array | None, place: Place, n: Array) -> Rows:
    """What step number `n` reads; beyond the last, what that one reads."""
    time, read = walk.sizes[1], [planes(a) for a in walk.arrays]
    found = [place.load(ref, index) for ref, index in _places(walk, place, refs.arrays, read, n)]
    if edge is not None:
        following = place.load(refs.ahead[0], place.row(place.batch * time + _moment(walk, n + 1)))
        found.append(jnp.where(n + 1 < time, following, edge))
    return tuple(found)


def _places(walk: Walk, place: Place, refs: Any, counts: list[int], n: Array) -> list[tuple[Any, Array]]:
    """The rows of step number `n`, of arrays of so many planes: reference and place of each."""
    number = place.batch * walk.sizes[1] + _moment(walk, n)
    rows = {count: [place.row(number * count + plane) for plane in range(count)] for count in set(counts)}
    return [(ref, row) for ref, count in zip(refs, counts, strict=True) for row in rows[count]]


def _moment(walk: Walk, n: Array) -> Array:
    """The time of step number `n`."""
    last = walk.sizes[1] - 1
    n = jnp.minimum(n, last)
    return last - n if walk.backwards else n


def _div(a: Array, b: int) -> Array:
    """Of integers that are not negative, as is the next; `jax.numpy` provides for those that are."""
    return lax.div(a, a.dtype.type(b))


def _rem(a: Array, b: int) -> Array:
    return lax.rem(a, a.dtype.type(b))
