r"""Which inputs made a state: the weights of the sum that a state of a recurrent additive network is.

.. math::
    c_t = \sum_{j \le t} w^t_j * u_j + \Big(\prod_{k \le t} f_k\Big) * c_0, \qquad
    w^t_j = i_j * \prod_{k = j+1}^{t} f_k

u_j = W_c x_j is the content of step j. Every component of a state has weights of its own, in [0, 1] and not normalised.
They follow from one another by products, w^t_j = f_t * w^{t-1}_j and w^t_t = i_t; nothing is divided, so what is too
small to be represented is a correct 0.

`decompose` finds the gates. From them come all weights (`full`), those of one state (`at`) or of the carry (`carried`),
one number for each pair of steps (`reduced`), the strongest sources of each state (`top`), and how long weights last
(`half_lives`, `spans`). That one number for the weights of all components is `reduce`:

    "max"            the largest weight
    "l1", "l2"       their norm
    "contribution"   the L1 norm of w * u: what the source puts into the state

Functions are pure, batched and can be jitted (`reduce`, `k`, `most` and `share` are static). The numbers can be
differentiated, but for those of `top` in reverse mode.

References: Levy, Lee, FitzGerald, Zettlemoyer, "Long Short-Term Memory as a Dynamically Computed Element-wise Weighted
Sum", ACL 2018.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from ranjax.interpret.decomposition import MEASURES, Decomposition, checked_index, decompose, measure_of, rows, scale_of
from ranjax.errors import check_size
from ranjax.scan import Sequence
from ranjax.interpret.strongest import top

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
LIMIT = 2**30  # bytes that `full` makes without being told that more is meant


def full(made: Decomposition, limit: int = LIMIT) -> Float[Array, "*batch time time features"]:
    """All weights: w^t_j at `[..., t, j, :]`, 0 for j > t.

    Args:
      made: what `decompose` returns.
      limit: bytes that they may take.

    Raises:
      ValueError: if they take more.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((3, 1), 0.5)
      >>> made = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.full(made)[..., 0].tolist()
      [[0.5, 0.0, 0.0], [0.25, 0.5, 0.0], [0.125, 0.25, 0.5]]
    """
    size = made.f.size * made.f.shape[-2] * made.f.dtype.itemsize
    if size > limit:
        raise ValueError(
            f"all weights of {made.f.shape[-2]:,} steps take {size:,} bytes, more than the `limit` of {limit:,}. Use "
            "`at` for one state, `reduced` or `top` for one number a pair, or a larger `limit`."
        )
    return rows(made.i, made.f, jnp.asarray)


def at(made: Decomposition, step: ArrayLike) -> Sequence:
    """The weights of one state: w^t_j at `[..., j, :]` for t = `step`, 0 for j > t.

    Args:
      made: what `decompose` returns.
      step: t, an integer from 0; may be traced.

    Raises:
      ValueError: for a step that is not there.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((4, 1), 0.5)
      >>> made = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
      >>> weights.at(made, 3).ravel().tolist()
      [0.0625, 0.125, 0.25, 0.5]
    """
    step = checked_index("step", step, made.f.shape[-2])
    j = jnp.arange(made.f.shape[-2])[:, None]
    following = jnp.concatenate([made.f[..., 1:, :], jnp.ones_like(made.f[..., :1, :])], axis=-2)
    kept = lax.cumprod(jnp.where(j < step, following, 1), made.f.ndim - 2, reverse=True)
    return jnp.where(j <= step, made.i * kept, 0)


def carried(made: Decomposition) -> Sequence:
    """The weights of the state before the first step in every state: the products of the forget gates so far.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((3, 1), 0.5)
      >>> weights.carried(weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])).ravel().tolist()
      [0.5, 0.25, 0.125]
    """
    return lax.cumprod(made.f, made.f.ndim - 2)


def reduced(made: Decomposition, reduce: str = "l2") -> Float[Array, "*batch time time"]:
    """One number for each pair of steps: what step j is to the state of step t, at `[..., t, j]`; 0 for j > t.

    Args:
      made: what `decompose` returns.
      reduce: `"max"`, `"l1"`, `"l2"` or `"contribution"`; see the module.

    Raises:
      ValueError: for another `reduce`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> half = jnp.full((2, 4), 0.5)
      >>> weights.reduced(weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0]), "l1").tolist()
      [[2.0, 0.0], [1.0, 2.0]]
    """
    return rows(made.i * scale_of(made, reduce), made.f, measure_of(reduce))


def half_lives(made: Decomposition, most: int = 1024) -> Int[Array, "*batch time features"]:
    """How many steps it takes until the weight of a step in a component of the state is at most half of what it was.

    The smallest n with f_{t+1} * ... * f_{t+n} <= 1/2; `most` where that is no less than `most`, or not seen before the
    sequence ends.

    Args:
      made: what `decompose` returns.
      most: steps that are looked ahead.

    Raises:
      ValueError: for `most` that is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> f = jnp.array([[0.5, 0.9]] * 10)
      >>> weights.half_lives(weights.Decomposition(i=f, f=f, u=f, c=f, c0=f[0]), most=8)[0].tolist()
      [1, 7]
    """
    return _lasting(made, most, jnp.zeros_like(made.f, jnp.int32), lambda p: p > 0.5)


def spans(made: Decomposition, reduce: str = "l2", share: float = 0.5, most: int = 1024) -> Int[Array, "*batch time"]:
    """How many steps it takes until the weights of a step, as one number, are at most a share of what they were.

    Args:
      made: what `decompose` returns.
      reduce: as for `reduced`.
      share: of the number in the step's own state, above 0 and below 1; not traced.
      most: as for `half_lives`; what is longer is `most`.

    Raises:
      ValueError: for another `reduce`, a share out of its range, `most` that is no size.

    Example:
      >>> import jax.numpy as jnp
      >>> from ranjax import weights
      >>> f = jnp.array([[0.5, 0.9]] * 10)
      >>> made = weights.Decomposition(i=f, f=f, u=f, c=f, c0=f[0])
      >>> weights.spans(made, "l1")[0].item(), weights.spans(made, "max")[0].item()
      (4, 7)
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must be above 0 and below 1; got {share}.")
    measure, first = measure_of(reduce), made.i * scale_of(made, reduce)
    least = share * measure(first)
    steps = jnp.zeros((*made.f.shape[:-1], 1), jnp.int32)
    return _lasting(made, most, steps, lambda p: (measure(first * p) > least)[..., None])[..., 0]


