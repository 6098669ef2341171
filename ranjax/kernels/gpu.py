"""A recurrence as a GPU kernel: one thread per channel, the carry in registers, loads of the next rows pipelined.

Small batches of few features do not fill the chip. If the steps are affine, time is then split, at one of two levels.

Lanes: a program reads tiles of time and gives each of its lanes a few steps of a tile. The affine maps of the earlier
lanes give the carry that a lane starts from. Every row is read once.

Segments: where lanes are not enough, the sequence is cut into segments, one program each. A first launch reduces each
segment to one affine map of the carry, a second finds the carries that the segments start from, a third runs all
segments.

The kernels use Pallas with the Triton back end, which JAX 0.12 deprecates. Where JAX comes without it, "auto" selects
another solver and "pallas" is refused (`ranjax.scan`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import ArrayLike

from ranjax.kernels.base import Recurrence, Rows, Step, affine_map, apply_map, mapped, planes
from ranjax.kernels.reference import chunked

LOADS = 16  # prefetched rows of a thread; compilation time grows with their cube
THREADS = 2**16  # enough to keep the chip busy
WIDE = 64  # channels of a program without lanes
NARROW = 32  # channels of a program with lanes
FEWEST, LANES = 4, 16  # bounds on the number of lanes, where time is long enough
FEW = 2**11  # channels below which lanes alone do not fill the chip
SHORTEST = 64  # steps of a segment


class Tiling(NamedTuple):
    """How a recurrence is spread over the chip.

    Attributes:
      channels: of a program.
      lanes: pieces of a tile of time that a program runs in parallel.
      segments: pieces of the sequence, one program each.
    """

    channels: int = WIDE
    lanes: int = 1
    segments: int = 1

    @classmethod
    def of(cls, recurrence: Recurrence) -> "Tiling":
        """Channels and lanes are powers of two; segments and lanes are never combined."""
        batch, time, features = recurrence.sizes
        channels = batch * features
        if not recurrence.affine or channels >= THREADS:
            return cls()
        if channels < FEW and time >= 4 * SHORTEST:
            return cls(segments=min(THREADS // channels, time // SHORTEST))
        wanted = min(max(FEWEST, THREADS // channels), LANES, pl.cdiv(time, 2 * steps_ahead(recurrence)))
        lanes = 2 ** (wanted.bit_length() - 1)
        return cls(NARROW if lanes > 1 else WIDE, lanes)

    @property
    def threads(self) -> int:
        return self.channels * self.lanes


def steps_ahead(recurrence: Recurrence) -> int:
    """The steps of a tile that one lane runs; their rows are prefetched."""
    rows = sum(planes(a) for a in recurrence.arrays) + (recurrence.ahead is not None)
    return max(1, LOADS // rows)


def run(recurrence: Recurrence, *, interpret: bool = False) -> tuple[Rows, Rows]:
    """Runs the recurrence by the kernel; `interpret=True` works on any platform, slowly."""
    if max(a.size for a in recurrence.arrays) >= 2**31:  # the kernel indexes with 32 bits
        return chunked(recurrence)
    tiling = Tiling.of(recurrence)
    carry = tuple(c[:, None] for c in recurrence.carry)
    if tiling.segments > 1:
        (batch, _, features), (first,) = recurrence.sizes, recurrence.carry
        zeros = jnp.zeros((batch, tiling.segments, features), first.dtype)
        reduction = recurrence._replace(
            step=affine_map(recurrence.step), carry=(zeros, zeros + 1), outs=(), affine=False
        )
        maps, _ = _launch(reduction, tiling, interpret)
        starts = Recurrence(apply_map, recurrence.carry, maps, ((0, first.dtype),), affine=True)
        _, carry = run(starts, interpret=interpret)
    ends, outputs = _launch(recurrence._replace(carry=carry), tiling, interpret)
    return tuple(end[:, -1] for end in ends), outputs


def _launch(recurrence: Recurrence, tiling: Tiling, interpret: bool) -> tuple[Rows, Rows]:
    """One kernel launch; the carries are `(batch, segments, features)`."""
    batch, time, features = recurrence.sizes
    blocks, segments, dtype = pl.cdiv(features, tiling.channels), tiling.segments, recurrence.carry[0].dtype
    programs = batch * segments * blocks
    operands = Operands(recurrence.carry, recurrence.constants, recurrence.arrays, recurrence.ahead or ())
    ends = tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in recurrence.carry)
    outputs = tuple(jax.ShapeDtypeStruct(recurrence.arrays[number].shape, dtype) for number, dtype in recurrence.outs)
    board = (jax.ShapeDtypeStruct((programs, 2, 2, tiling.threads), dtype),) if tiling.lanes > 1 else ()
    tree, results = jax.tree.structure((operands, ends, outputs, board)), (*ends, *outputs, *board)

    def kernel(*refs):
        refs, end_refs, output_refs, board = jax.tree.unflatten(tree, refs)
        place = Place.of(pl.program_id(0), segments, blocks, features, tiling, dtype)
        board = Board(board[0], place, not interpret) if board else None
        _run_segment(recurrence, refs, end_refs, output_refs, board, place, pl.cdiv(time, segments))

    found = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct((math.prod(r.shape),), r.dtype) for r in results),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=pl.cdiv(tiling.threads, 32)),
        interpret=interpret,
        name="ranjax_recurrence",
    )(*(a.reshape(-1) for a in jax.tree.leaves(operands)))
    found = tuple(flat.reshape(r.shape) for flat, r in zip(found, results, strict=True))
    return found[: len(ends)], found[len(ends) : len(ends) + len(outputs)]


class Operands(NamedTuple):
    """The inputs of the kernel, or the references to them, flattened."""

    carry: Any
    constants: Any
    arrays: Any
    ahead: Any


class Place(NamedTuple):
    """The position of a program and of its threads; each thread has one channel in one lane."""

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
        """The indices of the threads' channels in row `number` of a flattened array."""
        return number * self.features + self.channel

    def load(self, ref: Any, index: Array) -> Array:
        """Threads beyond the last channel load undefined values, which are never stored."""
        return plgpu.load(ref.at[index], mask=self.inside).astype(self.dtype)

    def store(self, ref: Any, index: Array, values: Array, where: Array | bool = True) -> None:
        valid = self.inside & where
        index = jnp.where(valid, index, ref.size)  # out of range for masked threads
        plgpu.store(ref.at[index], values.astype(ref.dtype), mask=valid)


