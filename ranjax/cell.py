"""The equations of a recurrent additive network, and its cell for Flax.

The letters are those of the paper: x input, c state, h output, i and f the input and the forget gate.
`u` is the content W_c x, `z` the pre-activation of both gates, `(..., 2, features)`: index 0 is the input
gate, 1 the forget gate. The parameters of a `RANCell` are this tree:

    content/kernel            (in, features)
    gates/kernel              (in, 2, features)
    gates/recurrent_kernel    (out, 2, features); (2, features) for diagonal gates; absent for input gates
    gates/bias                (2, features)
    projection/kernel, bias   (features, out), (out,); only with a projection
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from ranjax.errors import check_choice, check_size, is_number
from ranjax.scan import state_dtype

Params = Mapping[str, Any]  # the tree above
Vector = Float[Array, "*batch features"]
Gates = Float[Array, "*batch 2 features"]

GATES = ("recurrent", "diagonal", "input")
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "identity": lambda c: c}


def content(params: Params, x: Array) -> Vector:
    """The content u = W_c x: linear in x, without bias, independent of the state."""
    return jnp.dot(x, params["content"]["kernel"])


def gates_of_input(params: Params, x: Array) -> Gates:
    """W_x x + b: the contribution of the input to both gates' pre-activations."""
    gates = params["gates"]
    return plus_bias(jnp.tensordot(x, gates["kernel"], 1), gates["bias"])


def gates_of_state(params: Params, c: Vector, activation: str) -> Gates:
    """W_h h_{t-1}: the contribution of the last output, for gates that read it; `c` is c_{t-1}."""
    kernel = params["gates"]["recurrent_kernel"]
    h = output(params, c, activation).astype(kernel.dtype)
    if kernel.ndim == 2:
        h = h[..., None, :]
        return h * lax.broadcast_to_rank(kernel, h.ndim)
    return jnp.tensordot(h, kernel, 1)


def update(c: Vector, u: Vector, gates: Gates) -> Vector:
    """c_t = i_t * u_t + f_t * c_{t-1}; no nonlinearity is applied to the sum."""
    return gates[..., 0, :] * u + gates[..., 1, :] * c


def output(params: Params, c: Vector, activation: str) -> Array:
    """h = g(c), or its projection W_p g(c) + b_p."""
    h = ACTIVATIONS[activation](c)
    if "projection" not in params:
        return h
    kernel, bias = params["projection"]["kernel"], params["projection"]["bias"]
    return plus_bias(jnp.dot(h.astype(kernel.dtype), kernel), bias)


def plus_bias(products: Array, bias: Array) -> Array:
    """Products plus a bias, in their dtype; the sum, and the bias's gradient, are computed in float32 or wider."""
    dtype = state_dtype(products, bias)
    return (products.astype(dtype) + lax.broadcast_to_rank(bias, products.ndim).astype(dtype)).astype(products.dtype)


def step(params: Params, c: Vector, x: Array, activation: str = "tanh") -> Vector:
    r"""One step of a recurrent additive network: the next state.

    .. math::
        i_t, f_t = \sigma(W_x x_t + W_h h_{t-1} + b), \qquad c_t = i_t \, (W_c x_t) + f_t \, c_{t-1}

    Args:
      params: the parameters of a `RANCell`; their shapes determine the kind of gates.
      c: state `(*batch, features)`, float32 or wider.
      x: input `(*batch, in)`.
      activation: `"tanh"` or `"identity"`, the g of h = g(c).

    Returns:
      The next state, `(*batch, features)`, in the dtype of `c`.

    Raises:
      ValueError: for an unknown activation.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> cell = ranjax.RANCell(features=4)
      >>> x, c = jnp.ones((2, 3)), jnp.zeros((2, 4))
      >>> params = cell.init(jax.random.key(0), c, x)["params"]
      >>> bool(jnp.all(ranjax.cell.step(params, c, x) == cell.apply({"params": params}, c, x)[0]))
      True

    References:
      Lee, Levy, Zettlemoyer, "Recurrent Additive Networks", 2017, arXiv 1705.07393.
    """
    check_choice("activation", activation, ACTIVATIONS)
    z = gates_of_input(params, x).astype(c.dtype)
    if "recurrent_kernel" in params["gates"]:
        z = z + gates_of_state(params, c, activation)
    return update(c, content(params, x).astype(c.dtype), jax.nn.sigmoid(z.astype(c.dtype)))


