"""The states of a RAN over a sequence: `solve`, and which solver computes them for which gates.

- Gates on the input only, or also on their own feature of h_{t-1} (`elementwise`): every step is elementwise. One
  recurrence computes the states from the pre-activations, one in reverse the gradients.
- Gates on all of h_{t-1} (`recurrent`): the sequential scan, or an iteration over all steps at once (`fixed_point`).

`solver="auto"` is the first for elementwise gates, on each platform as `ranjax.scan.AUTO_BY_PLATFORM` says, and the
sequential scan for gates on all of h_{t-1}.

Public names: `solve`, `solve_adjoint`, `FixedPoint`, `Result`, `Status`.
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
from ranjax.scan import SOLVERS, State, linear_recurrence, state_dtype
from ranjax.sharding import automatic, before, check_spread
from ranjax.solvers.adjoint import Method
from ranjax.solvers.elementwise import fused
from ranjax.solvers.fixed_point import FixedPoint as FixedPoint
from ranjax.solvers.masks import Gates, States, Steps, masked, seen
from ranjax.solvers.recurrent import recurrent_adjoint, recurrent_states, sequential_scan
from ranjax.solvers.result import Result as Result
from ranjax.solvers.result import Status as Status
from ranjax.solvers.result import exact

FUSED = ("auto", "pallas")  # solvers that compute the states of elementwise gates straight from the pre-activations
# Bytes of pre-activations up to which the gates on the input are stored, on a CPU. Milliseconds of a layer's gradient,
# stored and recomputed: 5.1 and 6.1 at 20 x 50 x 192 (1.5 MB), 33.5 and 35.3 at 20 x 35 x 650 (3.6 MB), 108 and 91 at
# 4 x 8192 x 64 (17 MB), 442 and 345 at 8 x 1024 x 512 (34 MB; AMD EPYC, 2 cores, 2026-11-30).
STORED = 4_000_000
ITERATED = {"recurrent": "fixed_point", "diagonal": "newton"}  # the name of the iteration, by the gates


def solve(
    params: Params,
    x: ArrayLike,
    c0: ArrayLike | None = None,
    *,
    gates: str,
    activation: str = "tanh",
    solver: str | FixedPoint = "auto",
    axis_name: str | None = None,
) -> tuple[Array, Result]:
    r"""Computes the states of a recurrent additive network over a sequence.

    .. math::
        i_t, f_t = \sigma(W_x x_t + W_h h_{t-1} + b), \qquad c_t = i_t \, (W_c x_t) + f_t \, c_{t-1}

    Args:
      params: the parameters of a `RANCell`.
      x: inputs `(*batch, time, in)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None: zeros.
      gates: what the gates of these parameters read: `"recurrent"`, `"diagonal"` or `"input"`.
      activation: `"tanh"` or `"identity"`, the g of h = g(c). The parameters do not contain it: pass that of the cell.
      solver: as for `RAN`.
      axis_name: as for `RAN`.

    Returns:
      The states c, `(*batch, time, features)`, and a `Result`: status, iterations and residual of the solver.

    Raises:
      TypeError: for complex inputs.
      ValueError: for parameters that are not a cell's; for gates that are not those of the parameters; for a solver or
        an activation that does not fit them; for inputs or a state of another shape; for inputs that are not spread
        over `axis_name`.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> cell, x = ranjax.RANCell(features=4), jnp.ones((2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> states, result = ranjax.solve(params, x, gates="recurrent", solver="fixed_point")
      >>> states.shape, bool(result.converged)
      ((2, 50, 4), True)
    """
    check_choice("activation", activation, ACTIVATIONS)
    params, x = checked_inputs(params, x)
    check_gates(gates, params)
    check_solver(solver, gates, axis_name)
    params, steps, first = prepared(params, x, c0)
    c, result = states(params, steps, first, activation=activation, solver=solver, axis_name=axis_name)
    return jnp.moveaxis(c, 0, -2), result


def solve_adjoint(
    params: Params,
    x: ArrayLike,
    cotangents: ArrayLike,
    c0: ArrayLike | None = None,
    *,
    gates: str,
    activation: str = "tanh",
    solver: str | FixedPoint = "auto",
    axis_name: str | None = None,
) -> tuple[Array, Result]:
    r"""Solves the linear system of the gradient, and reports how it was solved.

    .. math::
        \lambda_t = g_t + J_{t+1}^\top \lambda_{t+1}, \qquad J_t = \frac{\partial c_t}{\partial c_{t-1}}

    With the cotangents g of the states, the derivative of a loss with regard to c_t where it enters the loss directly,
    lambda_t is its total derivative, through all later states. Every gradient of the network follows from lambda by
    products over all steps. Reverse-mode differentiation solves the same system in the same way, but cannot return a
    `Result`. Call this function to check that the system converges for the gradients of a given loss.

    Args:
      params: the parameters of a `RANCell`.
      x: inputs `(*batch, time, in)`.
      cotangents: g, `(*batch, time, features)`.
      c0: state before the first step, `(*batch, features)`, float32 or wider; None: zeros.
      gates: what the gates of these parameters read: `"recurrent"` or `"diagonal"`. With `"input"` gates the system is
        one linear recurrence, which no solver iterates.
      activation: `"tanh"` or `"identity"`, the g of h = g(c). The parameters do not contain it: pass that of the cell.
      solver: as for `RAN`. A solver that does not iterate solves the system by a sequential scan.
      axis_name: as for `RAN`.

    Returns:
      lambda, `(*batch, time, features)`, in the dtype of the states, and the `Result` of the system. The states have
      a result of their own; see `solve`.

    Raises:
      TypeError, ValueError: as for `solve`; for cotangents that have not the shape of the states.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.solvers import solve_adjoint
      >>> cell, x = ranjax.RANCell(features=4), jax.random.normal(jax.random.key(1), (2, 50, 3))
      >>> params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), x[:, 0])["params"]
      >>> solver = ranjax.FixedPoint(on_failure="nan")
      >>> loss = lambda c: jnp.sum(c[:, -1] ** 2)
      >>> states, _ = ranjax.solve(params, x, gates="recurrent", solver=solver)
      >>> adjoint, result = solve_adjoint(params, x, jax.grad(loss)(states), gates="recurrent", solver=solver)
      >>> adjoint.shape, bool(result.converged)
      ((2, 50, 4), True)
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("gates", gates, tuple(ITERATED))
    params, x = checked_inputs(params, x)
    check_gates(gates, params)
    check_solver(solver, gates, axis_name)
    params, steps, first = prepared(params, x, c0)
    g, shape = jnp.asarray(cotangents), (*x.shape[:-1], first.shape[-1])
    if g.shape != shape:
        raise ValueError(
            f"`cotangents` must have the shape of the states, (*batch, time, features) = {shape}; got {g.shape}."
        )
    g = jnp.moveaxis(g.astype(first.dtype), -2, 0)
    options: dict = {"activation": activation, "method": Method(_iteration(solver, gates, axis_name), axis_name)}
    adjoint = partial(_adjoint, **options)
    v, result = automatic(adjoint, params, steps, first, g, like=steps.u, others=(PartitionSpec(),))
    return jnp.moveaxis(v, 0, -2), result


@partial(jax.jit, static_argnames=("activation", "method"), inline=True)
def _adjoint(
    params: Params, steps: Steps, c0: State, g: States, *, activation: str, method: Method
) -> tuple[States, Result]:
    check_spread("The inputs", steps, method.axis_name)
    if g.size == 0:
        return g, exact(c0.dtype)
    steps = Steps(*(a.astype(c0.dtype) for a in steps))
    return recurrent_adjoint(params, steps, c0, g, activation, method)


def prepared(
    params: Params,
    x: Array,
    c0: ArrayLike | None,
    starts: Array | None = None,
    padding: Array | None = None,
    dtype: Dtype | None = None,
) -> tuple[Params, Steps, State]:
    """The parameters in the dtype of the products, the masked steps with time first, the initial state."""
    params, x = promoted(params, x, dtype)
    steps = steps_of(params, x, x.ndim - 2, starts, padding)
    shape = steps.u.shape[1:]
    first = jnp.zeros(shape, state_dtype(steps.u)) if c0 is None else checked_carry("c0", c0, shape)
    return params, steps, first


def steps_of(params: Params, x: Array, time: int, starts: Array | None, padding: Array | None) -> Steps:
    """The masked steps with time first; `time` is its axis in the inputs and the masks."""
    steps, masks = Steps(content(params, x), gates_of_input(params, x)), (starts, padding)
    steps, masks = jax.tree.map(lambda a: jnp.moveaxis(a, time, 0), (steps, masks))
    return masked(steps, *masks)


def is_sequential(solver: str | FixedPoint, gates: str, axis_name: str | None = None) -> bool:
    """Whether the solver is the sequential scan."""
    fused = solver in FUSED and gates == "diagonal" and axis_name is None
    return gates != "input" and not fused and _iteration(solver, gates, axis_name) is None


def check_solver(solver: str | FixedPoint, gates: str, axis_name: str | None = None) -> None:
    """Raises a ValueError where a solver does not fit the gates, or time that is spread over a mesh axis."""
    scans = ("auto", "sequential") if axis_name is None else ("auto",)
    kernels = () if axis_name is not None else ("pallas",)
    allowed = {
        "input": tuple(SOLVERS),
        "diagonal": (*scans, *kernels, "newton"),
        "recurrent": (*scans, "fixed_point"),
    }[gates]
    if isinstance(solver, FixedPoint) and gates in ITERATED:
        return
    why = f" with gates={gates!r}"
    if axis_name is not None:
        why += f" and axis_name={axis_name!r}, where no device has all steps"
    if gates != "input":
        why += ". Gates that read h_{t-1} make the recurrence nonlinear; with gates='input' it is linear"
    check_choice("solver", solver, allowed, why)


def states(
    params: Params,
    steps: Steps,
    c0: State,
    *,
    activation: str,
    solver: str | FixedPoint,
    axis_name: str | None = None,
) -> tuple[States, Result]:
    """The states c_1 ... c_T from the state `c0`, and how they were solved; time is the first axis."""
    solved = partial(_states, activation=activation, solver=solver, axis_name=axis_name)
    return automatic(solved, params, steps, c0, like=steps.u, others=(PartitionSpec(),))


def without_masks(solver: str | FixedPoint, params: Params, steps: Steps, axis_name: str | None) -> str | FixedPoint:
    """The solver of steps without masks, where a state that is not finite may reach all others.

    On a CPU few gates on the input are computed before the states, and stored.
    """
    size, chosen = steps.z.size, solver == "auto" and gates_of(params) == "input" and axis_name is None
    few = isinstance(size, int) and size * steps.z.dtype.itemsize <= STORED
    return "sequential" if chosen and few and jax.default_backend() == "cpu" else solver


# Compiled once per shape where it is called outside of `jit`; inlined inside.
@partial(jax.jit, static_argnames=("activation", "solver", "axis_name"), inline=True)
def _states(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint, axis_name: str | None
) -> tuple[States, Result]:
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
    return recurrent_states(params, steps, c0, activation, Method(_iteration(solver, gates, axis_name), axis_name))


def states_and_gates(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint
) -> tuple[States, Gates]:
    """The states and the gates, time first; gates that the solver does not return are recomputed."""
    *leading, feature = jax.typeof(steps.u).sharding.spec
    both = partial(_states_and_gates, activation=activation, solver=solver)
    return automatic(both, params, steps, c0, like=steps.u, others=(PartitionSpec(*leading, None, feature),))


@partial(jax.jit, static_argnames=("activation", "solver"), inline=True)
def _states_and_gates(
    params: Params, steps: Steps, c0: State, *, activation: str, solver: str | FixedPoint
) -> tuple[States, Gates]:
    gates = gates_of(params)
    if is_sequential(solver, gates):
        return sequential_scan(params, steps, c0, activation)[1]
    c, _ = states(params, steps, c0, activation=activation, solver=solver)
    if gates == "input":
        return c, jax.nn.sigmoid(steps.z)
    earlier = seen(steps.z[..., 1, :], before(c, c0, 0))
    wide = jax.tree.map(lambda p: p.astype(c0.dtype), params)
    return c, jax.nn.sigmoid(steps.z + gates_of_state(wide, earlier, activation))


def _iteration(solver: str | FixedPoint, gates: str, axis_name: str | None) -> FixedPoint | None:
    """The settings of the iteration, or None for a solver that does not iterate."""
    if isinstance(solver, FixedPoint):
        return solver
    spread = axis_name is not None and solver == "auto"
    return FixedPoint() if gates in ITERATED and (spread or solver == ITERATED[gates]) else None


def _linear_states(steps: Steps, c0: State, solver: str, axis_name: str | None) -> States:
    """The states where the gates read the input only: one linear recurrence."""
    i, f = jnp.moveaxis(jax.nn.sigmoid(steps.z), -2, 0)
    decay, inputs = jnp.moveaxis(f, 0, -2), jnp.moveaxis(i * steps.u, 0, -2)
    return jnp.moveaxis(linear_recurrence(decay, inputs, c0, solver=solver, axis_name=axis_name), -2, 0)