def _lasting(made: Decomposition, most: int, n: Array, holds: Callable[[Array], Array]) -> Array:
    """The smallest number of steps whose product of forget gates no longer `holds`, by halving the doubt about it.

    Products of 1, 2, 4, ... steps are made once; from the longest on, each is taken if the product with it still holds.
    """
    check_size("most", most)
    if most >= 2**31:
        raise ValueError(f"`most` must be below 2**31; got {most}. No weight lasts longer than the sequence.")
    time = made.f.ndim - 2
    steps = made.f.shape[time]
    j = jnp.arange(steps)[:, None]

    def after(products, n):
        return jnp.take_along_axis(products, lax.broadcast_to_rank(j, n.ndim) + n, time, mode="fill", fill_value=1)

    levels = [after(made.f, jnp.ones_like(made.f, jnp.int32))]
    while 2 ** len(levels) < min(most, steps):
        levels.append(levels[-1] * after(levels[-1], jnp.full_like(made.f, 2 ** (len(levels) - 1), jnp.int32)))
    product = jnp.ones_like(made.f)
    for level in reversed(range(len(levels))):
        longer = product * after(levels[level], n)
        taken = holds(longer)
        product, n = jnp.where(taken, longer, product), n + taken * 2**level
    unseen = n + lax.broadcast_to_rank(j, n.ndim) >= steps - 1  # it holds to the end of the sequence
    return jnp.where(unseen, most, jnp.minimum(n + 1, most))
