"""The cell, the layer and the residual block for Flax NNX: the functions and parameters of the Linen ones.

A module here holds `nnx.Param`s in the tree that the Linen module has under `"params"`, and computes by the Linen
module. `to_linen` and `from_linen` convert.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> import ranjax.nnx
  >>> cell = ranjax.nnx.RANCell(32, 64, rngs=nnx.Rngs(0))
  >>> x = jnp.ones((10, 50, 32))  # (batch, time, in)
  >>> nnx.RNN(cell)(x).shape, ranjax.nnx.RAN(cell)(x).shape  # the same, the second faster
  ((10, 50, 64), (10, 50, 64))
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike

from ranjax import block as linen_block
from ranjax import cell as linen_cell
from ranjax import layer as linen_layer
from ranjax.errors import check_size
from ranjax.scan import state_dtype
from ranjax.solvers.fixed_point import FixedPoint


class Params(nnx.Module):
    """A tree of parameters, under the names that it has in Linen."""

    def __init__(self, tree: Mapping[str, Any]):
        _set(self, tree)


class RANCell(nnx.RNNCellBase):
    """The cell of a recurrent additive network, with the interface of `nnx.GRUCell`.

    The equations and the options are those of `ranjax.RANCell`. The carry is the array c alone. The cell keeps no
    random keys.

    Args:
      in_features: size of the input.
      hidden_features: size of the state.
      gates, activation, projection, dtype, param_dtype, kernel_init, recurrent_kernel_init, bias_init, gates_bias_init:
        as of `ranjax.RANCell`.
      rngs: its stream `params` draws the parameters.

    Raises:
      ValueError: as `ranjax.RANCell`; for a size that is no whole number of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import ranjax.nnx
      >>> cell = ranjax.nnx.RANCell(3, 4, gates="input", rngs=nnx.Rngs(0))
      >>> carry, h = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
      >>> carry.shape, h.shape
      ((2, 4), (2, 4))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gates: str = "recurrent",
        activation: str = "tanh",
        projection: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = linen_cell.RANCell.kernel_init,
        recurrent_kernel_init: Initializer | None = None,
        bias_init: Initializer = linen_cell.RANCell.bias_init,
        gates_bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        check_size("in_features", in_features)
        check_size("hidden_features", hidden_features)
        self.in_features, self.hidden_features = in_features, hidden_features
        self.linen = linen_cell.RANCell(
            hidden_features,
            gates,
            activation,
            projection,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            recurrent_kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
            gates_bias_init=gates_bias_init,
            parent=None,
        )
        _draw(self, rngs, jnp.zeros((hidden_features,)), jnp.zeros((in_features,)))

    def __call__(self, carry: ArrayLike, inputs: ArrayLike) -> tuple[Array, Array]:
        """One step: the next state c_t, `(*batch, hidden_features)`, and the output h_t, `(*batch, out)`."""
        return _apply(self, carry, inputs)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Array:
        """The state before the first step for inputs of this shape: zeros, or as `carry_init` draws it from `rngs`."""
        shape, dtype = (*input_shape[:-1], self.hidden_features), state_dtype(self.linen.param_dtype)
        if carry_init is None:
            return jnp.zeros(shape, dtype)
        if rngs is None:
            raise ValueError("`carry_init` draws from `rngs`; got None. Pass nnx.Rngs(seed).")
        return carry_init(rngs.carry() if isinstance(rngs, nnx.Rngs) else rngs(), shape, dtype)

    @property
    def num_feature_axes(self) -> int:
        return 1


