r"""Which inputs a state remembers: the state of a recurrent additive network as a weighted sum.

.. math::
    c_t = \sum_{j \le t} w^t_j * u_j + \Big(\prod_{k \le t} f_k\Big) * c_0, \qquad
    w^t_j = i_j * \prod_{k = j+1}^{t} f_k

u_j = W_c x_j is the content of step j. Each component of a state has its own weights, in [0, 1] and not normalised.
They obey a recurrence, w^t_j = f_t * w^{t-1}_j with w^t_t = i_t. There is no division, so a weight that underflows is
correctly 0.

`decompose` computes gates, contents and states. From these follow

| function | result |
| --- | --- |
| `full` | all weights |
| `at` | the weights of one state |
| `carried` | the weights of the initial state |
| `reduced` | one number for each pair of steps |
| `top` | the strongest sources of each state |
| `half_lives`, `spans` | for how many steps weights last |

`reduce` names the number that stands for the weights of all components:

| reduce | number |
| --- | --- |
| `"max"` | the largest weight |
| `"l1"`, `"l2"` | the norm of the weights |
| `"contribution"` | the L1 norm of w * u: what the source adds to the state |

All functions are pure, accept leading batch axes, and can be jitted; `reduce`, `k`, `most` and `share` are static. They
can be differentiated, except `top` in reverse mode.

References:
  Levy, Lee, FitzGerald, Zettlemoyer, "Long Short-Term Memory as a Dynamically Computed Element-wise Weighted Sum",
  ACL 2018.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from ranjax.errors import check_size
from ranjax.interpret.decomposition import MEASURES, Decomposition, checked_index, decompose, measure_of, rows, scale_of
from ranjax.interpret.strongest import top
from ranjax.scan import Sequence

__all__ = [
    "REDUCTIONS",
    "Decomposition",
    "at",
    "carried",
    "decompose",
    "full",
    "half_lives",
    "reduced",
    "spans",
    "top",
]

REDUCTIONS = tuple(MEASURES)
LIMIT = 2**30  # bytes that `full` returns at most, by default


def full(parts: Decomposition, limit: int = LIMIT) -> Float[Array, "*batch time time features"]:
    """All weights, of every step in every state.

    Args:
      parts: what `decompose` returns.
      limit: bytes that the result may take (default: 1 GiB).

    Returns:
      w^t_j at `[..., t, j, :]`, `(*batch, time, time, features)`; 0 for j > t.

    Raises:
      ValueError: if it would take more than `limit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((3, 1), 0.5)
      >>> parts = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.full(parts)[..., 0].tolist()
      [[0.5, 0.0, 0.0], [0.25, 0.5, 0.0], [0.125, 0.25, 0.5]]
    """
    size = parts.f.size * parts.f.shape[-2] * parts.f.dtype.itemsize
    if size > limit:
        raise ValueError(
            f"all weights of {parts.f.shape[-2]:,} steps take {size:,} bytes, more than the `limit` of {limit:,}. Use "
            "`at` for one state, `reduced` or `top` for one number a pair, or a larger `limit`."
        )
    return rows(parts.i, parts.f, jnp.asarray)


def at(parts: Decomposition, step: ArrayLike) -> Sequence:
    """The weights of one state.

    Args:
      parts: what `decompose` returns.
      step: t, an integer from 0 to time - 1; may be traced.

    Returns:
      w^t_j at `[..., j, :]`, `(*batch, time, features)`; 0 for j > t.

    Raises:
      ValueError: for a `step` out of range, or one that is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((4, 1), 0.5)
      >>> parts = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.at(parts, 3).ravel().tolist()
      [0.0625, 0.125, 0.25, 0.5]
    """
    step = checked_index("step", step, parts.f.shape[-2])
    j = jnp.arange(parts.f.shape[-2])[:, None]
    following = jnp.concatenate([parts.f[..., 1:, :], jnp.ones_like(parts.f[..., :1, :])], axis=-2)
    kept = lax.cumprod(jnp.where(j < step, following, 1), parts.f.ndim - 2, reverse=True)
    return jnp.where(j <= step, parts.i * kept, 0)


def carried(parts: Decomposition) -> Sequence:
    r"""The weights of the state before the first step, in every state.

    .. math::
        \prod_{k \le t} f_k

    Args:
      parts: what `decompose` returns.

    Returns:
      The cumulative products of the forget gates, `(*batch, time, features)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((3, 1), 0.5)
      >>> parts = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.carried(parts).ravel().tolist()
      [0.5, 0.25, 0.125]
    """
    return lax.cumprod(parts.f, parts.f.ndim - 2)


def reduced(parts: Decomposition, reduce: str = "l2") -> Float[Array, "*batch time time"]:
    """One number for each pair of steps: how much the state of step t remembers of step j.

    Args:
      parts: what `decompose` returns.
      reduce: `"max"`, `"l1"`, `"l2"` (default) or `"contribution"`; see the module.

    Returns:
      The reduced weights at `[..., t, j]`, `(*batch, time, time)`; 0 for j > t.

    Raises:
      ValueError: for another `reduce`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((2, 4), 0.5)
      >>> parts = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.reduced(parts, "l1").tolist()
      [[2.0, 0.0], [1.0, 2.0]]
    """
    return rows(parts.i * scale_of(parts, reduce), parts.f, measure_of(reduce))


def half_lives(parts: Decomposition, most: int = 1024) -> Int[Array, "*batch time features"]:
    r"""The half-life of each step in each component: after how many steps its weight is at most half.

    .. math::
        \min \{ n \ge 1 : f_{t+1} * \dots * f_{t+n} \le 1/2 \}

    Args:
      parts: what `decompose` returns.
      most: the longest half-life that is distinguished, in steps (default: 1024).

    Returns:
      Steps, int32, `(*batch, time, features)`. `most` stands for `most` or more, and for a weight that is above half
      until the sequence ends.

    Raises:
      ValueError: for a `most` that is no whole number from 1 to 2**31 - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> f = jnp.array([[0.5, 0.9]] * 10)
      >>> weights.half_lives(weights.Decomposition(i=f, f=f, u=f, c=f, c0=f[0]), most=8)[0].tolist()
      [1, 7]
    """
    return _lasting(parts, most, jnp.zeros_like(parts.f, jnp.int32), lambda p: p > 0.5)


def spans(parts: Decomposition, reduce: str = "l2", share: float = 0.5, most: int = 1024) -> Int[Array, "*batch time"]:
    """The span of each step: after how many steps its reduced weight is at most a share of the initial one.

    Args:
      parts: what `decompose` returns.
      reduce: as for `reduced`.
      share: of the reduced weight in the step's own state, above 0 and below 1 (default: half of it); not traced.
      most: the longest span that is distinguished, in steps (default: 1024).

    Returns:
      Steps, int32, `(*batch, time)`. `most` stands for `most` or more, and for a reduced weight that is above the share
      until the sequence ends.

    Raises:
      ValueError: for another `reduce`, a `share` out of its range, a `most` that is no whole number from 1 to
        2**31 - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> f = jnp.array([[0.5, 0.9]] * 10)
      >>> parts = weights.Decomposition(i=f, f=f, u=f, c=f, c0=f[0])
      >>> weights.spans(parts, "l1")[0].item(), weights.spans(parts, "max")[0].item()
      (4, 7)
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must be above 0 and below 1; got {share}.")
    measure, first = measure_of(reduce), parts.i * scale_of(parts, reduce)
    least = share * measure(first)
    steps = jnp.zeros((*parts.f.shape[:-1], 1), jnp.int32)
    return _lasting(parts, most, steps, lambda p: (measure(first * p) > least)[..., None])[..., 0]