class RANCell(nn.RNNCellBase):
    r"""The cell of a recurrent additive network, with the interface of `nn.LSTMCell`.

    .. math::
        u_t &= W_c x_t \\
        i_t &= \sigma(W_{ix} x_t + W_{ih} h_{t-1} + b_i) \\
        f_t &= \sigma(W_{fx} x_t + W_{fh} h_{t-1} + b_f) \\
        c_t &= i_t * u_t + f_t * c_{t-1} \\
        h_t &= g(c_t)

    The carry is the array c alone. It is float32 or wider and keeps its dtype; only h has the dtype `dtype`.

    The recurrence is linear in c for given gates. With `gates="input"` the gates of all steps can be computed before
    the states; the gates of the paper read h_{t-1}.

    `gate_fn` and `activation_fn` of flax's cells do not exist: the gates are sigmoids, and `activation` selects g.

    Attributes:
      features: size of the state.
      gates: `"recurrent"` (the paper: a full matrix on h_{t-1}), `"diagonal"` (each gate reads its own
        feature of h_{t-1} only) or `"input"` (x only, no matrix on h).
      activation: `"tanh"` or `"identity"`, the g of h = g(c).
      projection: size of the output, h = W_p g(c) + b_p; the gates then read the projected h. None: no
        projection.
      dtype: dtype of the products and of h (default: from the input and the parameters).
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels that read the input, and of the projection.
      recurrent_kernel_init: initialiser of the weights on h, called separately for each gate. Default: orthogonal; for
        diagonal gates, whose weights have the shape `(features,)`, uniform in +-1/sqrt(features).
      bias_init: initialiser of the biases: of each gate, and of the projection. Zeros, as in the paper.
      gates_bias_init: initialiser of both gates' biases at once, `(2, features)`, the input gate's first; see
        `half_life_biases`. None: `bias_init` for each.
      carry_init: initialiser of the carry.

    Raises:
      ValueError: for unknown `gates` or `activation`, sizes that are not whole numbers of at least 1, diagonal gates
        with a projection; in a call, for parameters of other gates or for inputs of another size.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, ranjax
      >>> layer = nn.RNN(ranjax.RANCell(features=64))
      >>> x = jnp.ones((10, 50, 32))  # (batch, time, in)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (10, 50, 64)

    References:
      Lee, Levy, Zettlemoyer, "Recurrent Additive Networks", 2017, arXiv 1705.07393; the variants of the
      gates: Levy, Lee, FitzGerald, Zettlemoyer, ACL 2018.
    """

    features: int
    gates: str = "recurrent"
    activation: str = "tanh"
    projection: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    recurrent_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    gates_bias_init: Initializer | None = None
    carry_init: Initializer = nn.initializers.zeros_init()

    def __post_init__(self):
        for name, choices in (("gates", GATES), ("activation", tuple(ACTIVATIONS))):
            check_choice(name, getattr(self, name), choices)
        check_size("features", self.features)
        check_size("projection", self.projection, optional=True)
        if self.gates == "diagonal" and self.projection is not None:
            raise ValueError(
                "`projection` cannot go with gates='diagonal': each gate reads its own feature of h, which a "
                f"projection mixes; got projection={self.projection}. Use gates='recurrent' or projection=None."
            )
        super().__post_init__()

    def __call__(self, carry: ArrayLike, inputs: ArrayLike) -> tuple[Array, Array]:
        """One step: the next state c_t, `(*batch, features)`, and the output h_t, `(*batch, out)`."""
        params, x = self.parameters(jnp.asarray(inputs))
        carry = checked_carry("carry", carry, (*x.shape[:-1], self.features))
        c = step(params, carry, x, self.activation)
        return c, output(params, c, self.activation).astype(x.dtype)

    @nn.compact
    def parameters(self, inputs: Array) -> tuple[Params, Array]:
        """The parameters for inputs `(..., in)`, and the inputs, both in the dtype of the products."""
        check_real("inputs", inputs)
        if inputs.ndim < 1:
            raise ValueError(f"`inputs` must have the axes (*batch, in); got the shape {inputs.shape}.")
        size, out = inputs.shape[-1], self.projection or self.features
        if self.has_variable("params", "content"):  # flax's own message would be about initialisers
            width = meta.unbox(self.get_variable("params", "content"))["kernel"].shape[0]
            if size != width:
                raise ValueError(
                    f"`inputs` must have {width} features, the last axis, for these parameters; got the shape "
                    f"{inputs.shape}."
                )
        gates = {"kernel": (self.kernel_init, (size, self.features)), "bias": (self.bias_init, (self.features,))}
        if self.gates == "recurrent":
            init = self.recurrent_kernel_init or _orthogonal
            gates["recurrent_kernel"] = (init, (out, self.features))
        elif self.gates == "diagonal":
            init = self.recurrent_kernel_init or uniform(self.features**-0.5)
            gates["recurrent_kernel"] = (init, (self.features,))
        content = {"kernel": (self.kernel_init, (size, self.features))}
        projection = {"kernel": (self.kernel_init, (self.features, out)), "bias": (self.bias_init, (out,))}
        tree = {
            "content": self.param("content", _drawn, content, self.param_dtype),
            "gates": self.param("gates", _drawn_for_both_gates, gates, self.param_dtype, self.gates_bias_init),
        }
        if self.projection is not None:
            tree["projection"] = self.param("projection", _drawn, projection, self.param_dtype)
        check_gates(self.gates, tree)  # flax compares only the leaves that both trees have
        return promoted(tree, inputs, self.dtype)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Array:
        """The state before the first step, `(*batch, features)`, for inputs of shape `(*batch, in)`."""
        return self.carry_init(rng, (*input_shape[:-1], self.features), state_dtype(self.param_dtype))

    @property
    def num_feature_axes(self) -> int:
        return 1