class RAN(nnx.Module):
    """A recurrent additive network over a sequence; a drop-in for `nnx.RNN(cell)`, faster.

    Args:
      cell: a `ranjax.nnx.RANCell`.
      solver, time_major, return_carry, reverse, keep_order, axis_name: as of `ranjax.RAN`.

    Raises:
      TypeError: for another cell.
      ValueError: as `ranjax.RAN`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import ranjax.nnx
      >>> layer = ranjax.nnx.RAN(ranjax.nnx.RANCell(3, 4, gates="input", rngs=nnx.Rngs(0)), return_carry=True)
      >>> carry, h = layer(jnp.ones((2, 50, 3)))
      >>> carry.shape, h.shape
      ((2, 4), (2, 50, 4))
    """

    def __init__(
        self,
        cell: RANCell,
        *,
        solver: str | FixedPoint = "auto",
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        axis_name: str | None = None,
    ):
        self.cell = _checked(cell)
        flags = time_major, return_carry, reverse, keep_order
        self.linen = linen_layer.RAN(cell.linen, solver, *flags, axis_name, parent=None)

    def __call__(
        self,
        inputs: ArrayLike,
        *,
        initial_carry: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
        segment_starts: ArrayLike | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Runs the cell over the sequence; see `ranjax.RAN`. The state begins at zeros, so `rngs` is not read."""
        return _apply(
            self,
            inputs,
            initial_carry,
            seq_lengths=seq_lengths,
            segment_starts=segment_starts,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
        )


class ResidualBlock(nnx.Module):
    """A RAN with a convolution before it, an output gate and an MLP, added to its input; see `ranjax.ResidualBlock`.

    Args:
      cell: a `ranjax.nnx.RANCell`; its `in_features` are those of the block.
      conv_width, expansion, dropout, solver, time_major, return_carry, reverse, keep_order, axis_name: as of
        `ranjax.ResidualBlock`.
      rngs: its stream `params` draws the parameters; its stream `dropout` is kept where there is a rate.

    `train()` and `eval()` of the module switch dropout on and off.

    Raises:
      TypeError: for another cell.
      ValueError: as `ranjax.ResidualBlock`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import ranjax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> block = ranjax.nnx.ResidualBlock(ranjax.nnx.RANCell(32, 64, gates="input", rngs=rngs), rngs=rngs)
      >>> block(jnp.ones((10, 50, 32))).shape
      (10, 50, 32)
    """

    def __init__(
        self,
        cell: RANCell,
        *,
        conv_width: int = 4,
        expansion: float | None = 1.5,
        dropout: float = 0.0,
        solver: str | FixedPoint = "auto",
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        flags = time_major, return_carry, reverse, keep_order
        sizes = conv_width, expansion, dropout
        self.linen = linen_block.ResidualBlock(_checked(cell).linen, *sizes, solver, *flags, axis_name, parent=None)
        self.deterministic = False
        if dropout:
            self.rngs = rngs.dropout.fork()
        _draw(self, rngs, jnp.zeros((1, cell.in_features)), deterministic=True)
        self.cell = cell  # with the parameters that it has

    def __call__(
        self,
        inputs: ArrayLike,
        initial_carry: tuple[Any, ArrayLike] | None = None,
        seq_lengths: ArrayLike | None = None,
        segment_starts: ArrayLike | None = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Runs the block over the sequence; see `ranjax.ResidualBlock`. `rngs` replaces the stream that is kept."""
        off = self.deterministic if deterministic is None else deterministic
        keys = {}
        if self.linen.dropout and not off:
            stream = self.rngs if rngs is None else rngs
            keys = {"dropout": stream.dropout() if isinstance(stream, nnx.Rngs) else stream()}
        return _apply(self, inputs, initial_carry, seq_lengths, segment_starts, deterministic=off, rngs=keys)


def to_linen(module: RANCell | RAN | ResidualBlock) -> tuple[nn.Module, dict[str, Any]]:
    """The Linen module of the same settings, and its variables: `linen.apply(variables, ...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import ranjax.nnx
      >>> layer, x = ranjax.nnx.RAN(ranjax.nnx.RANCell(3, 4, rngs=nnx.Rngs(0))), jnp.ones((2, 50, 3))
      >>> linen, variables = ranjax.nnx.to_linen(layer)
      >>> bool((linen.apply(variables, x) == layer(x)).all())
      True
    """
    return module.linen, {"params": _tree(module)}


def from_linen(module: nn.Module, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None) -> Any:
    """The NNX module of the same settings, with copies of the variables.

    Args:
      module: a `ranjax.RANCell`, or a `ranjax.RAN` or `ranjax.ResidualBlock` of one.
      variables: its variables, `{"params": ...}`.
      rngs: the stream `dropout` is that of a block with a rate; None: `nnx.Rngs(0)`.

    Raises:
      TypeError: for another module.
      ValueError: for parameters of other names or shapes.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> import ranjax.nnx
      >>> linen, x = ranjax.RAN(ranjax.RANCell(4)), jnp.ones((2, 50, 3))
      >>> variables = linen.init(jax.random.key(0), x)
      >>> bool((ranjax.nnx.from_linen(linen, variables)(x) == linen.apply(variables, x)).all())
      True
    """
    rngs, params = nnx.Rngs(0) if rngs is None else rngs, meta.unbox(dict(variables["params"]))
    if isinstance(module, linen_cell.RANCell):
        names = ("gates", "activation", "projection", "dtype", "param_dtype", "kernel_init", "recurrent_kernel_init")
        names += ("bias_init", "gates_bias_init")
        options = {name: getattr(module, name) for name in names}
        found = RANCell(params["content"]["kernel"].shape[0], module.features, **options, rngs=rngs)
    elif isinstance(module, linen_layer.RAN | linen_block.ResidualBlock):
        cell = from_linen(module.cell, {"params": params["cell"]})
        names = ("solver", "time_major", "return_carry", "reverse", "keep_order", "axis_name")
        options = {name: getattr(module, name) for name in names}
        if isinstance(module, linen_layer.RAN):
            return RAN(cell, **options)
        options |= {name: getattr(module, name) for name in ("conv_width", "expansion", "dropout")}
        found = ResidualBlock(cell, **options, rngs=rngs)
    else:
        got = type(module).__name__
        raise TypeError(f"`module` must be a ranjax.RANCell, or a ranjax.RAN or ResidualBlock of one; got a {got}.")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (_tree(found), params)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"`variables` must be those of the module, of the shapes {shapes[0]}; got {shapes[1]}.")
    _set(found, params)
    return found


def _checked(cell: RANCell) -> RANCell:
    if not isinstance(cell, RANCell):
        raise TypeError(f"`cell` must be a ranjax.nnx.RANCell; got a {type(cell).__name__}.")
    return cell


def _draw(module: Any, rngs: nnx.Rngs, *inputs: Array, **options: Any) -> None:
    """The parameters of the Linen module for inputs like these, drawn."""
    _set(module, meta.unbox(module.linen.init(rngs.params(), *inputs, **options)["params"]))


def _apply(module: Any, *arguments: Any, rngs: Any = None, **options: Any) -> Any:
    return module.linen.apply({"params": _tree(module)}, *arguments, rngs=rngs, **options)


def _set(module: nnx.Module, tree: Mapping[str, Any]) -> None:
    """Gives a module the parameters of a tree."""
    for name, value in tree.items():
        if isinstance(getattr(module, name, None), nnx.Module):
            _set(getattr(module, name), value)
        else:
            setattr(module, name, Params(value) if isinstance(value, Mapping) else nnx.Param(jnp.asarray(value)))


def _tree(module: nnx.Module) -> dict[str, Any]:
    """The tree of a module's parameters."""
    parts = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Module | nnx.Param)}
    return {name: value[...] if isinstance(value, nnx.Param) else _tree(value) for name, value in parts.items()}