class Board(NamedTuple):
    """Memory where the lanes of a program exchange their maps; two buffers are used alternately."""

    ref: Any
    place: Place
    waits: bool

    def exchange(self, side: Array, maps: Rows, carry: Array) -> tuple[Array, Array]:
        """The carry that each lane starts from, and the carry after the last lane."""
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
    """The steps of one program: `begin` to `stop`, `steps` at a time in each lane."""

    recurrence: Recurrence
    refs: Operands
    outputs: Any
    place: Place
    begin: Array
    stop: Array
    steps: int
    constants: Rows
    boundary: Array | None

    def first(self, k: Array | int) -> Array:
        """The number of the first step of each lane in tile number `k`."""
        return self.begin + k * (self.place.tiling.lanes * self.steps) + self.place.lane * self.steps

    def rows(self, k: Array | int) -> tuple[Rows, ...]:
        """The rows that the steps of a tile read."""
        return tuple(
            _load_rows(self.recurrence, self.refs, self.boundary, self.place, self.first(k) + r)
            for r in range(self.steps)
        )

    def through(self, step: Step, k: Array, carry: Rows, rows: tuple[Rows, ...]) -> Rows:
        """The carry of each lane after its steps in a tile; their outputs are written."""
        for r in range(self.steps):
            n = self.first(k) + r
            after, out_rows = step(carry, self.constants, rows[r])
            carry = tuple(jnp.where(n < self.stop, new, old) for new, old in zip(after, carry, strict=True))
            if out_rows:
                self.write(n, out_rows)
        return carry

    def write(self, n: Array, out_rows: Rows) -> None:
        """Writes the output rows of step `n`."""
        written = [planes(self.recurrence.arrays[number]) for number, _ in self.recurrence.outs]
        places = _row_indices(self.recurrence, self.place, self.outputs, written, n)
        for (ref, index), values in zip(places, out_rows, strict=True):
            self.place.store(ref, index, values, where=n < self.stop)


