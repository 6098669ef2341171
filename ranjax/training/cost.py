"""What a training step costs: its products, its memory, and the share of the device's peak that it reaches."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ranjax.training.arrays import by_name
from ranjax.training.config import Config

# Dense bfloat16 products, FLOP/s of one device, by the name that JAX has for its kind. TPUs: "System architecture" of
# each version in Google Cloud's documentation. GPUs: NVIDIA's data sheets of the A100, H100 and H200, whose figures
# with sparsity are halved. A part of a GPU (MIG) has another name, and is not known.
PEAKS = {
    "TPU v4": 275e12,
    **dict.fromkeys(["TPU v5 lite", "TPU v5e"], 197e12),
    **dict.fromkeys(["TPU v5", "TPU v5p"], 459e12),
    **dict.fromkeys(["TPU v6 lite", "TPU v6e"], 918e12),
    **dict.fromkeys(["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"], 312e12),
    **dict.fromkeys(["NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"], 312e12),
    **dict.fromkeys(["NVIDIA H100 80GB HBM3", "NVIDIA H200"], 989e12),
    "NVIDIA H100 PCIe": 756e12,
}


@dataclass(frozen=True)
class Cost:
    """Of one training step.

    Attributes:
      flops: of its matrix products, see `step_flops`.
      bytes: of the memory of one device, see `step_bytes`.
      peak: FLOP/s that the devices can do at most; None where that is not known.
    """

    flops: float
    bytes: int
    peak: float | None

    def row(self, steps_per_second: float) -> dict[str, float]:
        """What `metrics.jsonl` has of it: `step_flops`, `step_bytes` and, where the peak is known, `mfu`."""
        found: dict[str, float] = {"step_flops": self.flops, "step_bytes": self.bytes}
        if self.peak is not None:
            found["mfu"] = self.flops * steps_per_second / self.peak
        return found


def step_cost(config: Config, params: Any, text: np.ndarray, compiled: Any, devices: int = 1) -> Cost:
    """The cost of a step of these settings.

    Args:
      params: of the model, arrays or their shapes.
      text: the ids that are trained on.
      compiled: the step, as `jitted.lower(...).compile()` returns it.
      devices: how many it is computed on.
    """
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return Cost(step_flops(config, params, text), step_bytes(compiled), peak and devices * peak)


def step_flops(config: Config, params: Any, text: np.ndarray) -> float:
    r"""The floating point operations of a step's matrix products.

    .. math::
        F = 6 \, b \, t \, \sum_W |W| \, r_W

    for a batch of b and t steps, over all matrices W that a product is with: 2 for a multiplication and an addition,
    once forward and twice backward. r_W is 1, but for the clusters of an adaptive softmax: there it is the share of the
    text whose words are in the cluster; tied, their projections embed every word, too.

    Not counted are elementwise operations (the recurrence itself among them), the look-up of embeddings, the update
    rule, what `--remat` computes again, and more than one iteration of a solver that iterates. So the model is counted,
    whatever program computes it. XLA's own count has the body of a loop once, however often it runs.

    Args:
      config: the settings.
      params: of the model, arrays or their shapes.
      text: the ids that are trained on, of any shape.

    Example:
      >>> import jax, numpy as np
      >>> from ranjax.training.config import Config
      >>> from ranjax.training.cost import step_flops
      >>> from ranjax.training.model import abstract_params, build_model
      >>> config = Config(gates="input", features=(8,), layers=1, batch_size=1, steps=1)
      >>> params = abstract_params(build_model(config, 10))
      >>> step_flops(config, params, np.arange(10)) == 6 * (3 * 8 * 8 + 10 * 8)  # content and gates, output
      True
    """
    leaves = by_name(params)
    total = float(sum(a.size for name, a in leaves.items() if _multiplies(name, a.ndim, config.tie)))
    if config.softmax == "adaptive":
        total += _of_clusters(leaves, text, config.tie)
    return 6 * config.batch_size * config.steps * total


def _multiplies(name: str, axes: int, tied: bool) -> bool:
    """Whether a parameter is a matrix that every step is multiplied by."""
    if name.endswith("recurrent_kernel"):
        return axes == 3  # otherwise those of diagonal gates, which multiply elementwise
    return name.endswith("kernel") or name == "adaptive.head" or (name == "embed.embedding" and tied)


def _of_clusters(leaves: dict[str, Any], text: np.ndarray, tied: bool) -> float:
    """The sizes of the clusters' matrices, each times the share of tokens that it multiplies."""
    clusters = sum(name.startswith("adaptive.embedding_") for name in leaves)
    total, first = 0.0, leaves["adaptive.head"].shape[0] - clusters
    for k in range(1, clusters + 1):
        projection, words = leaves[f"adaptive.projection_{k}"], leaves[f"adaptive.embedding_{k}"]
        last = first + words.shape[0]
        share = float(np.mean((text >= first) & (text < last)))
        total += share * (projection.size + words.size) + tied * projection.size
        first = last
    return total


def step_bytes(compiled: Any) -> int:
    """The memory of one device that a compiled step takes, by XLA's account: arguments, results and temporary arrays.

    Args:
      compiled: `jitted.lower(...).compile()`.
    """
    takes = compiled.memory_analysis()
    results = takes.output_size_in_bytes - takes.alias_size_in_bytes
    return int(takes.argument_size_in_bytes + results + takes.temp_size_in_bytes)
