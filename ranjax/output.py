r"""The output layer's cross-entropy: at a bounded memory for any vocabulary, and at the price of frequent words.

A full softmax over V words costs n V d products for n predictions from d features. An adaptive one (Grave et al. 2017)
has the frequent words and one entry for each cluster of rarer ones in its head,

.. math::
    p(w) = p_{head}(w) \quad\text{or}\quad p_{head}(k) \, p_k(w) \quad\text{for } w \text{ in cluster } k,

and computes a cluster only for those predictions whose word is in it, from fewer features. Both are exact.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import Array, lax

from ranjax.cell import uniform
from ranjax.errors import is_size
from ranjax.sharding import alike, rows_of, varying_as

HELD = 2**22  # logits, at most, that a loss holds at once (16 MB); but those of LEAST rows
FEW = 64  # rows a chunk where only some are taken
LEAST = 32  # rows a chunk: each adds to the gradient of the whole kernel
FACTOR = 4  # each cluster has a fourth of the features of the one before


def nats(
    rows: Array, kernel: Array, bias: Array, targets: Array, count: Array | None = None, *, axis: int = 0
) -> Array:
    """-log p(target) of each row in nats, `(n,)`, 0 from `count` on. See `total_nats`, which has gradients."""

    def losses(x, y, taken, sums):
        return (_softmax(x, kernel, bias, y, taken, axis)[0],), sums

    wide = jnp.promote_types(jnp.float32, rows.dtype)
    rows, kernel, bias, targets = alike(rows, kernel, bias, targets)
    (found,), _ = _over_chunks(losses, rows, targets, count, kernel.shape[axis], (jnp.zeros(len(rows), wide),), ())
    return found


def total_nats(
    rows: Array, kernel: Array, bias: Array, targets: Array, count: Array | None = None, *, axis: int = 0
) -> Array:
    r"""The cross-entropy of a softmax, summed over rows, with gradients, without all of its logits at once.

    .. math::
        L = \sum_n \Big( \log \sum_v e^{z_{nv}} - z_{n y_n} \Big), \qquad z_n = W x_n + b

    Rows are taken in chunks of at most `HELD` logits. Where a gradient is asked for it is computed beside the loss,
    from the chunk's logits: (softmax(z) - onehot(y)) W and so on, scaled by the loss's own cotangent afterwards. So it
    takes three products, as the plain rule does, and keeps no logits. Derivatives are of first order and in reverse
    mode.

    Args:
      rows: x, `(n, features)`.
      kernel: W, `(vocabulary, features)`; or transposed with `axis=1`. Products have its dtype and that of the rows,
        sums are float32 or wider.
      bias: b, `(vocabulary,)`.
      targets: y, `(n,)`, ids.
      count: how many rows, the first ones, take part; a traced number, and the others cost nothing. None: all.
      axis: which of W is the vocabulary.

    Returns:
      L, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax.output import total_nats
      >>> x, w, b, y = jnp.ones((3, 2)), jnp.zeros((8, 2)), jnp.zeros(8), jnp.array([0, 1, 2])
      >>> round(float(total_nats(x, w, b, y)), 4)  # 3 ln 8
      6.2383
    """
    rows, kernel, bias, targets = alike(rows, kernel, bias, targets)
    return _total(rows, kernel, bias, targets, count, axis)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _total(rows, kernel, bias, targets, count, axis):
    return jnp.sum(nats(rows, kernel, bias, targets, count, axis=axis))


def _forward(rows, kernel, bias, targets, count, axis):
    wide = jnp.promote_types(jnp.float32, rows.dtype)
    dot = partial(lax.dot_general, preferred_element_type=wide)

    def with_gradients(x, y, taken, sums):
        loss, p = _softmax(x, kernel, bias, y, taken, axis)
        p_narrow = p.astype(rows.dtype)
        dx = dot(p_narrow, kernel, (((1,), (axis,)), ((), ())))
        operands = (p_narrow, x) if axis == 0 else (x, p_narrow)
        dw = dot(*operands, (((0,), (0,)), ((), ())))
        return (loss, dx), (sums[0] + dw, sums[1] + jnp.sum(p, 0))

    of_rows = jnp.zeros(len(rows), wide), jnp.zeros(rows.shape, wide)
    sums = jnp.zeros(kernel.shape, wide), jnp.zeros(bias.shape, wide)
    (found, dx), sums = _over_chunks(with_gradients, rows, targets, count, kernel.shape[axis], of_rows, sums)
    gradient = zip((dx, *sums), (rows, kernel, bias), strict=True)
    return jnp.sum(found), tuple(g.astype(a.dtype) for g, a in gradient)


def _backward(axis, gradient, cotangent):
    return *(g * cotangent.astype(g.dtype) for g in gradient), None, None


_total.defvjp(_forward, _backward)


def _over_chunks(
    compute: Callable, rows: Array, targets: Array, count: Array | None, vocabulary: int, of_rows: Any, sums: Any
) -> tuple[Any, Any]:
    """Rows and targets in chunks, whose logits are held one chunk at a time.

    Args:
      compute: `(x, y, taken, sums) -> (results of each row, sums)` of a chunk; rows that are not taken are 0.
      count: how many rows take part; None: all.
      of_rows, sums: what the results begin with, zeros.

    Returns:
      The results of all rows, and the sums.
    """
    number = len(rows)
    most = HELD // vocabulary if count is None else FEW  # the last chunk of few rows is computed in full
    size: int = min(number, max(LEAST, most))
    padding: int = -number % size
    rows, targets, of_rows = jax.tree.map(
        lambda a: jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))), (rows, targets, of_rows)
    )
    count = jnp.asarray(number if count is None else count)

    def chunk(n, carry):
        x, y = (lax.dynamic_slice_in_dim(a, n * size, size) for a in (rows, targets))
        taken = n * size + jnp.arange(size) < count
        results, sums = compute(jnp.where(taken[:, None], x, 0), y, taken, carry[1])
        update = partial(lax.dynamic_update_slice_in_dim, start_index=n * size, axis=0)
        return jax.tree.map(update, carry[0], results), sums

    carry: Any = jax.tree.map(lambda a: varying_as(a, (rows,)), (of_rows, sums))
    of_rows, sums = chunk(0, carry) if size == len(rows) else lax.fori_loop(0, -(-count // size), chunk, carry)
    return jax.tree.map(lambda a: a[:number], of_rows), sums


def _softmax(x: Array, kernel: Array, bias: Array, targets: Array, taken: Array, axis: int) -> tuple[Array, Array]:
    """The nats of each row, and softmax(z) - onehot(target), both 0 for rows that are not taken."""
    wide = jnp.promote_types(jnp.float32, x.dtype)
    z = lax.dot_general(x, kernel, (((1,), (1 - axis,)), ((), ())), preferred_element_type=wide)
    z = z + bias.astype(wide)[None]
    hit = lax.broadcasted_iota(targets.dtype, z.shape, 1) == targets[:, None]
    most = jnp.max(z, 1, keepdims=True)
    e = jnp.exp(z - most)
    total = jnp.sum(e, 1, keepdims=True)
    loss = (most + jnp.log(total))[:, 0] - jnp.sum(jnp.where(hit, z, 0), 1)
    p = e / total - hit.astype(wide)
    return jnp.where(taken, loss, 0), jnp.where(taken[:, None], p, 0)


class FullSoftmax(NamedTuple):
    """A matrix `(vocabulary, features)`, transposed where `axis` is 1, and a bias, with the methods of a layer."""

    kernel: Array
    bias: Array
    axis: int = 0

    def nats(self, rows: Array, targets: Array) -> Array:
        """-log p(target) of each row, `(n,)`."""
        return nats(rows.astype(self.kernel.dtype), self.kernel, self.bias, targets, axis=self.axis)

    def total_nats(self, rows: Array, targets: Array) -> Array:
        """Their sum, with gradients; see `ranjax.output.total_nats`."""
        return total_nats(rows.astype(self.kernel.dtype), self.kernel, self.bias, targets, axis=self.axis)

    def score(self, word: Array) -> tuple[Array, Array]:
        """The weights and the bias of a word's logit."""
        return jnp.take(self.kernel, word, self.axis), jnp.take(self.bias, word)


