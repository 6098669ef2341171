r"""What a training adds to its loss, and takes from its weights, so that a model generalises.

.. math::
    \text{loss} = \text{cross-entropy} + \alpha \, T \, \text{mean}(\tilde h^2)
        + \beta \, T \, \text{mean}((h_{t+1} - h_t)^2)

h are the outputs of the last layer over the T steps of a window, and h with a tilde those after dropout.

References:
  Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018, arXiv 1708.02182.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# The matrices on h of flax's LSTM, GRU and Elman cells.
ON_STATE = frozenset(["hi", "hf", "hg", "ho", "hr", "hz", "hn", "h"])


def drop_weights(params: Any, rate: float, key: Array) -> Any:
    """The parameters with some weights on h set to 0, and the others as much larger: DropConnect.

    Args:
      params: of a language model.
      rate: share that is dropped, in [0, 1).
      key: draws one mask for all steps of a window.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax.training.regularise import drop_weights
      >>> model = ranjax.LanguageModel(vocabulary=9, layers=1, features=32)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
      >>> dropped = drop_weights(params, 0.5, jax.random.key(1))["stack_0"]["cell"]["gates"]
      >>> round(float((dropped["recurrent_kernel"] == 0).mean()), 1), bool((dropped["kernel"] == 0).any())
      (0.5, False)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    dropped = []
    for n, (path, leaf) in enumerate(leaves):
        if reads_state(path):
            kept = jax.random.bernoulli(jax.random.fold_in(key, n), 1 - rate, leaf.shape)
            leaf = jnp.where(kept, leaf / (1 - rate), 0)
        dropped.append(leaf)
    return jax.tree.unflatten(structure, dropped)


def reads_state(path: tuple) -> bool:
    """Whether the leaf there is a matrix, or the diagonal of one, that multiplies h."""
    names = [getattr(part, "key", None) for part in path]
    return "recurrent_kernel" in names or (names[-1] == "kernel" and names[-2] in ON_STATE and "cell" in names)


def penalty(outputs: tuple[Array, Array], activation: float, change: float, time: int) -> Array:
    """The terms that are added to the loss of a window.

    Args:
      outputs: of the last layer, before and after dropout, `(batch, time, out)` in any order of the axes.
      activation: alpha.
      change: beta.
      time: the axis of time.
    """
    before, after = (h.astype(jnp.float32) for h in outputs)
    steps = before.shape[time]
    moved = jnp.diff(before, axis=time) if steps > 1 else jnp.zeros_like(before)
    return steps * (activation * jnp.mean(after**2) + change * jnp.mean(moved**2))
