"""One walk over time, on three kinds of machine.

A walk visits the steps of a recurrence one after another, forwards or backwards in time. It carries rows
`(batch, features)` along, reads one row of every array at each step and writes one row of every output, so nothing
that a step makes on its way is ever stored. All walks are functions

    walk(step, carry, constants, arrays, outs, *, ahead=None, backwards=False, affine=False, in_place=False)
        -> (carry, outputs)

    step       (carry, constants, rows) -> (carry, rows of the outputs): elementwise, the same for every feature
    carry      tuple of arrays (batch, features): what the first step starts from; returned as the last step leaves it
    constants  tuple of arrays (features,), the same at every step
    arrays     tuple of arrays (batch, time, features), which give a row each, or (batch, time, planes, features),
               which give a row for each of their planes
    outs       for each output the number of the array whose shape it has, and its dtype
    ahead      array (batch, time, features) and array (batch, features): the last row that a step reads is the
               array's row of the step that comes next, and at the last step the second array
    backwards  from the last step to the first
    affine     the carry is one array, and each step an affine map of it
    in_place   the rows of the outputs are those of the carry; they may be written over the arrays whose shapes they
               have, so that no new memory is touched

All arithmetic is in the dtype of the carry. There is at least one step, and none of the sizes is 0. `plain` serves
every platform; `gpu` and `tpu` have a kernel each.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

Rows = tuple[Array, ...]
Step = Callable[[Rows, Rows, Rows], tuple[Rows, Rows]]
Outs = tuple[tuple[int, Any], ...]
Walk = Callable[..., tuple[Rows, Rows]]


def planes(array: Any) -> int:
    """How many rows an array gives to a step."""
    return 1 if array.ndim == 3 else array.shape[2]


def affine_map(step: Step) -> Step:
    """A step for the map of the carry that many steps make together: carries its offset and its slope."""

    def compose(carry, constants, rows):
        (offset,), (slope,) = jax.jvp(lambda *c: step(c, constants, rows)[0], carry[:1], carry[1:])
        return (offset, slope), ()

    return compose
