"""ResidualBlock: what a recurrent layer of a deep network lacks, around a cell that stays as it is."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.recurrent import flip_sequences
from jax import Array, lax
from jax.typing import ArrayLike

from ranjax.baselines import EQUATIONS, Stepwise
from ranjax.cell import RANCell
from ranjax.errors import check_rate, check_size, is_number
from ranjax.layer import RAN
from ranjax.scan import numbers, state_dtype
from ranjax.sharding import before, last_state, steps_before, summed
from ranjax.solvers import check_solver
from ranjax.solvers.fixed_point import FixedPoint
from ranjax.solvers.masks import checked_lengths, checked_starts, padding_after, starts_in_reverse


class ResidualBlock(nn.Module):
    r"""A cell over a sequence, with a short causal convolution before it, an output gate, and a gated MLP after it.

    .. math::
        n_t &= \text{RMSNorm}(x_t) \\
        v_t &= n_t + \sum_{k=0}^{w-1} a_k * n_{t-k} \\
        h_t &= \text{cell}(v_t, \text{carry}_{t-1}) \\
        y_t &= x_t + W_o \, (h_t * \text{silu}(W_g n_t)) \\
        m_t &= \text{RMSNorm}(y_t) \\
        z_t &= y_t + W_2 \, (W_1 m_t * \text{silu}(W_s m_t))

    The output z has the size of x, so blocks can be stacked, with an RMSNorm after the last. With a `RANCell` whose
    `gates="input"` one scan over time solves a block. Every state of the RAN is still a weighted sum of the contents
    W_c v. The cell's parameters are those of the layer without a block, under `cell`.

    The stream x, y, z is summed in float32 or wider; the products have the dtype of the cell.

    Attributes:
      cell: a `RANCell`; or an `nn.OptimizedLSTMCell`, `nn.GRUCell` or `nn.SimpleCell`, with gradients in reverse mode
        only and without masks. Its `dtype`, `param_dtype` and `kernel_init` are those of the block's products too.
      conv_width: w, the number of steps that the convolution sees, the current one included (default: 4). 1: there is
        no convolution, v = n.
      expansion: units of the MLP for each feature of x (default: 1.5). None: there is no MLP, z = y.
      dropout: rate on what is added to the stream, in [0, 1).
      solver, axis_name: of the RAN; see `RAN`.
      time_major, return_carry, reverse, keep_order: as for `RAN`.
      locked: one mask of dropout for all steps of a sequence, in place of one for each step.

    Raises:
      TypeError: for another cell.
      ValueError: for a `conv_width` below 1, an `expansion` that leaves no unit, a dropout rate outside [0, 1); for
        `solver` or `axis_name` with a cell that is no `RANCell`, or that do not fit it; `reverse` with `axis_name`.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> block = ranjax.ResidualBlock(ranjax.RANCell(features=64, gates="input"), return_carry=True)
      >>> x = jnp.ones((10, 50, 32))  # (batch, time, in)
      >>> variables = block.init(jax.random.key(0), x)
      >>> (c, history), z = block.apply(variables, x)
      >>> c.shape, history.shape, z.shape
      ((10, 64), (10, 3, 32), (10, 50, 32))

    References:
      De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models", 2024,
      arXiv 2402.19427; Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv
      2312.00752; Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.
    """

    cell: nn.RNNCellBase
    conv_width: int = 4
    expansion: float | None = 1.5
    dropout: float = 0.0
    solver: str | FixedPoint = "auto"
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    axis_name: str | None = None
    locked: bool = False

    def __post_init__(self):
        if not isinstance(self.cell, RANCell) and type(self.cell) not in EQUATIONS:
            names = ", ".join(f"nn.{cell.__name__}" for cell in EQUATIONS)
            raise TypeError(f"`cell` must be a ranjax.RANCell or one of {names}; got a {type(self.cell).__name__}.")
        check_size("conv_width", self.conv_width)
        check_expansion(self.expansion)
        check_rate("dropout", self.dropout)
        if isinstance(self.cell, RANCell):
            check_solver(self.solver, self.cell.gates, self.axis_name)
        if self.reverse and self.axis_name is not None:
            raise ValueError(f"`reverse` needs all of the sequence; it cannot go with axis_name={self.axis_name!r}.")
        self._check_of_ran(solver=self.solver != "auto", axis_name=self.axis_name is not None)
        super().__post_init__()

    @nn.nowrap
    def _check_of_ran(self, **given: bool) -> None:
        """Raises a ValueError for what is given and another cell than a RAN's has not."""
        for name, is_given in given.items():
            if is_given and not isinstance(self.cell, RANCell):
                got = type(self.cell).__name__
                raise ValueError(f"`{name}` is for a block of a ranjax.RANCell; got it with a {got}. Leave it out.")

    @nn.compact
    def __call__(
        self,
        inputs: ArrayLike,
        initial_carry: tuple[Any, ArrayLike] | None = None,
        seq_lengths: ArrayLike | None = None,
        segment_starts: ArrayLike | None = None,
        *,
        deterministic: bool | None = None,
    ) -> Any:
        """Runs the block over the sequence.

        Args:
          inputs: x, `(*batch, time, in)`, or `(time, *batch, in)` if time-major.
          initial_carry: the pair (carry, history) before the first step, as an earlier call returned it. The carry is
            the cell's; the history is n of the last steps, the latest first, `(*batch, conv_width - 1, in)`. None:
            zeros.
          seq_lengths: as for `RAN`. Padding keeps the state; the outputs there are finite, and mean nothing.
          segment_starts: as for `RAN`: neither the state nor the convolution reaches back beyond a start.
          deterministic: no dropout. Otherwise a rate needs a key named `"dropout"`.

        Returns:
          The outputs z, of the shape of the inputs, in float32 or wider; or `(initial_carry after the last step, z)`.

        Raises:
          ValueError, TypeError: for a shape, a dtype or a length that does not fit; for masks with a cell that is no
            `RANCell`.
        """
        self._check_of_ran(seq_lengths=seq_lengths is not None, segment_starts=segment_starts is not None)
        x = jnp.asarray(inputs)
        if x.ndim < 2:
            raise ValueError(f"`inputs` must have the axes (*batch, time, in); got the shape {x.shape}.")
        time = 0 if self.time_major else x.ndim - 2
        batch, size = x.shape[:time] + x.shape[time + 1 : -1], x.shape[-1]
        lengths = checked_lengths(seq_lengths, batch, x.shape[time] if self.axis_name is None else None)
        starts = checked_starts(segment_starts, x.shape[:-1])

        def flip(a):
            return flip_sequences(a, lengths, num_batch_dims=len(batch), time_major=self.time_major)

        if self.reverse:
            x, starts = flip(x), None if starts is None else starts_in_reverse(flip(starts), time)
        if lengths is not None:  # before anything is computed: padding may hold NaN
            padding = padding_after(lengths - steps_before(x.shape[time], self.axis_name), x.shape[:-1], time)
            x = jnp.where(padding[..., None], 0, x)
        x = x.astype(state_dtype(x))
        carry, history = _pair(initial_carry)
        history = _checked_history(history, (*batch, self.conv_width - 1, size), x.dtype)

        n = self._normalised(x, "norm")
        steps = delayed(n, history, time, starts, self.axis_name)
        v = n if self.conv_width == 1 else n + convolved(self._conv(size), steps)
        carry, h = self._states(v, carry, time, lengths, starts)
        x = self._plus(x, h, n, "gate", "out", deterministic)
        if self.expansion is not None:
            check_expansion(self.expansion, size)
            m = self._normalised(x, "mlp_norm")
            inner = self._dense(int(self.expansion * size), "mlp_in")(m)
            x = self._plus(x, inner, m, "mlp_gate", "mlp_out", deterministic)
        if self.reverse and self.keep_order:
            x = flip(x)
        if not self.return_carry:
            return x
        return (carry, _latest(steps, history, time, lengths, self.axis_name)), x

    @nn.nowrap
    def _normalised(self, x: Array, name: str) -> Array:
        """RMSNorm, computed in the dtype of the stream, in the dtype of the products."""
        n = nn.RMSNorm(dtype=x.dtype, param_dtype=self.cell.param_dtype, name=name)(x)
        return n.astype(self.cell.dtype or x.dtype)

    @nn.nowrap
    def _dense(self, features: int, name: str) -> nn.Module:
        cell = self.cell
        options = {"dtype": cell.dtype, "param_dtype": cell.param_dtype, "kernel_init": cell.kernel_init}
        return nn.Dense(features, use_bias=False, name=name, **options)

    @nn.nowrap
    def _conv(self, size: int) -> Array:
        """The weights a of the convolution, the current step's first."""
        return self.param("conv", nn.initializers.normal(0.1), (self.conv_width, size), self.cell.param_dtype)

    @nn.nowrap
    def _plus(self, x: Array, values: Array, by: Array, gate: str, out: str, deterministic: bool | None) -> Array:
        """x + W_out (values * silu(W_gate by)), with dropout on what is added."""
        gated = values * nn.silu(self._dense(values.shape[-1], gate)(by))
        added = self._dense(x.shape[-1], out)(gated)
        drop = nn.Dropout(self.dropout, (0 if self.time_major else x.ndim - 2,) if self.locked else ())
        return x + drop(added, deterministic or not self.dropout).astype(x.dtype)

    @nn.nowrap
    def _states(
        self, v: Array, carry: Any, time: int, lengths: Array | None, starts: Array | None
    ) -> tuple[Any, Array]:
        """The cell over the sequence: the carry after it, and the outputs."""
        if isinstance(self.cell, RANCell):
            layer = RAN(self.cell, self.solver, self.time_major, return_carry=True, axis_name=self.axis_name)
            return layer(v, initial_carry=carry, seq_lengths=lengths, segment_starts=starts)
        carry, h = Stepwise(self.cell)(jnp.moveaxis(v, time, 0), initial_carry=carry)
        return carry, jnp.moveaxis(h, 0, time)


