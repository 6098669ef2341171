"""A recurrent language model: embedding, layers of cells, output layer."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from ranjax.baselines import Stepwise
from ranjax.block import ResidualBlock, check_expansion
from ranjax.cell import ACTIVATIONS, GATES, RANCell, check_half_life, checked_carry, half_life_biases, uniform
from ranjax.errors import check_choice, check_rate, check_size
from ranjax.layer import RAN
from ranjax.output import AdaptiveSoftmax, FullSoftmax, Words, check_cutoffs, default_cutoffs
from ranjax.scan import state_dtype
from ranjax.solvers import check_solver, is_sequential
from ranjax.solvers.fixed_point import FixedPoint

Carries = tuple  # one carry per layer

CELLS = ("ran", "lstm", "gru", "rnn")
RAN_ONLY = ("projection", "gates", "activation", "solver", "axis_name", "gate_init", "half_life")
DROPOUTS = ("dropout", "dropout_input", "dropout_output", "dropout_words")
BLOCKS = ("plain", "residual")
RESIDUAL_ONLY = ("conv_width", "expansion")
SOFTMAXES = ("full", "adaptive")
GATE_INITS = ("zeros", "half-lives", "half-lives-variance")


class LanguageModel(nn.Module):
    r"""Predicts every next token of a text from the tokens before it.

    .. math::
        h^0_t = E_{w_t}, \qquad h^l = \text{layer}_l(h^{l-1}), \qquad
        p(w_{t+1} \mid w_{\le t}) = \text{softmax}(W_o h^L_t + b_o)

    With `block="residual"` every layer is a `ResidualBlock` as wide as the embedding, the stream begins with
    :math:`h^0_t = \sqrt{d} E_{w_t}` for an embedding of size d, and an RMSNorm is before the output layer.

    Dropout applies to the embedding and to the output of every layer; with residual blocks to what each adds to the
    stream, and to the last norm. It never applies to the recurrence. Masks are drawn outside the loop over time, for
    every step, or one for all steps of a sequence (`locked`).

    Attributes:
      vocabulary: number of tokens.
      cell: `"ran"`, `"lstm"`, `"gru"` or `"rnn"` (an Elman network). The last three have gradients in reverse mode
        only.
      features: size of the state, one number for all layers or one for each.
      layers: number of layers (default: the number of sizes in `features`, or 2 for a single size).
      embedding: size of the embedding (default: that of the last output with `tie`, else that of the first layer).
      projection, gates, activation, solver: of the RAN's cells and layers; see `RANCell` and `RAN`.
      gate_init: the biases of a RAN's gates at first: `"zeros"`, or `"half-lives"` for forget gates with which states
        halve after 1 to `half_life` steps, with `"half-lives-variance"` for input gates that belong to them, too; see
        `ranjax.cell.half_life_biases`.
      half_life: the longest of these half-lives, in steps (default: 64).
      block: `"plain"`, layers in sequence, or `"residual"`.
      conv_width, expansion: of the residual blocks; see `ResidualBlock`.
      dropout: rate, in [0, 1).
      dropout_input, dropout_output: rates on the embedding and on what the output layer reads (default: `dropout`).
      dropout_words: rate at which words are dropped: a word has no embedding wherever it stands in the tokens.
      locked: each sequence has one mask for all steps; also called variational dropout (Gal and Ghahramani 2016).
      tie: the output layer is the embedding's transpose; the last output must have the embedding's size.
      softmax: `"full"`; or `"adaptive"`, where rare words cost little; ids must be in the order of frequency. With
        `tie` rare words have fewer features in the embedding, too. See `ranjax.output.AdaptiveSoftmax`.
      cutoffs: of the adaptive softmax, the first ids of its clusters (default: 2,000; above 20,000 words 10,000, too;
        above 100,000 words 10,000 and 60,000).
      init_scale: every weight is drawn uniformly from +-init_scale. None: embedding uniform in +-0.1, the default
        initialisers of the cells, LeCun's for the output layer.
      dtype: dtype of the products; the logits are float32 or wider.
      axis_name: inside `jax.shard_map`, the mesh axis that time is spread over; see `RAN`. Tokens and logits are one
        device's part, the state is that of the whole text. Every device needs its own dropout key.

    Raises:
      ValueError: for an unknown cell, block, gates or activation, a solver that does not fit them, a number of sizes
        that is not the number of layers, a tied output whose sizes differ, a size below 1, a dropout rate outside
        [0, 1), an `init_scale` that is not above 0, an option of the RAN for another cell, one of residual blocks for
        plain layers.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> model = ranjax.LanguageModel(vocabulary=50, features=16)
      >>> tokens = jnp.zeros((2, 7), jnp.int32)  # (batch, time)
      >>> variables = model.init(jax.random.key(0), tokens, deterministic=True)
      >>> logits, state = model.apply(variables, tokens, deterministic=True)
      >>> logits.shape, [c.shape for c in state]
      ((2, 7, 50), [(2, 16), (2, 16)])
    """

    vocabulary: int
    cell: str = "ran"
    features: int | tuple[int, ...] | list[int] = 200
    layers: int | None = None
    embedding: int | None = None
    projection: int | None = None
    gates: str = "recurrent"
    activation: str = "tanh"
    gate_init: str = "zeros"
    half_life: float = 64.0
    solver: str | FixedPoint = "auto"
    block: str = "plain"
    conv_width: int = 4
    expansion: float | None = 1.5
    dropout: float = 0.0
    dropout_input: float | None = None
    dropout_output: float | None = None
    dropout_words: float = 0.0
    locked: bool = False
    tie: bool = False
    softmax: str = "full"
    cutoffs: tuple[int, ...] | list[int] | None = None
    init_scale: float | None = None
    dtype: Dtype | None = None
    axis_name: str | None = None

    def __post_init__(self):
        check_choice("cell", self.cell, CELLS)
        check_choice("block", self.block, BLOCKS)
        if isinstance(self.features, list):
            self.features = tuple(self.features)  # a module is hashed
        if isinstance(self.cutoffs, list):
            self.cutoffs = tuple(self.cutoffs)
        check_choice("softmax", self.softmax, SOFTMAXES)
        check_size("vocabulary", self.vocabulary)
        for name in ("layers", "embedding", "projection"):
            check_size(name, getattr(self, name), optional=True)
        if self.cell == "ran":
            check_choice("gates", self.gates, GATES)
            check_choice("activation", self.activation, ACTIVATIONS)
            check_choice("gate_init", self.gate_init, GATE_INITS)
            check_half_life("half_life", self.half_life)
            check_solver(self.solver, self.gates, self.axis_name)
        if self.init_scale is not None and not self.init_scale > 0:
            raise ValueError(f"`init_scale` must be above 0; got {self.init_scale}.")
        for name in DROPOUTS:
            if getattr(self, name) is not None or name in ("dropout", "dropout_words"):
                check_rate(name, getattr(self, name))
        self._check_options()
        self._check_ends()
        super().__post_init__()

    @nn.nowrap
    def _check_options(self) -> None:
        """Raises a ValueError for an option of another cell, block or softmax than the model's."""
        options = [("cell", "ran", name) for name in RAN_ONLY]
        options += [("block", "residual", name) for name in RESIDUAL_ONLY] + [("softmax", "adaptive", "cutoffs")]
        for of, kind, name in options:
            value, chosen = getattr(self, name), getattr(self, of)
            if chosen != kind and value != getattr(LanguageModel, name):
                raise ValueError(f"`{name}` is an option of {of}={kind!r}; got {value!r} with {of}={chosen!r}.")

    @nn.nowrap
    def _check_ends(self) -> None:
        """Raises a ValueError for blocks, clusters of words or a tied output whose sizes do not fit."""
        if self.block == "residual":
            check_size("conv_width", self.conv_width)
            check_expansion(self.expansion, self.embedding_size)
        if self.softmax == "adaptive":
            check_cutoffs(self.word_clusters, self.vocabulary)
        last = self.output_size
        if self.tie and self.embedding_size != last:
            raise ValueError(
                f"`tie` needs the embedding to be as wide as the last output; got embedding={self.embedding_size} "
                f"and an output of {last}. Make them equal, or leave the output layer untied."
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each layer's state."""
        sizes = tuple(self.features) if isinstance(self.features, (tuple, list)) else (self.features,)
        if not sizes:
            raise ValueError("`features` must be one size, or one for each layer; got none.")
        layers = self.layers or (2 if len(sizes) == 1 else len(sizes))
        for size in sizes:
            check_size("features", size)
        if len(sizes) not in (1, layers):
            raise ValueError(f"`features` must be one size, or one for each of {layers} layers; got {self.features}.")
        return sizes * (layers // len(sizes))

    @nn.nowrap
    def carries(self, state: Carries | None, batch: tuple[int, ...]) -> Carries:
        """One carry, or None, for each layer, after a check of the shapes for this batch."""
        if state is None:
            return (None,) * len(self.sizes)
        if len(state) != len(self.sizes):
            raise ValueError(f"`state` must be one carry for each of {len(self.sizes)} layers; got {len(state)}.")
        carries = []
        for n, (carry, size) in enumerate(zip(state, self.sizes, strict=True)):
            shape, got = (*batch, size), jax.tree.map(lambda c: getattr(c, "shape", None), carry)
            expected = (shape, shape) if self.cell == "lstm" else shape
            if self.block == "residual":
                expected = expected, (*batch, self.conv_width - 1, self.embedding_size)
            if carry is not None and got != expected:
                one = " Of a batch of one, jax.tree.map(lambda c: c[0], state) is that of one sequence."
                raise ValueError(
                    f"`state[{n}]` must have the shape {expected}, of the sequences that `tokens` has; got {got}."
                    + one * any(jnp.ndim(c) > len(shape) for c in jax.tree.leaves(carry))
                )
            if carry is not None and self.cell == "ran":
                if self.block == "residual":
                    carry = checked_carry(f"state[{n}][0]", carry[0], shape), carry[1]
                else:
                    carry = checked_carry(f"state[{n}]", carry, shape)
            carries.append(carry)
        return tuple(carries)

    @property
    def _outputs(self) -> tuple[int, ...]:
        return tuple(self.projection or size for size in self.sizes)

    @property
    def embedding_size(self) -> int:
        return self.embedding or (self._outputs[-1] if self.tie and self.block == "plain" else self.sizes[0])

    @property
    def output_size(self) -> int:
        """The size of what the output layer reads."""
        return self._outputs[-1] if self.block == "plain" else self.embedding_size

    @property
    def word_clusters(self) -> tuple[int, ...]:
        """The cutoffs of the adaptive softmax."""
        return default_cutoffs(self.vocabulary) if self.cutoffs is None else tuple(self.cutoffs)

    @property
    def input_scale(self) -> float:
        """The factor of the embeddings in the network's input: a residual stream begins about as large as its norms."""
        return math.sqrt(self.embedding_size) if self.block == "residual" else 1.0

    @property
    def time_major(self) -> bool:
        """Whether the layers run with time as the first axis: where they scan over it with full matrices."""
        return self.cell != "ran" or (
            self.gates == "recurrent" and is_sequential(self.solver, "recurrent", self.axis_name)
        )

    def setup(self):
        init = uniform(self.init_scale or 0.1)
        adaptive = self.softmax == "adaptive"
        if adaptive:
            sizes = self.vocabulary, self.output_size, self.word_clusters
            self.adaptive = AdaptiveSoftmax(*sizes, self.init_scale or 0.1, self.dtype)
        if not (adaptive and self.tie):
            self.embed = Words(self.vocabulary, self.embedding_size, dtype=self.dtype, embedding_init=init)
        self.stack = [self._layer(size) for size in self.sizes]
        over = (0 if self.time_major else 1,) if self.locked else ()
        self.drop = nn.Dropout(self.dropout, over)
        first, last = self.dropout_input, self.dropout_output
        self.drop_input = self.drop if first is None else nn.Dropout(first, over)
        self.drop_output = self.drop if last is None else nn.Dropout(last, over)
        if self.block == "residual":
            self.norm = nn.RMSNorm()  # in the dtype of the stream
        if adaptive:
            return
        if self.tie:
            self.bias = self.param("bias", nn.initializers.zeros_init(), (self.vocabulary,), jnp.float32)
        else:
            kernel_init = init if self.init_scale else nn.initializers.lecun_normal()
            self.decode = nn.Dense(
                self.vocabulary, kernel_init=kernel_init, dtype=self.dtype, promote_dtype=_promoted_but_bias
            )

    @nn.nowrap  # flax's tables call every other method again, by itself
    def _layer(self, features: int) -> nn.Module:
        """One layer over a sequence that returns `(carry, outputs)`."""
        cell = self._cell(features)
        options: dict = {"time_major": self.time_major, "return_carry": True, "axis_name": self.axis_name}
        if self.block == "residual":
            sizes = self.conv_width, self.expansion, self.dropout
            return ResidualBlock(cell, *sizes, solver=self.solver, locked=self.locked, **options)
        return RAN(cell, self.solver, **options) if isinstance(cell, RANCell) else Stepwise(cell)

    @nn.nowrap
    def _cell(self, features: int) -> Any:
        options: dict = {"dtype": self.dtype}
        if self.init_scale:
            options |= {"kernel_init": uniform(self.init_scale), "recurrent_kernel_init": uniform(self.init_scale)}
        if self.cell == "ran":
            if self.gate_init != "zeros":
                keep_variance = self.gate_init == "half-lives-variance"
                options["gates_bias_init"] = half_life_biases(self.half_life, keep_variance)
            return RANCell(features, self.gates, self.activation, self.projection, **options)
        cells: dict[str, Callable] = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}
        return cells[self.cell](features, **options)

    def hidden(self, tokens: ArrayLike, state: Carries | None = None, *, deterministic: bool) -> tuple[Array, Carries]:
        """The outputs of the last layer, `(batch, time, out)`, and the state; see `__call__`."""
        tokens = checked_ids(tokens, self.vocabulary)
        if tokens.ndim != 2:
            raise ValueError(f"`tokens` must have the axes (batch, time); got the shape {tokens.shape}.")
        tokens = tokens.T if self.time_major else tokens
        h = self.drop_input(self._words_dropped(self.embedded(tokens), tokens, deterministic), deterministic)
        carries, given = [], self.carries(state, tokens.shape[1:] if self.time_major else tokens.shape[:1])
        for n, (layer, carry) in enumerate(zip(self.stack, given, strict=True), 1):
            if isinstance(layer, ResidualBlock):
                carry, h = layer(h, carry, deterministic=deterministic)
            else:
                carry, h = layer(h, initial_carry=carry)
                if n < len(given):
                    h = self.drop(h, deterministic)
            carries.append(carry)
        if self.block == "residual":
            h = self.norm(h).astype(self.dtype or h.dtype)
        last = self.drop_output(h, deterministic)
        if not deterministic:
            self.sow("outputs", "last", (h, last))
        return jnp.swapaxes(last, 0, 1) if self.time_major else last, tuple(carries)

    def _words_dropped(self, embedded: Array, tokens: Array, deterministic: bool) -> Array:
        """The embeddings, of some words 0 everywhere, and of the others as much larger."""
        if deterministic or not self.dropout_words:
            return embedded
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout_words, (self.vocabulary,))
        return jnp.where(kept[tokens][..., None], embedded / (1 - self.dropout_words), 0)

    def embedded(self, tokens: Array) -> Array:
        """What the first layer reads of these tokens, before dropout."""
        words = self.adaptive if self.softmax == "adaptive" and self.tie else self
        return self.input_scale * words.embed(tokens)

    def logits(self, hidden: Array) -> Array:
        """The output layer: `(..., vocabulary)` in float32 or wider. An adaptive softmax has log-probabilities."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # with two axes, XLA transposes a copy of their gradients on a CPU
        if self.softmax == "adaptive":
            logits = self.adaptive(rows)
        else:
            logits = self.embed.attend(rows) + self.bias[None] if self.tie else self.decode(rows)
        return logits.astype(state_dtype(logits)).reshape(*hidden.shape[:-1], self.vocabulary)

    def nats(self, hidden: Array, targets: Array) -> Array:
        """-log p of each target, of the shape of `targets`, for outputs of `hidden`; of no more logits than needed."""
        return self._softmax().nats(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)).reshape(targets.shape)

    def total_nats(self, hidden: Array, targets: Array) -> Array:
        """The sum of -log p of all targets, with gradients, without holding all logits; see `ranjax.output`."""
        return self._softmax().total_nats(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))

    def score(self, word: Array) -> tuple[Array, Array]:
        """The weights and the bias of a word's logit; of an adaptive softmax, of its score within its cluster."""
        return self._softmax().score(word)

    def _softmax(self) -> Any:
        """The output layer as what `ranjax.output` has."""
        if self.softmax == "adaptive":
            return self.adaptive
        params = jax.tree.map(jnp.asarray, meta.unbox(self.variables["params"]))
        if self.tie:
            kernel, bias, axis = params["embed"]["embedding"], params["bias"], 0
        else:
            kernel, bias, axis = params["decode"]["kernel"], params["decode"]["bias"], 1
        return FullSoftmax(kernel if self.dtype is None else kernel.astype(self.dtype), bias, axis)

    def __call__(
        self, tokens: ArrayLike, state: Carries | None = None, *, deterministic: bool
    ) -> tuple[Array, Carries]:
        """The logits of the next token after each token.

        Args:
          tokens: ids, `(batch, time)`.
          state: one carry per layer, as returned by an earlier call; None at the beginning of a text.
          deterministic: no dropout; otherwise pass a key named `"dropout"`.

        Returns:
          Logits `(batch, time, vocabulary)`, and the state after the last token.

        Raises:
          ValueError, TypeError: for tokens of another shape, that are not integers or, where they are not traced, not
            from 0 to `vocabulary` - 1; for a number of carries other than the number of layers, a carry that does not
            fit.
        """
        hidden, state = self.hidden(tokens, state, deterministic=deterministic)
        return self.logits(hidden), state


