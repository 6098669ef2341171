"""The cells that a RAN is compared with, over a sequence: the LSTM, the GRU and the Elman network of flax.

`nn.RNN` multiplies x inside the loop over time, and its autodiff adds to the gradient of every weight at every step.
Here the products with x are computed for all steps at once, the loop of the backward pass computes the adjoints of the
carries only, and the gradient of a weight is one product over all steps, as for the RAN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jax.nn import sigmoid
from jax.typing import ArrayLike

from ranjax.cell import Params, plus_bias, promoted
from ranjax.scan import state_dtype, unroll
from ranjax.sharding import placed_as, varying_as


class Stepwise(nn.Module):
    """`nn.RNN(cell, time_major=True, return_carry=True)`, with faster gradients, in reverse mode only.

    Parameters, outputs and gradients are those of `nn.RNN`.

    Attributes:
      cell: an `nn.OptimizedLSTMCell`, `nn.GRUCell` or `nn.SimpleCell`, with flax's default activations.

    Raises:
      TypeError: for another cell.
      ValueError: for activations or a residual connection that are not flax's default; for a carry of other shapes.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from ranjax.baselines import Stepwise
      >>> layer, x = Stepwise(nn.GRUCell(features=4)), jnp.ones((50, 2, 3))  # (time, batch, in)
      >>> carry, h = layer.apply(layer.init(jax.random.key(0), x), x)
      >>> carry.shape, h.shape
      ((2, 4), (50, 2, 4))
    """

    cell: nn.RNNCellBase

    def __post_init__(self):
        if type(self.cell) not in EQUATIONS:
            names = ", ".join(f"nn.{cell.__name__}" for cell in EQUATIONS)
            raise TypeError(f"`cell` must be one of {names}; got a {type(self.cell).__name__}. Use nn.RNN for it.")
        for name in ("gate_fn", "activation_fn", "residual"):
            if getattr(self.cell, name, None) != getattr(type(self.cell), name, None):
                raise ValueError(
                    f"`cell` must have flax's own `{name}`; got {getattr(self.cell, name)}. Use nn.RNN for it."
                )
        super().__post_init__()

    def __call__(self, inputs: ArrayLike, *, initial_carry: Any = None) -> tuple[Any, Array]:
        """The carry after the last step of `inputs`, `(time, *batch, in)`, and the outputs, `(time, *batch, out)`."""
        x = jnp.asarray(inputs)
        first = self.cell.initialize_carry(jax.random.key(0), x.shape[1:])
        carry = first if initial_carry is None else initial_carry
        expected, got = (jax.tree.map(jnp.shape, c) for c in (first, carry))
        if got != expected:
            raise ValueError(f"`initial_carry` must have the shapes {expected}, as a call returns it; got {got}.")
        if self.is_initializing():
            self.cell(carry, jnp.zeros(x.shape[1:], x.dtype))  # creates the parameters; x may have no steps
        params, x = promoted(self.cell.variables["params"], x, self.cell.dtype)
        weights_and_rows, step = EQUATIONS[type(self.cell)]
        weights, rows = weights_and_rows(params, x)  # with time and batch as one axis XLA would gather a sharded batch
        carry = jax.tree.map(lambda c: jnp.asarray(c, state_dtype(c, rows)), carry)  # at least as wide as its summands
        weights, carry = jax.tree.map(lambda a: varying_as(a, (rows,)), (weights, carry))
        carry = jax.tree.map(lambda c: placed_as(c, rows, first=1), carry)
        return _scan_steps(step, weights, carry, rows)


def _joined(params: Params, layers: str, leaf: str) -> Array:
    return jnp.concatenate([params[layer][leaf] for layer in layers.split()], axis=-1)


def _lstm(params: Params, x: Array) -> tuple[Array, Array]:
    rows = plus_bias(x @ _joined(params, "ii if ig io", "kernel"), _joined(params, "hi hf hg ho", "bias"))
    return _joined(params, "hi hf hg ho", "kernel"), rows


def _lstm_step(kernel, carry, row):
    c, h = carry
    i, f, g, o = jnp.split(row + h.astype(row.dtype) @ kernel, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def _gru(params: Params, x: Array) -> tuple[tuple[Array, Array], Array]:
    rows = plus_bias(x @ _joined(params, "ir iz in", "kernel"), _joined(params, "ir iz in", "bias"))
    return (_joined(params, "hr hz hn", "kernel"), params["hn"]["bias"]), rows


def _gru_step(weights, h, row):
    kernel, bias = weights
    of_x, of_h = jnp.split(row, 3, axis=-1), jnp.split(h.astype(row.dtype) @ kernel, 3, axis=-1)
    r, z = (sigmoid(a + b) for a, b in zip(of_x[:2], of_h[:2], strict=True))
    n = jnp.tanh(of_x[2] + r * plus_bias(of_h[2], bias))
    h = (1 - z) * n + z * h
    return h, h


def _rnn(params: Params, x: Array) -> tuple[Array, Array]:
    return params["h"]["kernel"], plus_bias(x @ params["i"]["kernel"], params["i"]["bias"])


def _rnn_step(kernel, h, row):
    h = jnp.tanh(row + h.astype(row.dtype) @ kernel).astype(h.dtype)
    return h, h


# For each cell: the weights on h and the contribution of x to all steps; one step, `(weights, carry, row)`.
EQUATIONS = {nn.OptimizedLSTMCell: (_lstm, _lstm_step), nn.GRUCell: (_gru, _gru_step), nn.SimpleCell: (_rnn, _rnn_step)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_steps(step: Callable, weights: Any, carry: Any, rows: Array) -> tuple[Any, Array]:
    """A scan of `step(weights, carry, row) -> (carry, h)` over the rows: the last carry and the outputs."""
    return lax.scan(partial(step, weights), carry, rows, unroll=unroll())


def _scan_steps_forward(step, weights, carry, rows):
    def advance(before, row_and_added):
        row, added = row_and_added
        after, h = step(weights, before, row)
        return jax.tree.map(jnp.add, after, added), (before, h)

    def scan(carry, added):
        return lax.scan(advance, carry, (rows, added), unroll=unroll())

    zeros = jax.tree.map(lambda c: placed_as(varying_as(jnp.zeros((len(rows), *c.shape), c.dtype), (c,)), rows), carry)
    (last, (before, h)), back = jax.vjp(scan, carry, zeros)  # the gradient of `zeros` is the adjoint of each carry
    return (last, h), (weights, before, rows, back)


def _scan_steps_backward(step, kept, cotangents):
    (weights, before, rows, back), (d_last, d_h) = kept, cotangents
    d_carry, d_after = back((d_last, (jax.tree.map(jnp.zeros_like, before), d_h)))
    _, back_at_once = jax.vjp(lambda weights, rows: step(weights, before, rows), weights, rows)
    d_weights, d_rows = back_at_once((d_after, d_h))
    return d_weights, d_carry, d_rows


_scan_steps.defvjp(_scan_steps_forward, _scan_steps_backward)