def check_expansion(expansion: float | None, size: int | None = None) -> None:
    """Raises a ValueError for an MLP of no size or, where the size of its inputs is known, of no unit."""
    if expansion is None:
        return
    if not (is_number(expansion) and 0 < expansion < 2**31):
        raise ValueError(f"`expansion` must be above 0 and below 2**31, or None; got {expansion!r}.")
    if size is not None and int(expansion * size) < 1:
        raise ValueError(
            f"`expansion` must leave the MLP at least one unit; got {expansion} for {size} features. Leave the MLP out "
            "with None."
        )


def delayed(
    n: Array, history: Array, time: int, starts: Array | None = None, axis_name: str | None = None
) -> list[Array]:
    """n_t, n_{t-1}, ... of every step, as many as `history` has steps and one more; 0 beyond the start of a segment.

    Args:
      n: `(*batch, features)` with an axis of time.
      history: those before the first step, the latest first, `(*batch, steps, features)`.
      time: the axis of time in `n`.
      starts: True where a segment starts, of the shape of `n` without features.
      axis_name: the mesh axis that time is spread over.
    """
    steps = [n]
    for k in range(history.shape[-2]):
        step = before(steps[-1], history[..., k, :].astype(n.dtype), time, axis_name=axis_name)
        steps.append(step if starts is None else jnp.where(starts[..., None], 0, step))
    return steps