def gates_of(params: Params) -> str:
    """The kind of gates of these parameters: `"recurrent"`, `"diagonal"` or `"input"`."""
    weights = params["gates"].get("recurrent_kernel")
    return "input" if weights is None else "diagonal" if weights.ndim == 2 else "recurrent"


def check_gates(gates: str, params: Params) -> None:
    """Raises a ValueError if the gates are not those of the parameters."""
    if gates != gates_of(params):
        raise ValueError(f"`gates` must be {gates_of(params)!r}, which these parameters are for; got {gates!r}.")


def promoted(params: Params, x: Array, dtype: Dtype | None = None) -> tuple[Params, Array]:
    """The parameters and the inputs in one dtype, that of the products; biases keep theirs (`plus_bias`)."""
    leaves, structure = jax.tree.flatten(dict(params))
    x, *leaves = promote_dtype(x, *leaves, dtype=dtype)
    promoted = jax.tree.unflatten(structure, leaves)
    return jax.tree_util.tree_map_with_path(
        lambda path, new, old: jnp.asarray(old) if path[-1].key == "bias" else new, promoted, dict(params)
    ), x


def checked_inputs(params: Params, x: ArrayLike) -> tuple[Params, Array]:
    """The unboxed parameters and the inputs of a sequence, after a check that they are a cell's and fit."""
    params = meta.unbox(params)
    parts = params.get("content"), params.get("gates")
    if not all(isinstance(part, Mapping) and "kernel" in part for part in parts):
        raise ValueError(
            "`params` must be those of a RANCell: variables['params'] of a cell, variables['params']['cell'] "
            "of a layer, variables['params']['stack_0']['cell'] of a LanguageModel; "
            f"got {', '.join(params) or 'nothing'}."
        )
    x, width = jnp.asarray(x), params["gates"]["kernel"].shape[0]
    check_real("x", x)
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(
            f"`x` must have the axes (*batch, time, in), with in = {width} for these parameters; got the shape "
            f"{x.shape}."
        )
    return params, x


def check_real(name: str, x: Array) -> None:
    """Raises a TypeError for complex inputs."""
    if jnp.iscomplexobj(x):
        raise TypeError(f"`{name}` must be real; got {x.dtype}. Give real and imaginary parts as features.")


