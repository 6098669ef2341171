"""What a solver returns beside the states: whether it succeeded, and after how many iterations."""

from enum import IntEnum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

ON_FAILURE = (
    "With on_failure='sequential' (the default) the returned values come from the sequential scan; with "
    "on_failure='nan' they are NaN."
)


class Status(IntEnum):
    """How a solve ended. A larger status is a worse one.

    Attributes:
      SUCCESS: the residual is within the tolerance, or the solver does not iterate.
      MAX_ITERATIONS: the residual is above the tolerance after `max_iterations`.
      NOT_FINITE: the residual is NaN or infinite, also where an earlier chunk failed with `on_failure="nan"`.
    """

    SUCCESS = 0
    MAX_ITERATIONS = 1
    NOT_FINITE = 2


class Result(NamedTuple):
    """How a solve ended; of a sequence that is solved in chunks, the worst of each value over the chunks.

    Attributes:
      status: int32, a `Status`: 0 success, 1 `max_iterations` reached, 2 residual not finite.
      iterations: int32, the number of iterations; 0 for a solver that does not iterate.
      residual: the largest one-step residual, relative to the larger of the two states of the step; 0 for a solver
        that does not iterate. After a failure it is that of the start of the last iteration.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> cell, x = ranjax.RANCell(features=4), jax.random.normal(jax.random.key(1), (2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> solver = ranjax.FixedPoint(max_iterations=1)
      >>> _, result = ranjax.solve(params, x, gates="recurrent", solver=solver)
      >>> bool(result.converged), ranjax.solvers.Status(int(result.status)).name
      (False, 'MAX_ITERATIONS')
    """

    status: Array
    iterations: Array
    residual: Array

    @property
    def converged(self) -> Array:
        """Whether the solve succeeded: bool, of the shape of `status`. Works inside `jit`."""
        return self.status == Status.SUCCESS

    @property
    def message(self) -> str:
        """What happened and what to do, as text; of several results (under `vmap`), that of the worst.

        Raises:
          TypeError: inside `jit`, where the values are not known.
        """
        if any(isinstance(value, Tracer) for value in self):
            raise TypeError(
                "`message` needs concrete values; got tracers. Return the result from `jit` and read it there."
            )
        status, iterations, residual = (np.atleast_1d(np.asarray(value)) for value in self)
        worst = status == status.max()
        count, size = int(iterations[worst].max()), float(residual[worst].max())
        message = _message(Status(int(status.max())), count, size)
        return message if status.size == 1 else f"{int(worst.sum())} of {status.size} solves: {message}"


def _message(status: Status, count: int, residual: float) -> str:
    """The message of one solve."""
    iterations = f"{count} iteration" + "s" * (count != 1)
    if status is Status.SUCCESS:
        if count == 0:
            return "Solved without iterating."
        return f"Converged within {iterations}, with a relative residual of at most {residual:.1e}."
    if status is Status.MAX_ITERATIONS:
        return (
            f"Not converged: {iterations} (`max_iterations`) ended with a relative residual of {residual:.1e}, above "
            f"the tolerance. {ON_FAILURE} Raise `max_iterations` or the tolerance, lower `chunk`, or use "
            "solver='sequential'."
        )
    return (
        f"Not converged: a residual became NaN or infinite, within {iterations}. {ON_FAILURE} Check inputs and "
        "parameters for NaN and infinity. If all are finite, the iteration overflowed, or an earlier chunk failed with "
        "on_failure='nan': use solver='sequential'."
    )


def exact(dtype: jnp.dtype) -> Result:
    """The result of a solver that does not iterate."""
    return Result(jnp.int32(Status.SUCCESS), jnp.int32(0), jnp.zeros((), dtype))


def worst(results: Result) -> Result:
    """The worst of several results, stacked along the first axis."""
    return Result(*(jnp.max(value, axis=0) for value in results))