def _lasting(parts: Decomposition, most: int, n: Array, holds: Callable[[Array], Array]) -> Array:
    """The smallest number of steps whose product of forget gates no longer `holds`, by binary search.

    Products of 1, 2, 4, ... steps are computed once. From the longest on, each is multiplied on where the product still
    holds.
    """
    check_size("most", most)
    if most >= 2**31:
        raise ValueError(f"`most` must be below 2**31; got {most}. No weight lasts longer than the sequence.")
    time = parts.f.ndim - 2
    steps = parts.f.shape[time]
    j = jnp.arange(steps)[:, None]

    def after(products, n):
        return jnp.take_along_axis(products, lax.broadcast_to_rank(j, n.ndim) + n, time, mode="fill", fill_value=1)

    levels = [after(parts.f, jnp.ones_like(parts.f, jnp.int32))]
    while 2 ** len(levels) < min(most, steps):
        levels.append(levels[-1] * after(levels[-1], jnp.full_like(parts.f, 2 ** (len(levels) - 1), jnp.int32)))
    product = jnp.ones_like(parts.f)
    for level in reversed(range(len(levels))):
        longer = product * after(levels[level], n)
        taken = holds(longer)
        product, n = jnp.where(taken, longer, product), jnp.where(taken, n + 2**level, n)
    lasts = n + lax.broadcast_to_rank(j, n.ndim) >= steps - 1  # to the end of the sequence
    return jnp.where(lasts, most, jnp.minimum(n + 1, most))
