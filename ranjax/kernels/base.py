"""Walks over time: what every recurrence here is solved by, in plain JAX and as kernels for GPU and TPU.

A walk visits the steps of a recurrence one after another, forwards or backwards in time. It carries rows
`(batch, features)` along, reads one row of every array at each step and writes one row of every output, so nothing
that a step makes on its way is ever stored. Every solver is a function of a `Walk` that returns what the last step
leaves of the carry, and the outputs. `plain` has those for every platform; `gpu` and `tpu` have a kernel each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Rows = tuple[Array, ...]
Step = Callable[[Rows, Rows, Rows], tuple[Rows, Rows]]


class Walk(NamedTuple):
    """What to walk over. All arithmetic is in the dtype of the carry; none of the sizes is 0.

    Attributes:
      step: (carry, constants, rows) -> (carry, rows of the outputs); elementwise, the same for every feature.
      carry: arrays `(batch, features)` that the first step starts from.
      arrays: `(batch, time, features)`, which give a row each, or `(batch, time, planes, features)`, which give a row
        for each of their planes, two or more.
      outs: for each output the number of the array whose shape it has, and its dtype.
      constants: arrays `(features,)`, the same at every step.
      ahead: array `(batch, time, features)` and edge `(batch, features)`: the last row that a step reads is the
        array's row of the step that comes next, the edge at the last step.
      backwards: from the last step to the first.
      affine: the carry is one array, and each step an affine map of it.
      in_place: the rows of the outputs are those of the carry; they may be written over the arrays whose shapes they
        have, so that no new memory is touched.
    """

    step: Step
    carry: Rows
    arrays: Rows
    outs: tuple[tuple[int, Any], ...]
    constants: Rows = ()
    ahead: tuple[Array, Array] | None = None
    backwards: bool = False
    affine: bool = False
    in_place: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, time, features."""
        batch, time, *_, features = self.arrays[0].shape
        return batch, time, features


Solver = Callable[[Walk], tuple[Rows, Rows]]


def planes(array: Any) -> int:
    """How many rows an array gives to a step."""
    return 1 if len(array.shape) == 3 else array.shape[2]


def affine_map(step: Step) -> Step:
    """A step for the map of the carry that many steps make together: carries its offset and its slope."""

    def compose(carry, constants, rows):
        (offset,), (slope,) = jax.jvp(lambda *c: step(c, constants, rows)[0], carry[:1], carry[1:])
        return (offset, slope), ()

    return compose


def apply_map(carry: Rows, _: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """A step that applies one such map to the carry, and writes the carry that it found."""
    (c,), (offset, slope) = carry, rows
    return (mapped(offset, slope, c),), (c,)


def mapped(offset: Array, slope: Array, c: Array) -> Array:
    """slope * c + offset; where the map forgets the carry, also one that is not finite."""
    return jnp.where(slope == 0, offset, slope * c + offset)