def _run_segment(
    recurrence: Recurrence, refs: Operands, ends: Any, outputs: Any, board: Board | None, place: Place, length: int
) -> None:
    """One program. Rows are loaded one tile before they are used."""
    begin, time, steps = place.segment * length, recurrence.sizes[1], steps_ahead(recurrence)
    stop = jnp.minimum(begin + length, time)
    constants = tuple(place.load(ref, place.channel) for ref in refs.constants)
    boundary = place.load(refs.ahead[1], place.row(place.batch)) if refs.ahead else None
    segment = Segment(recurrence, refs, outputs, place, begin, stop, steps, constants, boundary)

    def several(k, loop):
        carry, now = loop
        later = segment.rows(k + 1)
        if board is None:
            return segment.through(recurrence.step, k, carry, now), later
        zeros = jnp.zeros_like(carry[0])
        maps = segment.through(affine_map(recurrence.step), k, (zeros, zeros + 1), now)
        start, end = board.exchange(_rem(k, 2), maps, carry[0])
        segment.through(recurrence.step, k, (start,), now)
        return (end,), later

    state = place.row(place.batch * place.tiling.segments + place.segment)
    initial = tuple(place.load(ref, state) for ref in refs.carry)
    tiles = pl.cdiv(length, place.tiling.lanes * steps)
    carry, _ = lax.fori_loop(0, tiles, several, (initial, segment.rows(0)))
    for ref, values in zip(ends, carry, strict=True):
        place.store(ref, state, values, where=place.lane == 0)


def _load_rows(recurrence: Recurrence, refs: Operands, boundary: Array | None, place: Place, n: Array) -> Rows:
    """The rows that step `n` reads; beyond the last step, those of the last."""
    time, read = recurrence.sizes[1], [planes(a) for a in recurrence.arrays]
    found = [place.load(ref, index) for ref, index in _row_indices(recurrence, place, refs.arrays, read, n)]
    if boundary is not None:
        following = place.load(refs.ahead[0], place.row(place.batch * time + _moment(recurrence, n + 1)))
        found.append(jnp.where(n + 1 < time, following, boundary))
    return tuple(found)


def _row_indices(
    recurrence: Recurrence, place: Place, refs: Any, counts: list[int], n: Array
) -> list[tuple[Any, Array]]:
    """Reference and index of every row of step `n`, for arrays with `counts` planes."""
    number = place.batch * recurrence.sizes[1] + _moment(recurrence, n)
    rows = {count: [place.row(number * count + plane) for plane in range(count)] for count in set(counts)}
    return [(ref, row) for ref, count in zip(refs, counts, strict=True) for row in rows[count]]


def _moment(recurrence: Recurrence, n: Array) -> Array:
    """The time index of step `n`."""
    last = recurrence.sizes[1] - 1
    n = jnp.minimum(n, last)
    return last - n if recurrence.reverse else n


def _div(a: ArrayLike, b: int) -> Array:
    """Quotient of integers that are not negative; `jax.numpy` adds code for negative ones."""
    a = jnp.asarray(a)  # a number, where `jax.disable_jit` runs the loops in Python
    return lax.div(a, a.dtype.type(b))


def _rem(a: ArrayLike, b: int) -> Array:
    """Remainder of integers that are not negative."""
    a = jnp.asarray(a)
    return lax.rem(a, a.dtype.type(b))