def convolved(weights: Array, steps: list[Array]) -> Array:
    """The sum of a_k * n_{t-k}. On a CPU flax's depthwise `nn.Conv` takes fifty times as long."""
    first, weights = promote_dtype(steps[0], weights, dtype=steps[0].dtype)
    terms = [lax.broadcast_to_rank(a, first.ndim) * step for a, step in zip(weights, steps, strict=True)]
    return sum(terms[1:], terms[0])


def _latest(steps: list[Array], history: Array, time: int, lengths: Array | None, axis_name: str | None) -> Array:
    """The history after the last step, or after the last valid one of each sequence."""

    def last(step: Array, first: Array) -> Array:
        step = step.astype(first.dtype)
        if lengths is None:
            return last_state(step, first, time, axis_name)
        position = lax.broadcasted_iota(jnp.int32, step.shape, time) + steps_before(step.shape[time], axis_name)
        found = jnp.where(position == jnp.expand_dims(lengths - 1, (time, -1)), step, 0)
        return jnp.where(lengths[..., None] == 0, first, summed(jnp.sum(found, time), axis_name))

    latest = [last(step, history[..., k, :]) for k, step in enumerate(steps[:-1])]
    return jnp.stack(latest, axis=-2) if latest else history


def _pair(initial_carry: Any) -> tuple[Any, Any]:
    """The cell's carry and the history."""
    if initial_carry is None:
        return None, None
    if not isinstance(initial_carry, tuple | list) or len(initial_carry) != 2:
        raise TypeError(
            "`initial_carry` must be the pair (carry, history) that a call with `return_carry=True` returned; got "
            f"a {type(initial_carry).__name__}."
        )
    return tuple(initial_carry)


def _checked_history(history: ArrayLike | None, shape: tuple[int, ...], dtype: Any) -> Array:
    """A history of this shape, zeros by default."""
    if history is None:
        return jnp.zeros(shape, dtype)
    history = numbers("initial_carry[1]", history, jnp.floating)
    if history.shape != shape:
        raise ValueError(
            f"`initial_carry[1]` must be the history, n of the last steps, of the shape {shape}; got {history.shape}."
        )
    return history.astype(state_dtype(history, dtype))
