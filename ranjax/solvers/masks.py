"""The inputs of every step of a sequence, and how segment starts and padding are encoded in them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

States = Float[Array, "time *batch features"]
Gates = Float[Array, "time *batch 2 features"]
Mask = Bool[Array, "time *batch"]


CLOSED = -(2.0**127)  # the pre-activation of a gate that is 0; finite for JAX_DEBUG_INFS, exact in bfloat16


class Steps(NamedTuple):
    """The inputs of all steps, computed for the whole sequence at once.

    Attributes:
      u: content W_c x.
      z: the inputs' part of both gates' pre-activations, W_x x + b.
    """

    u: States
    z: Gates


def masked(steps: Steps, starts: Mask | None, padding: Mask | None) -> Steps:
    """The steps with the masks encoded as pre-activations of the gates.

    Where a segment starts, the forget gate's pre-activation is `CLOSED`: c_{t-1} has no effect on c_t, nor on the gates
    (`seen`). In the padding it is the negative of that, and the input gate's is `CLOSED`: c_t = c_{t-1}.
    """
    if starts is None and padding is None:
        return steps
    i, f = steps.z[..., 0, :], steps.z[..., 1, :]
    if starts is not None:
        f = jnp.where(starts[..., None], CLOSED, f)
    if padding is not None:
        i, f = jnp.where(padding[..., None], CLOSED, i), jnp.where(padding[..., None], -CLOSED, f)
    return steps._replace(z=jnp.stack([i, f], axis=-2))


def seen(z_f: Array, c: Array) -> Array:
    """c_{t-1} as the step reads it: 0 where a forget gate of `CLOSED`, or of -inf, starts a segment."""
    return jnp.where(z_f <= CLOSED, 0.0, c)


def padding_after(seq_lengths: Array, shape: tuple[int, ...], time: int) -> Array:
    """True where a step is padding, beyond the length of its sequence; `time` is the axis of the steps."""
    return lax.broadcasted_iota(jnp.int32, shape, time) >= jnp.expand_dims(seq_lengths, time)


def starts_in_reverse(flipped: Array, time: int) -> Array:
    """Where segments start in reverse: right after the step that began one."""
    first = lax.broadcasted_iota(jnp.int32, flipped.shape, time) == 0
    return jnp.roll(flipped, 1, axis=time) & ~first


def filled(steps: Steps, time: int) -> Steps:
    """The steps, time first, followed by steps that keep the state: `time` steps in all."""
    more = time - len(steps.u)
    if more == 0:
        return steps
    u = jnp.pad(steps.u, [(0, more), *((0, 0),) * (steps.u.ndim - 1)])
    keep = jnp.array([[CLOSED], [-CLOSED]], steps.z.dtype)  # input gate 0, forget gate 1
    z = jnp.concatenate([steps.z, jnp.broadcast_to(keep, (more, *steps.z.shape[1:]))])
    return Steps(u, z)


def checked_lengths(value: ArrayLike | None, batch: tuple[int, ...], time: int | None) -> Array | None:
    """Checked lengths of sequences of `time` steps, or None; traced ones, or of an unknown time, are not compared."""
    lengths = checked("seq_lengths", value, jnp.integer, batch)
    if value is None or time is None or isinstance(value, Tracer) or not np.size(value):
        return lengths
    known = np.asarray(value)
    if known.min() < 0 or known.max() > time:
        raise ValueError(f"`seq_lengths` must be from 0 to {time}, the steps of the inputs; got {known.tolist()}.")
    return lengths


def checked_starts(value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """Checked segment starts as bool, or None. The numbers 0 and 1 are taken too; traced ones are not compared."""
    if value is None:
        return None
    starts = jnp.asarray(value)
    if jnp.issubdtype(starts.dtype, jnp.integer) or jnp.issubdtype(starts.dtype, jnp.floating):
        if not isinstance(value, Tracer) and not np.isin(np.asarray(value), (0, 1)).all():
            raise ValueError("`segment_starts` must be bool, or the numbers 0 and 1; got others.")
        starts = starts != 0
    return checked("segment_starts", starts, jnp.bool_, shape)


def checked(name: str, value: ArrayLike | None, kind: Any, shape: tuple[int, ...]) -> Array | None:
    """A mask or lengths as an array, or None, after a check of its dtype and shape."""
    if value is None:
        return None
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"`{name}` must be of dtype {kind.__name__}; got {array.dtype}. Convert it with `.astype`.")
    if array.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape} to fit the inputs; got {array.shape}.")
    return array