def checked_carry(name: str, carry: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A carry as an array, after a check that it is one state per sequence, in float32 or wider."""
    if not isinstance(carry, jax.Array | np.ndarray):
        raise TypeError(f"`{name}` must be the one array c, of shape {shape}; got a {type(carry).__name__}.")
    c = jnp.asarray(carry)
    if c.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape (*batch, features) = {shape}; got {c.shape}. "
            f"`jnp.zeros({shape})` is the state before the first step."
        )
    if not jnp.issubdtype(c.dtype, jnp.floating) or c.dtype != state_dtype(c.dtype):
        raise TypeError(
            f"`{name}` must be float32 or wider, since sums over many steps lose digits in narrower types; got "
            f"{c.dtype}. Convert it with `{name}.astype(jnp.float32)`."
        )
    return c


def _drawn(key: Array, shapes: Mapping[str, tuple[Initializer, tuple[int, ...]]], dtype: Dtype) -> Params:
    """Arrays drawn by their initialisers, with one key each."""
    keys = jax.random.split(key, len(shapes))
    return {name: init(k, shape, dtype) for k, (name, (init, shape)) in zip(keys, shapes.items(), strict=True)}


def _drawn_for_both_gates(key: Array, shapes: Mapping, dtype: Dtype, biases: Initializer | None) -> Params:
    """The blocks of both gates drawn separately, since the fan is that of one gate, and stacked before the features."""
    keys = jax.vmap(partial(jax.random.split, num=len(shapes)))(jax.random.split(key))
    both = {name: _both(init, keys[:, n], shape, dtype) for n, (name, (init, shape)) in enumerate(shapes.items())}
    if biases is not None:
        both["bias"] = jax.tree.map(lambda b: biases(keys[0, -1], b.shape, dtype), both["bias"])
    return meta.add_axis(both, -1, {meta.PARTITION_NAME: None})


def _both(init: Initializer, keys: Array, shape: tuple[int, ...], dtype: Dtype) -> Any:
    """The block of each gate; orthogonal ones by one batched QR, since two at once can deadlock in jaxlib 0.10."""
    if init is _orthogonal:
        return jax.vmap(partial(init, shape=shape, dtype=dtype), out_axes=-2)(keys)
    return jax.tree.map(lambda i, f: jnp.stack([i, f], axis=-2), *(init(k, shape, dtype) for k in keys))


def _orthogonal(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Orthogonal, drawn in float32 or wider, since there is no QR decomposition in bfloat16."""
    return nn.initializers.orthogonal()(key, shape, state_dtype(dtype)).astype(dtype)


def uniform(bound: float) -> Initializer:
    """An initialiser, uniform in [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def half_life_biases(longest: float = 64.0, keep_variance: bool = False) -> Initializer:
    r"""An initialiser of the biases of both gates: where the inputs are 0, states halve after 1 to `longest` steps.

    .. math::
        f = 2^{-1/n}, \qquad b_f = \ln \frac{f}{1 - f}, \qquad n \text{ from 1 to longest, evenly in } \ln n

    The input gate's biases are 0, or, with `keep_variance`, those of a gate with which a state that sums independent
    contents keeps their variance:

    .. math::
        i = \sqrt{1 - f^2}, \qquad b_i = \ln \frac{i}{1 - i}

    Args:
      longest: half-life of the last feature, in steps, at least 1.
      keep_variance: whether the input gate belongs to the forget gate.

    Returns:
      An initialiser for `RANCell(gates_bias_init=...)`; it draws nothing.

    Raises:
      ValueError: for a `longest` below 1 or not finite.

    Example:
      >>> import jax, ranjax
      >>> from ranjax.cell import half_life_biases
      >>> i, f = jax.nn.sigmoid(half_life_biases(64.0, keep_variance=True)(jax.random.key(0), (2, 3)))
      >>> (f ** jax.numpy.array([1, 8, 64])).round(3).tolist(), (i**2 + f**2).round(3).tolist()
      ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0])

    References:
      Tallec and Ollivier, "Can Recurrent Neural Networks Warp Time?", ICLR 2018; De et al., "Griffin", 2024, arXiv
      2402.19427, whose inputs have the factor sqrt(1 - f^2) at every step.
    """
    check_half_life("longest", longest)

    def init(key, shape, dtype=jnp.float32):
        log_f = -math.log(2) / jnp.geomspace(1, longest, shape[-1])
        forget = log_f - jnp.log(-jnp.expm1(log_f))
        i = jnp.sqrt(-jnp.expm1(2 * log_f))
        of_input = jnp.log(i) - jnp.log1p(-i) if keep_variance else jnp.zeros_like(forget)
        return jnp.stack([of_input, forget]).astype(dtype)

    return init


def check_half_life(name: str, value: Any) -> None:
    """Raises a ValueError for an argument that is no half-life in steps."""
    if not (is_number(value) and 1 <= value < math.inf):
        raise ValueError(f"`{name}` must be finite and at least 1, in steps; got {value!r}.")
