"""RAN: a cell over a whole sequence, in place of `flax.linen.RNN`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.recurrent import flip_sequences
from flax.typing import Dtype
from jax import Array
from jax.typing import ArrayLike

from ranjax.cell import RANCell, checked_carry, output
from ranjax.scan import state_dtype
from ranjax.sharding import last_state, steps_before
from ranjax.solvers import check_solver, states, steps_of, without_masks
from ranjax.solvers.fixed_point import FixedPoint
from ranjax.solvers.masks import checked_lengths, checked_starts, padding_after, starts_in_reverse


class RAN(nn.Module):
    r"""A recurrent additive network over a sequence; a drop-in for `nn.RNN(cell)`.

    .. math::
        c_t = i_t * (W_c x_t) + f_t * c_{t-1}, \qquad h_t = g(c_t)

    The parameters are those of `nn.RNN(cell)`, so either module loads the parameters of the other. The attributes of
    `nn.RNN` about its loop (`unroll`, `variable_axes`, `split_rngs`, ...) do not exist here.

    The products with x are computed for the whole sequence at once. With `gates="input"` the states are one linear
    recurrence; the other gates read h_{t-1} and run sequentially. The gates of the paper, `gates="recurrent"`, can be
    solved for many steps at once with `solver="fixed_point"`, by iterating linear recurrences. States and gradients
    match those of the sequential scan to rounding, except vanishing gradients (below 1e-3 of the largest; see
    `ranjax.FixedPoint`).

    With `solver="auto"` or `"pallas"`, input and diagonal gates are not stored: the gradient recomputes them. On a CPU
    `"auto"` stores input gates that take at most 4 MB, where there are no masks. Forward mode, reverse mode and higher
    derivatives work with every solver, except for the limits of `ranjax.FixedPoint`.

    Attributes:
      cell: a `RANCell`, or a subclass with the same `__call__`. Apply `nn.remat` and `nn.jit` to the layer, not to the
        cell.
      solver: how the states are computed, by the gates of the cell.

        - `"input"`: a solver of `ranjax.linear_recurrence`.
        - `"diagonal"`: `"auto"`, `"pallas"`, `"sequential"` or `"newton"`.
        - `"recurrent"`: `"auto"` (the same as `"sequential"`), `"sequential"` or `"fixed_point"`.

        `"newton"` and `"fixed_point"` solve chunks of 1024 time steps at once, by the same iteration; a
        `ranjax.FixedPoint` in their place changes its settings. The `Result` of the solver is sown as `result` in the
        collection `"solver"`.

        On several GPUs XLA does not split the kernel that `"auto"` selects for input and diagonal gates. Run the layer
        inside `jax.shard_map` over the batch with `check_vma=False`, or use `"associative"` (`"sequential"` for
        diagonal gates).
      time_major: axes are `(time, *batch, in)` instead of `(*batch, time, in)`.
      return_carry: return `(carry, outputs)` instead of the outputs alone.
      reverse: process from the last step to the first; the outputs are in the order of processing.
      keep_order: with `reverse`, return the outputs in the order of the inputs.
      axis_name: inside `jax.shard_map`, the mesh axis that time is spread over. Inputs, masks and outputs are then one
        device's part, with the same number of steps on every device; carries and lengths are those of the whole
        sequence, the same on every device. `"auto"` then selects a solver that needs no device to have all steps.
        None: time is not spread.

    Raises:
      TypeError: for a `cell` that is not a `RANCell`, or has a `__call__` of its own.
      ValueError: for a `solver` that does not fit the gates, `reverse` with `axis_name`, or inputs that are not spread
        over it.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> layer = ranjax.RAN(ranjax.RANCell(features=64, gates="input"), return_carry=True)
      >>> x = jnp.ones((10, 50, 32))  # (batch, time, in)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> carry, h = layer.apply(variables, x)
      >>> carry.shape, h.shape
      ((10, 64), (10, 50, 64))
    """

    cell: RANCell
    solver: str | FixedPoint = "auto"
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    axis_name: str | None = None

    def __post_init__(self):
        if not isinstance(self.cell, RANCell):
            got = f"{self.cell.__name__} itself" if isinstance(self.cell, type) else f"a {type(self.cell).__name__}"
            raise TypeError(f"`cell` must be a ranjax.RANCell(...); got {got}. Use nn.RNN for other cells.")
        if type(self.cell).__call__ is not RANCell.__call__:
            raise TypeError(
                f"`cell` must have the `__call__` of ranjax.RANCell, whose equations are solved; got that of "
                f"{type(self.cell).__name__}. Use nn.RNN for it."
            )
        check_solver(self.solver, self.cell.gates, self.axis_name)
        super().__post_init__()

    def __call__(
        self,
        inputs: ArrayLike,
        initial_carry: ArrayLike | None = None,
        init_key: Array | None = None,
        seq_lengths: ArrayLike | None = None,
        segment_starts: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the sequence; arguments that are not None replace the attributes.

        Flags are Python values. `nn.remat` takes them by position: `return_carry` is number 6 of its `static_argnums`.

        Args:
          inputs: `(*batch, time, in)`, or `(time, *batch, in)` if time-major.
          initial_carry: the state before the first step, `(*batch, features)`, float32 or wider. Default: that of the
            cell's `initialize_carry`, zeros unless `carry_init` is set.
          init_key: key for `initialize_carry`; zeros need none.
          seq_lengths: integers `(*batch)`, the number of valid steps of each sequence, at most `time`. Later steps are
            padding and may hold any value, also NaN: they keep the state, and their outputs repeat the last valid one.
          segment_starts: bool or the numbers 0 and 1, `(*batch, time)` or `(time, *batch)` as the inputs: True where a
            new segment begins, from a state of zeros, independent of earlier steps. With `reverse` each segment is
            processed from its own end, independent of later steps. A start is encoded as a forget gate's pre-activation
            of -2**127; parameters that produce as much, or -inf, start a segment, too.

            A state that is not finite stays in its segment with input and diagonal gates, without `axis_name`, and with
            `"pallas"` or `"auto"` (on a CPU, a TPU, or a GPU with the kernel). Otherwise it reaches the gradients of
            earlier segments, and with input gates the states of later ones.
          return_carry, time_major, reverse, keep_order: as the attributes.

        Returns:
          The outputs h, `(*batch, time, out)` in the layout of the inputs, or `(carry, h)` where the carry
          `(*batch, features)` is the state after the last valid step.

        Raises:
          ValueError, TypeError: for a shape, a dtype or a length that does not fit; for `segment_starts` with a cell
            whose `carry_init` is not zeros.
        """
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        if reverse and self.axis_name is not None:
            raise ValueError(f"`reverse` needs all of the sequence; it cannot go with axis_name={self.axis_name!r}.")
        x = jnp.asarray(inputs)
        if x.ndim < 2:
            raise ValueError(f"`inputs` must have the axes (*batch, time, in); got the shape {x.shape}.")
        time = 0 if time_major else x.ndim - 2
        batch = x.shape[:time] + x.shape[time + 1 : -1]
        seq_lengths = checked_lengths(seq_lengths, batch, x.shape[time] if self.axis_name is None else None)
        segment_starts = self._starts(segment_starts, x.shape[:-1])

        def flip(a):
            return flip_sequences(a, seq_lengths, num_batch_dims=len(batch), time_major=time_major)

        if reverse:
            x = flip(x)
            segment_starts = None if segment_starts is None else starts_in_reverse(flip(segment_starts), time)
        padding = None
        if seq_lengths is not None:
            padding = padding_after(seq_lengths - steps_before(x.shape[time], self.axis_name), x.shape[:-1], time)
            x = jnp.where(padding[..., None], 0, x)  # before any product: padding may hold NaN

        params, x = self.cell.parameters(x)
        c0 = self._initial(initial_carry, init_key, (*batch, x.shape[-1]), x.dtype)
        steps = steps_of(params, x, time, segment_starts, padding)
        solver = self.solver
        if segment_starts is None and seq_lengths is None:
            solver = without_masks(solver, params, steps, self.axis_name)
        options: dict = {"activation": self.cell.activation, "solver": solver, "axis_name": self.axis_name}
        c, result = states(params, steps, c0, **options)
        if not self.is_initializing():
            self.sow("solver", "result", result, init_fn=lambda: result, reduce_fn=lambda _, new: new)
        c = jnp.moveaxis(c, 0, time)
        h = output(params, c, self.cell.activation).astype(x.dtype)

        if reverse and (self.keep_order if keep_order is None else keep_order):
            h = flip(h)
        carry = last_state(c, c0, time, self.axis_name)
        return (carry, h) if (self.return_carry if return_carry is None else return_carry) else h

    @nn.nowrap
    def _starts(self, value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
        """The segment starts, after a check that the state before each, which is 0, is that of the cell."""
        starts, zeros = checked_starts(value, shape), nn.initializers.zeros_init()
        if starts is not None and self.cell.carry_init not in (zeros, nn.initializers.zeros):
            raise ValueError(
                "`segment_starts` begins every segment from zeros; got a cell with another `carry_init`. Leave "
                "`carry_init` out of the cell, and give the state before the first step as `initial_carry`."
            )
        return starts

    @nn.nowrap
    def _initial(self, carry: ArrayLike | None, key: Array | None, shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The given carry, checked, or the cell's initial one, in a dtype at least as wide as that of its summands."""
        if carry is not None:
            return checked_carry("initial_carry", carry, (*shape[:-1], self.cell.features))
        c0 = self.cell.initialize_carry(jax.random.key(0) if key is None else key, shape)
        return c0.astype(state_dtype(c0, dtype))
