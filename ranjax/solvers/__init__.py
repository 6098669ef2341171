"""The states of a whole sequence, from what its inputs contribute to each step.

Where each gate sees the input, or its own feature of h_{t-1} besides, a step is elementwise: one walk goes from the
pre-activations and the content straight to the states, and one walk backwards makes the gradients. Neither stores a
gate. Where the gates read all of h_{t-1}, see `recurrent`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from ranjax.cell import (
    ACTIVATIONS,
    Params,
    check_gates,
    checked_carry,
    checked_inputs,
    content,
    gates_of,
    gates_of_input,
    gates_of_state,
    promoted,
)
from ranjax.errors import check_choice
from ranjax.solvers.fixed_point import FixedPoint, Record, exact
from ranjax.solvers.elementwise import fused
from ranjax.solvers.masks import Gates, States, Steps, masked, seen
from ranjax.sharding import automatic, before, check_spread
from ranjax.solvers.recurrent import Way, recurrent_states, walk_through
from ranjax.scan import SOLVERS, State, linear_recurrence, state_dtype

FUSED = ("auto", "pallas")  # solvers that go from the pre-activations straight to the states
ITERATED = {"recurrent": "fixed_point", "diagonal": "newton"}  # names of the iteration over all steps, by the gates


def solve(
    params: Params,
    x: ArrayLike,
    c0: ArrayLike | None = None,
    *,
    gates: str,
    activation: str = "tanh",
    solver: str | FixedPoint = "auto",
    axis_name: str | None = None,
) -> tuple[Array, Record]:
    """The states of a recurrent additive network over a sequence, and what the solver did.

    Args:
      params: the parameters as a `RANCell` makes them.
      x: inputs `(*batch, time, in)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None is the same as zeros.
      gates: what the gates of these parameters see: `"recurrent"`, `"diagonal"` or `"input"`.
      activation: `"tanh"` or `"identity"`, the g of h = g(c). It is not in the parameters: give that of the cell.
      solver, axis_name: as for `RAN`, whose limits in forward mode and higher derivatives hold here too.

    Returns:
      The states c, `(*batch, time, features)`, and a `Record`: iterations, residual, converged.

    Raises:
      TypeError: for complex inputs.
      ValueError: for parameters that are not a cell's, for gates that are not those of the parameters, for a solver or
        an activation that does not fit them, for inputs or a state of another shape, for inputs that `axis_name` does
        not spread.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> cell, x = ranjax.RANCell(features=4), jnp.ones((2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> states, record = ranjax.solve(params, x, gates="recurrent", solver="fixed_point")
      >>> states.shape, bool(record.converged)
      ((2, 50, 4), True)
    """
    check_choice("activation", activation, ACTIVATIONS)
    params, x = checked_inputs(params, x)
    check_gates(gates, params)
    check_solver(solver, gates, axis_name)
    params, steps, first = prepared(params, x, c0)
    c, record = states(params, steps, first, activation=activation, solver=solver, axis_name=axis_name)
    return jnp.moveaxis(c, 0, -2), record


def prepared(
    params: Params,
    x: Array,
    c0: ArrayLike | None,
    starts: Array | None = None,
    padding: Array | None = None,
    dtype: Dtype | None = None,
) -> tuple[Params, Steps, State]:
    """The parameters in the dtype of the products, the masked steps, the first state."""
    params, x = promoted(params, x, dtype)
    steps = steps_of(params, x, x.ndim - 2, starts, padding)
    shape = steps.u.shape[1:]
    first = jnp.zeros(shape, state_dtype(steps.u)) if c0 is None else checked_carry("c0", c0, shape)
    return params, steps, first


def steps_of(params: Params, x: Array, time: int, starts: Array | None, padding: Array | None) -> Steps:
    """The masked steps, time first; `time` is the axis that it has in the inputs and the masks."""
    steps, masks = Steps(content(params, x), gates_of_input(params, x)), (starts, padding)
    steps, masks = jax.tree.map(lambda a: jnp.moveaxis(a, time, 0), (steps, masks))
    return masked(steps, *masks)


def check_solver(solver: str | FixedPoint, gates: str, axis_name: str | None = None) -> None:
    """Raises a ValueError where a solver does not fit the gates, or time that is spread over a mesh axis."""
    walks = ("auto", "sequential") if axis_name is None else ("auto",)
    fused = () if axis_name is not None else ("pallas",)
    allowed = {
        "input": tuple(SOLVERS),
        "diagonal": (*walks, *fused, "newton"),
        "recurrent": (*walks, "fixed_point"),
    }[gates]
    if isinstance(solver, FixedPoint) and gates in ITERATED:
        return
    why = f" with gates={gates!r}"
    if axis_name is not None:
        why += f" and axis_name={axis_name!r}, where no device can walk through all steps"
    if gates != "input":
        why += ". Gates that read h_{t-1} make no linear recurrence; gates='input' do"
    check_choice("solver", solver, allowed, why)


def states(
    params: Params,
    steps: Steps,
    c0: State,
    *,
    activation: str,
    solver: str | FixedPoint,
    axis_name: str | None = None,
) -> tuple[States, Record]:
    """The states c_1 ... c_T from the state `c0`, and what the solver did."""
    solved = partial(_states, activation=activation, solver=solver, axis_name=axis_name)
    return automatic(solved, params, steps, c0, like=steps.u, others=(PartitionSpec(),))


# Compiled once for a shape where it is called outside `jit`; inside, nothing is left of this one.
@partial(jax.jit, static_argnames=("activation", "solver", "axis_name"), inline=True)
def _states(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint, axis_name: str | None
) -> tuple[States, Record]:
    check_spread("The inputs", steps, axis_name)
    if steps.u.size == 0:
        return steps.u.astype(c0.dtype), exact(c0.dtype)
    gates = gates_of(params)
    if solver in FUSED and gates != "recurrent" and axis_name is None:
        weights = params["gates"].get("recurrent_kernel")
        return fused(steps, c0, weights, activation, str(solver)), exact(c0.dtype)
    steps = Steps(*(a.astype(c0.dtype) for a in steps))
    if gates == "input":
        return _linear_states(steps, c0, str(solver), axis_name), exact(c0.dtype)
    return recurrent_states(params, steps, c0, activation, Way(_iteration(solver, gates, axis_name), axis_name))


def states_and_gates(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint
) -> tuple[States, Gates]:
    """The states and the gates that made them: those of the walk; of a solver that keeps none, made anew from its
    states."""
    *leading, feature = jax.typeof(steps.u).sharding.spec
    both = partial(_states_and_gates, activation=activation, solver=solver)
    return automatic(both, params, steps, c0, like=steps.u, others=(PartitionSpec(*leading, None, feature),))


@partial(jax.jit, static_argnames=("activation", "solver"), inline=True)
def _states_and_gates(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint
) -> tuple[States, Gates]:
    gates = gates_of(params)
    if gates == "input":
        return states(params, steps, c0, activation=activation, solver=solver)[0], jax.nn.sigmoid(steps.z)
    iterated, fused = _iteration(solver, gates, None), solver in FUSED and gates == "diagonal"
    if iterated is None and not fused:
        return walk_through(params, steps, c0, activation)[1]
    c, _ = states(params, steps, c0, activation=activation, solver=solver)
    earlier = seen(steps.z[..., 1, :], before(c, c0, 0))
    wide = jax.tree.map(lambda p: p.astype(c0.dtype), params)
    return c, jax.nn.sigmoid(steps.z + gates_of_state(wide, earlier, activation))


def _iteration(solver: str | FixedPoint, gates: str, axis_name: str | None) -> FixedPoint | None:
    """The settings of the iteration over all steps, if it is what solves these gates."""
    if isinstance(solver, FixedPoint):
        return solver
    spread = axis_name is not None and solver == "auto"
    return FixedPoint() if gates in ITERATED and (spread or solver == ITERATED[gates]) else None


def _linear_states(steps: Steps, c0: State, solver: str, axis_name: str | None) -> States:
    """The states where the gates see the input only, as one linear recurrence."""
    i, f = jnp.moveaxis(jax.nn.sigmoid(steps.z), -2, 0)
    decay, inputs = jnp.moveaxis(f, 0, -2), jnp.moveaxis(i * steps.u, 0, -2)
    return jnp.moveaxis(linear_recurrence(decay, inputs, c0, solver=solver, axis_name=axis_name), -2, 0)