def _promoted_but_bias(*arrays: Array | None, dtype: Dtype | None = None, inexact: bool = True) -> list[Array | None]:
    """The operands of a product in its dtype; the bias keeps its own, since its gradient is a sum over all rows."""
    *operands, bias = arrays
    return [*promote_dtype(*operands, dtype=dtype, inexact=inexact), bias]


class Trained(Protocol):
    """A model with its parameters; what `ranjax.evaluate.load_run` returns fits."""

    @property
    def model(self) -> LanguageModel: ...

    @property
    def params(self) -> Any: ...


def checked_ids(tokens: ArrayLike, vocabulary: int) -> Array:
    """Tokens as an array, after a check that they are ids and, unless they are traced, the model's."""
    ids = jnp.asarray(tokens)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"`tokens` must be ids, which are integers; got {ids.dtype}.")
    if ids.size and not isinstance(tokens, Tracer):
        least, largest = np.asarray(tokens).min(), np.asarray(tokens).max()
        if not 0 <= least <= largest < vocabulary:
            raise ValueError(f"`tokens` must be ids from 0 to {vocabulary - 1}, the model's; got {least} to {largest}.")
    return ids


def checked_text(name: str, ids: Any, vocabulary: int) -> np.ndarray:
    """The ids of one text, `(tokens,)`, as int32, after a check that they are the model's."""
    text, expected = np.asarray(ids), f"whole numbers from 0 to {vocabulary - 1}, the model's"
    if not np.issubdtype(text.dtype, np.number):
        raise ValueError(f"`{name}` must be {expected}; got {ids!r:.40}.")
    if text.ndim != 1:
        raise ValueError(f"`{name}` must be the ids of one text, (tokens,); got the shape {text.shape}.")
    if len(text) and (not np.issubdtype(text.dtype, np.integer) or text.min() < 0 or text.max() >= vocabulary):
        raise ValueError(f"`{name}` must be {expected}; got {text.dtype} from {text.min()} to {text.max()}.")
    return text.astype(np.int32)


def zero_state(model: LanguageModel, params: Any, batch_size: int) -> Carries:
    """The state before the first token.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.lm import zero_state
      >>> model = ranjax.LanguageModel(vocabulary=9, layers=2, features=4)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
      >>> [c.shape for c in zero_state(model, params, batch_size=3)]
      [(3, 4), (3, 4)]
    """
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
    _, state = jax.eval_shape(partial(model.apply, deterministic=True), {"params": params}, tokens)
    return jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), state)
