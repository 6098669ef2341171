"""Linear recurrences, solved one step after another or all at once.

Every solver answers the same equation, h_t = a_t * h_{t-1} + b_t, and all of them share one derivative
rule: the derivative of a linear recurrence is a linear recurrence, so no solver is ever differentiated.
Axes are `(*batch, time, features)` throughout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

Sequence = Float[Array, "*batch time features"]
State = Float[Array, "*batch features"]


def linear_recurrence(
    decay: ArrayLike,
    inputs: ArrayLike,
    initial: ArrayLike | None = None,
    *,
    reverse: bool = False,
    solver: str = "auto",
) -> Array:
    r"""Solves a first-order linear recurrence over the axis of time, feature by feature.

    .. math::
        h_t = \text{decay}_t \, h_{t-1} + \text{inputs}_t, \qquad h_{-1} = \text{initial}

    With `reverse=True` time runs backwards: h_t = decay_t * h_{t+1} + inputs_t, and `initial` stands
    after the last step. Reverse mode, forward mode and `vmap` work with every solver, in all three
    arrays; the cotangent is one more recurrence, run the other way.

    Args:
      decay: floating array `(*batch, time, features)`.
      inputs: floating array of the same shape.
      initial: floating array `(*batch, features)`; None is the same as zeros.
      reverse: run from the last step to the first.
      solver: `"sequential"` (`jax.lax.scan`), `"associative"` (`jax.lax.associative_scan`) or `"auto"`
        (the default: sequential on a CPU, associative elsewhere, chosen when the program is lowered).

    Returns:
      The states h, `(*batch, time, features)`, in float32, or in float64 where one of the arrays is.

    Raises:
      ValueError: for an unknown solver or shapes that do not fit.
      TypeError: for an array that is not of a real floating dtype.

    Example:
      >>> import jax.numpy as jnp, ranjax
      >>> decay = jnp.full((4, 1), 0.5)
      >>> ranjax.linear_recurrence(decay, jnp.ones((4, 1))).ravel().tolist()
      [1.0, 1.5, 1.75, 1.875]

    References:
      Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(map(repr, SOLVERS))}; got {solver!r}.")
    decay, inputs, initial = _as_states(decay, inputs, initial)
    if inputs.shape[-2] == 0:
        return inputs
    return _recurrence(decay, inputs, initial, solver, reverse)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _recurrence(decay: Sequence, inputs: Sequence, initial: State, solver: str, reverse: bool) -> Sequence:
    return SOLVERS[solver](decay, inputs, initial, reverse)


@_recurrence.defjvp
def _recurrence_jvp(solver, reverse, primals, tangents):
    """dh_t = a_t dh_{t-1} + (da_t h_{t-1} + db_t), from dh_{-1} = dinitial: the same recurrence."""
    (decay, _, initial), (d_decay, d_inputs, d_initial) = primals, tangents
    states = _recurrence(*primals, solver, reverse)
    first = -1 if reverse else 0
    source = d_inputs + d_decay * _before(states, initial, reverse)
    source = source.at[..., first, :].add(decay[..., first, :] * d_initial)
    return states, _linear_solve(decay, source, solver, reverse)


def _linear_solve(decay: Sequence, source: Sequence, solver: str, reverse: bool) -> Sequence:
    """The recurrence from a zero state, as a linear system that JAX can transpose.

    The transpose of h_t - a_t h_{t-1} = b_t is g_t - a_{t+1} g_{t+1} = d_t: a recurrence the other way.
    """
    zero = jnp.zeros_like(source[..., 0, :])

    def solve(_, b):
        return SOLVERS[solver](decay, b, zero, reverse)

    def transpose_solve(_, d):
        return SOLVERS[solver](_before(decay, zero, not reverse), d, zero, not reverse)

    def matvec(h):
        return h - decay * _before(h, zero, reverse)

    return lax.custom_linear_solve(matvec, source, solve, transpose_solve)


def _sequential(decay: Sequence, inputs: Sequence, initial: State, reverse: bool) -> Sequence:
    """One step after another: time moves to the front, `lax.scan` walks over it."""

    def step(h, ab):
        a, b = ab
        h = a * h + b
        return h, h

    steps = jnp.moveaxis(decay, -2, 0), jnp.moveaxis(inputs, -2, 0)
    return jnp.moveaxis(lax.scan(step, initial, steps, reverse=reverse)[1], 0, -2)


def _associative(decay: Sequence, inputs: Sequence, initial: State, reverse: bool) -> Sequence:
    """All steps at once: the maps h -> a h + b compose associatively."""

    def compose(earlier, later):
        (a, b), (a_, b_) = earlier, later
        return a_ * a, a_ * b + b_

    product, states = lax.associative_scan(compose, (decay, inputs), reverse=reverse, axis=inputs.ndim - 2)
    return product * initial[..., None, :] + states


def _auto(decay: Sequence, inputs: Sequence, initial: State, reverse: bool) -> Sequence:
    """The choice by platform, made at lowering: one traced program serves every platform."""
    return lax.platform_dependent(
        decay,
        inputs,
        initial,
        cpu=partial(_sequential, reverse=reverse),
        default=partial(_associative, reverse=reverse),
    )


Solver = Callable[[Array, Array, Array, bool], Array]
SOLVERS: dict[str, Solver] = {"auto": _auto, "sequential": _sequential, "associative": _associative}


def _before(states: Sequence, initial: State, reverse: bool) -> Sequence:
    """The state that each step starts from: h_{t-1}, or h_{t+1} in reverse."""
    edge = initial[..., None, :]
    if reverse:
        return jnp.concatenate([states[..., 1:, :], edge], axis=-2)
    return jnp.concatenate([edge, states[..., :-1, :]], axis=-2)


def _as_states(decay: ArrayLike, inputs: ArrayLike, initial: ArrayLike | None) -> tuple[Array, Array, Array]:
    """The three arrays in the dtype of the states, their shapes checked."""
    decay, inputs = floating("decay", decay), floating("inputs", inputs)
    if inputs.ndim < 2:
        raise ValueError(
            f"`inputs` must have the axes (*batch, time, features); got the shape {inputs.shape}. "
            "Add the missing axis, for one feature with `inputs[:, None]`."
        )
    if decay.shape != inputs.shape:
        raise ValueError(
            f"`decay` must have the shape of `inputs`, {inputs.shape}; got {decay.shape}. "
            "Broadcast it with `jnp.broadcast_to(decay, inputs.shape)`."
        )
    expected = (*inputs.shape[:-2], inputs.shape[-1])
    initial = jnp.zeros(expected, inputs.dtype) if initial is None else floating("initial", initial)
    if initial.shape != expected:
        raise ValueError(
            f"`initial` must be one state per sequence, (*batch, features) = {expected}; got {initial.shape}. "
            "Broadcast it with `jnp.broadcast_to`, or pass None for zeros."
        )
    dtype = state_dtype(decay, inputs, initial)
    return decay.astype(dtype), inputs.astype(dtype), initial.astype(dtype)


def floating(name: str, value: ArrayLike) -> Array:
    """`value` as an array, after a check that its dtype is a real floating one."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be an array of a floating dtype; got {array.dtype}. "
            f"Convert it with `{name}.astype(jnp.float32)`."
        )
    return array


def state_dtype(*arrays: Any) -> Any:
    """The dtype of a state that reads these arrays or dtypes: float32, or float64 where one of them is."""
    return jnp.result_type(jnp.float32, *arrays)
