r"""Parameters of PyTorch's `torchrecurrent.RAN` in and out, without PyTorch.

That layer has the equations of `ranjax.RAN(ranjax.RANCell(features))`, with two biases that are added:

.. math::
    W_c, W_{ix}, W_{fx} = \text{weight\_ih}, \qquad W_{ih}, W_{fh} = \text{weight\_hh}, \qquad
    b_i, b_f = \text{bias\_ih} + \text{bias\_hh}

Its state is the pair (h, c) of which ours is c.

Source: torchrecurrent 0.2.5, `torchrecurrent/cells/ran_cell.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NAMES = re.compile(r"cells\.(\d+)\.(weight_ih|weight_hh|bias_ih|bias_hh)")


def from_state_dict(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of a `RANCell` for each layer of a `torchrecurrent.RAN`.

    Args:
      state_dict: `torch_layer.state_dict()`, of tensors on the CPU or of arrays. A bias that the layer was built
        without counts as 0.

    Returns:
      A tree for each layer: `ranjax.RAN(ranjax.RANCell(features)).apply({"params": {"cell": tree}}, x)`.

    Raises:
      ValueError: for names or shapes that are not those of a `torchrecurrent.RAN`.

    Example:
      >>> import numpy as np
      >>> from ranjax import torchrecurrent
      >>> weights = {"cells.0.weight_ih": np.ones((12, 3)), "cells.0.weight_hh": np.ones((8, 4))}
      >>> [params] = torchrecurrent.from_state_dict(weights)
      >>> params["content"]["kernel"].shape, params["gates"]["recurrent_kernel"].shape
      ((3, 4), (4, 2, 4))
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, value in state_dict.items():
        found = NAMES.fullmatch(name)
        if found is None:
            raise ValueError(f"`state_dict` must be that of a torchrecurrent.RAN; got the name {name!r}.")
        layers.setdefault(int(found[1]), {})[found[2]] = np.asarray(value)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(f"`state_dict` must have the layers cells.0, cells.1, ...; got {sorted(layers)}.")
    return [_params(f"cells.{n}", layers[n]) for n in range(len(layers))]


def _params(at: str, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name in ("weight_ih", "weight_hh"):
        if name not in weights:
            raise ValueError(f"`state_dict` must have {at}.{name}; got {', '.join(sorted(weights))}.")
    of_input, of_state = weights["weight_ih"], weights["weight_hh"]
    size = len(of_input) // 3
    shapes = {"weight_ih": (3 * size, *of_input.shape[1:2]), "weight_hh": (2 * size, size)}
    shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (2 * size,))
    for name, value in weights.items():
        if value.shape != shapes[name]:
            raise ValueError(f"`state_dict` must have {at}.{name} of the shape {shapes[name]}; got {value.shape}.")
    bias = np.zeros(2 * size, of_input.dtype) + weights.get("bias_ih", 0) + weights.get("bias_hh", 0)
    gates = {
        "kernel": of_input[size:].T.reshape(-1, 2, size),
        "recurrent_kernel": of_state.T.reshape(size, 2, size),
        "bias": bias.reshape(2, size),
    }
    return {
        "content": {"kernel": jnp.asarray(of_input[:size].T)},
        "gates": jax.tree.map(jnp.asarray, gates),
    }


def to_state_dict(layers: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of a `torchrecurrent.RAN` with a layer for each of these cells.

    Args:
      layers: the parameters of `RANCell`s with recurrent gates, h = tanh(c) and no projection, all of one size.

    Returns:
      What `torch_layer.load_state_dict` takes once each value is a tensor (`torch.tensor(value)`). All of a bias is in
      `bias_ih`; `bias_hh` is 0.

    Raises:
      ValueError: for parameters of other gates, or with a projection, which that layer does not have.

    Example:
      >>> import jax, jax.numpy as jnp, ranjax
      >>> from ranjax import torchrecurrent
      >>> variables = ranjax.RANCell(4).init(jax.random.key(0), jnp.zeros((2, 4)), jnp.zeros((2, 3)))
      >>> {name: value.shape for name, value in torchrecurrent.to_state_dict([variables["params"]]).items()}
      {'cells.0.weight_ih': (12, 3), 'cells.0.weight_hh': (8, 4), 'cells.0.bias_ih': (8,), 'cells.0.bias_hh': (8,)}
    """
    state_dict = {}
    for n, params in enumerate(layers):
        gates = params["gates"]
        if "projection" in params or np.ndim(gates.get("recurrent_kernel")) != 3:
            raise ValueError(
                f"`layers[{n}]` must be the parameters of a RANCell with gates='recurrent' and without a projection, "
                "as torchrecurrent.RAN has it."
            )
        content = np.asarray(params["content"]["kernel"])
        state_dict |= {
            f"cells.{n}.weight_ih": np.concatenate([content.T, _rows(gates["kernel"])]),
            f"cells.{n}.weight_hh": _rows(gates["recurrent_kernel"]),
            f"cells.{n}.bias_ih": np.asarray(gates["bias"]).reshape(-1),
            f"cells.{n}.bias_hh": np.zeros(2 * content.shape[1], content.dtype),
        }
    return state_dict


def _rows(kernel: Array) -> np.ndarray:
    """A kernel `(in, 2, features)` as PyTorch has it: the input gate's rows, then the forget gate's."""
    return np.asarray(kernel).reshape(kernel.shape[0], -1).T
