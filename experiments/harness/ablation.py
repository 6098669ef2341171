"""Ablations of a RAN: parts removed from it by linear constraints on its parameters.

A constrained model is a RAN like any other, with the same solvers and programs. Some of its weights are fixed, or are
functions of others.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ranjax.errors import check_choice

CONSTANT = {"input-gate": (0,), "forget-gate": (1,), "gates": (0, 1)}  # which gates are constant in time
ABLATIONS = (*CONSTANT, "complement", "content")


def constraint(ablation: str | None) -> Callable[[Any], Any]:
    r"""A function `constrain(params) -> params` that removes a part from the RANs of a language model.

    A gate without weights on x and h is constant in time, with one learned value for each feature:

    .. math::
        i_t = \sigma(b_i) \quad\text{or}\quad f_t = \sigma(b_f)

    Args:
      ablation: `"input-gate"`, `"forget-gate"` or `"gates"` (both): constant in time; `"complement"`:
        :math:`i_t = 1 - f_t`; `"content"`: no layer, :math:`u_t = x_t`, for inputs as wide as the state. None: nothing
        is removed.

    Returns:
      The constraint, to be given to `ranjax.training.run.train` as `constrain`.

    Raises:
      ValueError: for an unknown ablation; from the function, for `"content"` if inputs and states differ in size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from harness.ablation import constraint
      >>> params = {"gates": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((2, 4))}}
      >>> gates = constraint("input-gate")(params)["gates"]
      >>> gates["kernel"][:, 0].sum().item(), gates["bias"][0].sum().item()
      (0.0, 4.0)
    """
    if ablation is None:
        return lambda params: params
    check_choice("ablation", ablation, (*ABLATIONS, None))
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, p: _rule(ablation, path)[0](p), params)


def learned(params: Any, ablation: str | None) -> int:
    """The number of free parameters under the constraint of an ablation; arrays may be abstract."""
    return sum(round(p.size * _rule(ablation, path)[1]) for path, p in jax.tree_util.tree_leaves_with_path(params))


def _rule(ablation: str | None, path: tuple) -> tuple[Callable[[Array], Array], float]:
    """The constraint of the leaf at `path`, and the share of it that is free; leaves of gates: `(..., 2, features)`."""
    part, name = [None, *(key.key for key in path)][-2:]
    if part == "content" and ablation == "content":
        return _identity, 0.0
    if part == "gates" and ablation == "complement":
        return _mirrored, 0.5
    if part == "gates" and name != "bias" and ablation in CONSTANT:
        gates = CONSTANT[ablation]
        return lambda p: p.at[..., gates, :].set(0), 1 - len(gates) / 2
    return lambda p: p, 1.0


def _identity(p: Array) -> Array:
    if p.shape[0] != p.shape[1]:
        raise ValueError(
            f"ablation='content' needs inputs as wide as the state, for they are added to it; got {p.shape[0]} "
            f"and {p.shape[1]} features. Give the embedding and all layers one size."
        )
    return jnp.eye(len(p), dtype=p.dtype)


def _mirrored(p: Array) -> Array:
    """The forget gate's parameters, and their negatives for the input gate: 1 - sigmoid(z) = sigmoid(-z)."""
    return jnp.stack([-p[..., 1, :], p[..., 1, :]], axis=-2)