def default_cutoffs(vocabulary: int) -> tuple[int, ...]:
    """Where the clusters of a vocabulary begin, if nothing else is asked for.

    Milliseconds of a training step on WikiText-2, 2 x 256, 20 x 35, 2 CPU cores, 2026-11-30: (2000, 10000) 62, (2000,)
    94, (4000,) 94, (4000, 12000) 74; the full softmax 434.
    """
    if vocabulary <= 20_000:
        return (2000,)
    return (2000, 10_000) if vocabulary <= 100_000 else (10_000, 60_000)


def check_cutoffs(cutoffs: Any, vocabulary: int) -> None:
    """Raises a ValueError for cutoffs that are not whole numbers which rise and stay below the vocabulary."""
    ids = list(cutoffs) if isinstance(cutoffs, tuple | list) else []
    if not ids or not all(map(is_size, ids)) or ids != sorted(set(ids)) or ids[-1] >= vocabulary:
        raise ValueError(
            f"`cutoffs` must be whole numbers of at least 1 that rise and stay below the vocabulary of {vocabulary} "
            f"tokens; got {cutoffs!r}."
        )


def tail_features(features: int, number: int) -> int:
    """The features of a cluster: a fourth of those of the one before, at least 1."""
    return max(1, features // FACTOR**number)


class Words(nn.Embed):
    """flax's embedding, whose rows are sharded as the tokens are on a mesh with explicit axes."""

    def __call__(self, inputs: Array) -> Array:
        [table] = promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return rows_of(table, inputs)


class AdaptiveSoftmax(nn.Module):
    r"""An output layer whose cost follows the text: rare words are computed only where they are predicted.

    Ids must be in the order of frequency, the most frequent first. The head has the words below the first cutoff and an
    entry for each cluster; cluster k has the words from its cutoff to the next, and a projection of the features:

    .. math::
        p(w) = \text{softmax}(A x + a)_w, \qquad
        p(w) = \text{softmax}(A x + a)_k \; \text{softmax}(E_k P_k x + b_k)_w

    The same matrices embed words, where a model is tied: A_w, and E_{kw} P_k (adaptive inputs).

    Attributes:
      vocabulary: number of words.
      features: of the inputs x.
      cutoffs: the first ids of the clusters, rising. Cluster k has features // 4^k features, k = 1, 2, ...
      init_scale: A and E are drawn uniformly from +-init_scale.
      dtype: of the products; sums and log-probabilities are float32 or wider.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ranjax.output import AdaptiveSoftmax
      >>> layer = AdaptiveSoftmax(vocabulary=50, features=16, cutoffs=(10, 30))
      >>> rows = jnp.ones((4, 16))
      >>> variables = layer.init(jax.random.key(0), rows)
      >>> log_p = layer.apply(variables, rows)  # of every word
      >>> bool(jnp.allclose(jnp.exp(log_p).sum(1), 1, atol=1e-6))
      True
      >>> nats = layer.apply(variables, rows, jnp.array([1, 12, 40, 49]), method="nats")
      >>> bool(jnp.allclose(nats, -log_p[jnp.arange(4), jnp.array([1, 12, 40, 49])], atol=1e-5))
      True

    References:
      Grave, Joulin, Cisse, Grangier, Jegou, "Efficient softmax approximation for GPUs", ICML 2017, arXiv 1609.04309;
      Baevski and Auli, "Adaptive Input Representations for Neural Language Modeling", ICLR 2019, arXiv 1809.10853.
    """

    vocabulary: int
    features: int
    cutoffs: tuple[int, ...]
    init_scale: float = 0.1
    dtype: Dtype | None = None

    def __post_init__(self):
        check_cutoffs(self.cutoffs, self.vocabulary)
        self.cutoffs = tuple(self.cutoffs)
        super().__post_init__()

    @property
    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.cutoffs, (*self.cutoffs[1:], self.vocabulary), strict=True))

    def setup(self):
        init, zeros = uniform(self.init_scale), nn.initializers.zeros_init()
        size = self.cutoffs[0] + len(self.cutoffs)
        self.head = self.param("head", init, (size, self.features))
        self.bias = self.param("bias", zeros, (size,))
        self.tails = [self._tail(k, last - first) for k, (first, last) in enumerate(self._ranges, 1)]

    def _tail(self, k: int, words: int) -> tuple[Array, Array, Array]:
        """P, E and b of a cluster."""
        size = tail_features(self.features, k)
        projection = self.param(f"projection_{k}", nn.initializers.lecun_normal(), (size, self.features))
        words_of = self.param(f"embedding_{k}", uniform(self.init_scale), (words, size))
        return projection, words_of, self.param(f"bias_{k}", nn.initializers.zeros_init(), (words,))

    def _narrow(self, *arrays: Array) -> tuple[Array, ...]:
        return tuple(a if self.dtype is None else a.astype(self.dtype) for a in arrays)

    def embed(self, tokens: Array) -> Array:
        """The embeddings of words, `(..., features)`."""
        (head,) = self._narrow(self.head)
        found = rows_of(head, jnp.minimum(tokens, self.cutoffs[0] - 1))
        for (first, last), (projection, words, _) in zip(self._ranges, self.tails, strict=True):
            projection, words = self._narrow(projection, words)
            rare = rows_of(words, jnp.clip(tokens - first, 0, last - first - 1)) @ projection
            found = jnp.where(((tokens >= first) & (tokens < last))[..., None], rare, found)
        return found

    def score(self, word: Array) -> tuple[Array, Array]:
        """The weights and the bias of a word's score in its cluster: E_{kw} P_k and b_{kw}, or A_w and a_w."""
        bias = self.bias[jnp.minimum(word, self.cutoffs[0] - 1)]
        for (first, last), (_, _, of_words) in zip(self._ranges, self.tails, strict=True):
            rare = of_words[jnp.clip(word - first, 0, last - first - 1)]
            bias = jnp.where((word >= first) & (word < last), rare, bias)
        return self.embed(word), bias

    def __call__(self, rows: Array) -> Array:
        """The log-probabilities of all words, `(n, vocabulary)`, for rows `(n, features)`."""
        (rows, head) = self._narrow(rows, self.head)
        log_p = jax.nn.log_softmax(_logits(rows, head, self.bias))
        parts = [log_p[:, : self.cutoffs[0]]]
        for k, tail in enumerate(self.tails):
            projection, words = self._narrow(*tail[:2])
            within = jax.nn.log_softmax(_logits(_projected(rows, projection), words, tail[2]))
            parts.append(log_p[:, self.cutoffs[0] + k, None] + within)
        return jnp.concatenate(parts, 1)

    def nats(self, rows: Array, targets: Array) -> Array:
        """-log p(target) of each row, `(n,)`."""
        x, head = self._narrow(rows, self.head)
        found = nats(x, head, self.bias, self._of_head(targets))
        for part, order in self._clusters(rows, targets):
            found = found.at[order].add(nats(*part))
        return found

    def total_nats(self, rows: Array, targets: Array) -> Array:
        """Their sum, with gradients; see `ranjax.output.total_nats`."""
        x, head = self._narrow(rows, self.head)
        total = total_nats(x, head, self.bias, self._of_head(targets))
        return total + sum(total_nats(*part) for part, _ in self._clusters(rows, targets))

    def _of_head(self, targets: Array) -> Array:
        """The entry of the head that each target has."""
        cluster = sum((targets >= cutoff).astype(targets.dtype) for cutoff in self.cutoffs)
        return jnp.where(cluster == 0, targets, self.cutoffs[0] + cluster - 1)

    def _clusters(self, rows: Array, targets: Array) -> Any:
        """Of each cluster what `total_nats` takes, its own rows before the others, and their order."""
        for (first, last), (projection, words, bias) in zip(self._ranges, self.tails, strict=True):
            inside = (targets >= first) & (targets < last)
            order = jnp.argsort(~inside, stable=True)
            narrow, projection, words = self._narrow(rows, projection, words)
            x, y = _projected(narrow[order], projection), jnp.clip(targets[order] - first, 0, last - first - 1)
            yield (x, words, bias, y, jnp.sum(inside)), order


def _projected(rows: Array, projection: Array) -> Array:
    return lax.dot_general(rows, projection, (((1,), (1,)), ((), ())))


def _logits(rows: Array, kernel: Array, bias: Array) -> Array:
    wide = jnp.promote_types(jnp.float32, rows.dtype)
    products = lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return products + bias.astype(wide)[None]
