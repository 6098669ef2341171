"""The strongest sources of every state, in memory that grows linearly with the length of a sequence.

The sequence is divided into blocks. The weight of a source in an earlier block is a product of three factors: from the
source to the end of its block, over the whole blocks between, and from the start of the state's block to the state. So
the reduced weights between two blocks are a matrix product, without divisions.

From a state's block the search goes back block by block. It ends when an upper bound on all remaining weights is not
above the k-th weight found: weights only decrease with distance.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from ranjax.errors import check_size
from ranjax.interpret.decomposition import Decomposition, measure_of, measure_pairs, rows, scale_of

BLOCK = 256  # steps


def top(
    parts: Decomposition, k: int, reduce: str = "l2"
) -> tuple[Float[Array, "*batch time k"], Int[Array, "*batch time k"]]:
    r"""The k strongest sources of each state: the steps j with the largest reduced weight.

    .. math::
        s^t_j = \text{reduce}(w^t_j), \qquad w^t_j = i_j * \prod_{k = j+1}^{t} f_k

    Args:
      parts: what `decompose` returns.
      k: number of sources, at least 1; more than there are steps count as many as there are.
      reduce: `"max"`, `"l1"`, `"l2"` (default) or `"contribution"`; see `ranjax.weights`.

    Returns:
      The reduced weights, `(*batch, time, k)`, the largest first, and the steps of the sources, int32, of the same
      shape. Of equal weights the later step comes first. Where fewer than k sources have a weight above 0, the weight
      is 0 and the step -1.

    Raises:
      ValueError: for another `reduce`, a `k` that is no whole number of at least 1, or one whose result is larger than
        the free memory of the device.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((4, 1), 0.5)
      >>> parts = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> strengths, steps = weights.top(parts, k=2)
      >>> strengths.tolist()[-1], steps.tolist()
      ([0.5, 0.25], [[0, -1], [1, 0], [2, 1], [3, 2]])
    """
    measure_of(reduce)
    check_size("k", k)
    k = min(int(k), parts.f.shape[-2])
    return _searched(parts.i * scale_of(parts, reduce), parts.f, k, reduce)


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _searched(i: Array, f: Array, k: int, reduce: str) -> tuple[Array, Array]:
    """`top` of a batch, with the scale of the sources in `i`."""
    *batch, time, features = f.shape
    if not time:
        return jnp.zeros((*batch, 0, k), f.dtype), jnp.zeros((*batch, 0, k), jnp.int32)
    size = min(BLOCK, time)
    blocks = -(-time // size)

    def in_blocks(a, fill):
        missing = (*((0, 0) for _ in batch), (0, -time % size), (0, 0))
        return jnp.pad(a, missing, constant_values=fill).reshape(math.prod(batch), blocks, size, features)

    i, f = in_blocks(i, 0), in_blocks(f, 1)
    values, steps = lax.map(lambda gates: _top(gates[0], gates[1], k, reduce), (i, f))
    values, steps = (a[:, :time].reshape(*batch, time, k) for a in (values, steps))
    return values, steps


def _top(i: Array, f: Array, k: int, reduce: str) -> tuple[Array, Array]:
    """`top` of one sequence in blocks, `(blocks, steps, features)`."""
    blocks, size, features = f.shape
    to_end = i * lax.cumprod(jnp.concatenate([f[:, 1:], jnp.ones_like(f[:, :1])], 1), 1, reverse=True)
    from_start, whole = lax.cumprod(f, 1), jnp.prod(f, 1)

    def grow(most, block):
        most = jnp.maximum(jnp.max(block[0], 0), block[1] * most)
        return most, most

    # The largest weight of any source at the end of each block, by component: the bound of the search.
    _, most = lax.scan(grow, jnp.zeros_like(whole[0]), (to_end, whole))
    most = most * (1 + _margin(blocks, features, f.dtype))

    def of_block(b):
        def unfinished(loop):
            a, decay, (values, _) = loop
            bound = measure_pairs(reduce, from_start[b] * decay[None], most[jnp.maximum(a, 0)][None])[:, 0]
            return (a >= 0) & jnp.any(bound > values[:, -1])

        def previous_block(loop):
            a, decay, found = loop
            scores = measure_pairs(reduce, from_start[b] * decay[None], to_end[a])
            better = jnp.any(scores > found[0][:, -1:])
            found = lax.cond(better, lambda: _merged(found, scores, a * size), lambda: found)
            return a - 1, decay * whole[a], found

        none = jnp.zeros((size, k), f.dtype), jnp.full((size, k), -1, jnp.int32)
        found = _merged(none, rows(i[b], f[b], measure_of(reduce)), b * size)
        return lax.while_loop(unfinished, previous_block, (b - 1, jnp.ones_like(whole[0]), found))[2]

    values, steps = lax.map(of_block, jnp.arange(blocks, dtype=jnp.int32))
    return values.reshape(-1, k), steps.reshape(-1, k)


def _margin(blocks: int, features: int, dtype: Any) -> float:
    """Relative rounding error of a score against its bound: their products and sums have different orders."""
    return 4 * (blocks + features) * float(jnp.finfo(dtype).eps)


def _merged(found: tuple[Array, Array], scores: Array, first: Array) -> tuple[Array, Array]:
    """The k best of those found and of the sources of a block, whose first step is `first`."""
    (values, steps), (states, size) = found, scores.shape
    later_first = first + jnp.arange(size - 1, -1, -1, dtype=jnp.int32)
    steps = jnp.concatenate([steps, jnp.broadcast_to(later_first, (states, size))], axis=1)
    values, order = lax.top_k(jnp.concatenate([values, scores[:, ::-1]], axis=1), values.shape[1])
    return values, jnp.where(values > 0, jnp.take_along_axis(steps, order, axis=1), -1)
