"""What each step of a sequence is given, and how segment starts and padding are told to it."""

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


class Steps(NamedTuple):
    """What each step is given, all of it known before the walk.

    Attributes:
      u: content W_c x.
      z: the inputs' part of both gates' pre-activations.
    """

    u: States
    z: Gates


def masked(steps: Steps, starts: Mask | None, padding: Mask | None) -> Steps:
    """The steps with masks, told by gates that are shut or open for certain.

    Where a segment starts, the forget gate's pre-activation is -inf: nothing of c_{t-1} gets through, and the gates do
    not see it (`seen`). In the padding it is +inf and the input gate's -inf: c_{t-1} passes unchanged.
    """
    if starts is None and padding is None:
        return steps
    i, f = steps.z[..., 0, :], steps.z[..., 1, :]
    if starts is not None:
        f = jnp.where(starts[..., None], -jnp.inf, f)
    if padding is not None:
        i, f = jnp.where(padding[..., None], -jnp.inf, i), jnp.where(padding[..., None], jnp.inf, f)
    return steps._replace(z=jnp.stack([i, f], axis=-2))


def seen(z_f: Array, c: Array) -> Array:
    """c_{t-1} as a step sees it: nothing where a forget gate of -inf starts a segment."""
    return jnp.where(z_f == -jnp.inf, 0.0, c)


def padding_after(seq_lengths: Array, shape: tuple[int, ...], time: int) -> Array:
    """Where steps are padding: beyond the length of their sequence; `time` is the axis that counts them."""
    return lax.broadcasted_iota(jnp.int32, shape, time) >= jnp.expand_dims(seq_lengths, time)


def filled(steps: Steps, time: int) -> Steps:
    """The steps and after them, up to so many in all, steps that leave the state as it is; time is the first axis."""
    more = time - len(steps.u)
    if more == 0:
        return steps
    u = jnp.pad(steps.u, [(0, more), *((0, 0),) * (steps.u.ndim - 1)])
    still = jnp.array([[-jnp.inf], [jnp.inf]], steps.z.dtype)  # no input, all of the state
    z = jnp.concatenate([steps.z, jnp.broadcast_to(still, (more, *steps.z.shape[1:]))])
    return Steps(u, z)


def checked_lengths(value: ArrayLike | None, batch: tuple[int, ...], time: int | None) -> Array | None:
    """Lengths of sequences of `time` steps, if there are any; traced ones, or of an unknown time, as they come."""
    lengths = checked("seq_lengths", value, jnp.integer, batch)
    if value is None or time is None or isinstance(value, Tracer) or not np.size(value):
        return lengths
    known = np.asarray(value)
    if known.min() < 0 or known.max() > time:
        raise ValueError(f"`seq_lengths` must be from 0 to {time}, the steps of the inputs; got {known.tolist()}.")
    return lengths


def checked(name: str, value: ArrayLike | None, kind: Any, shape: tuple[int, ...]) -> Array | None:
    """A mask or a list of lengths, if there is one, with the kind of dtype and the shape that the inputs ask for."""
    if value is None:
        return None
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"`{name}` must be of dtype {kind.__name__}; got {array.dtype}. Convert it with `.astype`.")
    if array.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape} to fit the inputs; got {array.shape}.")
    return array
