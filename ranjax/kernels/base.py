"""The contract between a recurrence and what runs it.

A recurrence reads one row of every array at each step, updates its carry `(batch, features)` and writes one row of
every output. Intermediate values of a step are never stored. Every solver is a function of a `Recurrence` that returns
the carry after the last step, and the outputs. `reference` has the solvers in plain JAX; `gpu` and `tpu` have one
Pallas kernel each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Rows = tuple[Array, ...]
Step = Callable[[Rows, Rows, Rows], tuple[Rows, Rows]]


class Recurrence(NamedTuple):
    """What to run. All arithmetic is in the dtype of the carry; none of the sizes is 0.

    Attributes:
      step: (carry, constants, rows) -> (carry, rows of the outputs); elementwise, the same for every feature.
      carry: arrays `(batch, features)` that the first step starts from.
      arrays: `(batch, time, features)`, one row per step, or `(batch, time, planes, features)`, one row per step and
        plane, for two or more planes.
      outs: for each output the number of the array whose shape it has, and its dtype.
      constants: arrays `(features,)`, the same at every step.
      ahead: an array `(batch, time, features)` and a boundary row `(batch, features)`. A step reads the array's row of
        the next step as its last row; the last step reads the boundary row.
      reverse: run from the last step to the first.
      affine: the carry is one array, and each step is an affine map of it.
      in_place: the outputs are the carries, and may overwrite the arrays whose shapes they have. This saves memory
        traffic.
    """

    step: Step
    carry: Rows
    arrays: Rows
    outs: tuple[tuple[int, Any], ...]
    constants: Rows = ()
    ahead: tuple[Array, Array] | None = None
    reverse: bool = False
    affine: bool = False
    in_place: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, time, features."""
        batch, time, *_, features = self.arrays[0].shape
        return batch, time, features


Solver = Callable[[Recurrence], tuple[Rows, Rows]]


def planes(array: Any) -> int:
    """The number of rows that a step reads from an array."""
    return 1 if len(array.shape) == 3 else array.shape[2]


def affine_map(step: Step) -> Step:
    """A step that composes the affine maps of many steps: its carry is the offset and the slope of their product."""

    def compose(carry, constants, rows):
        (offset,), (slope,) = jax.jvp(lambda *c: step(c, constants, rows)[0], carry[:1], carry[1:])
        return (offset, slope), ()

    return compose


def apply_map(carry: Rows, _: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """A step that applies one affine map to the carry and writes the carry before it."""
    (c,), (offset, slope) = carry, rows
    return (mapped(offset, slope, c),), (c,)


def mapped(offset: Array, slope: Array, c: Array) -> Array:
    """slope * c + offset; the offset where the slope is 0, even if c is not finite."""
    return jnp.where(slope == 0, offset, slope * c + offset)
