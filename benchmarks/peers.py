"""Other people's solvers of the same recurrence, where they are installed: the extra `bench`, and PyTorch.

Each takes tensors `(batch, time, features)`. Other layouts and forms that a library needs are computed before timing.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timing


def built(decay: np.ndarray, inputs: np.ndarray, weight: np.ndarray) -> dict[str, "TorchRival"]:
    """The installed libraries that run on this machine, by name, on tensors of these values.

    Raises:
      RuntimeError: after an error of CUDA, since nothing can run then.
    """
    try:
        import torch
    except ImportError:
        return {}
    cuda = torch.cuda.is_available()
    found = {}
    for name, module, needs_cuda, build in (
        ("accelerated-scan, scalar", "accelerated_scan.scalar", True, _channels_first),
        ("accelerated-scan, warp", "accelerated_scan.warp", True, _channels_first),
        ("accelerated-scan, reference", "accelerated_scan.ref", False, _channels_first),
        ("FLA, HGRN in chunks", "fla.ops.hgrn", True, _hgrn("chunk_hgrn")),
        ("FLA, HGRN recurrent", "fla.ops.hgrn", True, _hgrn("fused_recurrent_hgrn")),
        ("minGRU, log space", "minGRU_pytorch.minGRU", False, _log_space),
    ):
        if needs_cuda and not cuda:
            continue
        try:
            found[name] = build(importlib.import_module(module))(decay, inputs, weight)
        except (ImportError, OSError, RuntimeError) as error:  # not installed, not built, too large
            if "CUDA error" in str(error):
                raise
            print(f"  {name} is left out: {str(error).splitlines()[0]}", flush=True)
    return found


class TorchRival:
    """A solver of the recurrence in PyTorch, from a zero initial state."""

    def __init__(self, solve: Callable, arrays: tuple[Any, ...], weight: Any, layout: Callable):
        self.layout = layout
        begin = time.perf_counter()
        self.states = solve(*arrays)
        _pull(self.states, arrays, weight)
        self.compile_seconds = time.perf_counter() - begin

        def copies():
            return tuple(a.detach().clone().requires_grad_() for a in arrays)

        def forward(*arrays):
            import torch

            with torch.no_grad():
                return solve(*arrays)

        def solved():
            own = copies()
            return solve(*own), own, weight.clone()

        self.calls = {
            "forward": timing.repeated_torch(forward, copies),
            "backward": timing.repeated_torch(_pull, solved),
            "gradient": timing.repeated_torch(
                lambda weight, *arrays: _pull(solve(*arrays), arrays, weight), lambda: (weight.clone(), *copies())
            ),
        }

    def memory(self) -> None:
        """Not measured."""

    def deviation(self, states: np.ndarray, gradient: np.ndarray) -> float:
        """The largest of the states, relative to their largest value; gradients may be of logarithms instead."""
        ours = self.layout(self.states.detach()).cpu().numpy()
        return float(np.abs(ours - states).max() / np.abs(states).max())


def _pull(states: Any, arrays: tuple[Any, ...], weight: Any) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(states, arrays, weight, retain_graph=True)


def _rival(solve: Callable, values: tuple[np.ndarray, ...], layout: Callable = lambda a: a) -> TorchRival:
    """`values`: the two arrays of the library, and the cotangent of the states."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # accelerated-scan 0.3.1 reads past the end of its arrays where 2048 does not divide their length: let that be
        # memory of this process.
        torch.empty(2**30, dtype=torch.uint8, device=device)
    *arrays, weight = (layout(torch.tensor(a, device=device)).contiguous() for a in values)
    return TorchRival(solve, tuple(a.requires_grad_() for a in arrays), weight, layout)


def _channels_first(module: Any) -> Callable:
    def rival(decay, inputs, weight):
        return _rival(module.scan, (decay, inputs, weight), lambda a: a.transpose(1, 2))

    return rival


def _hgrn(name: str) -> Callable:
    """A library that takes the logarithm of the decay."""

    def build(module):
        solve = getattr(module, name)

        def rival(decay, inputs, weight):
            return _rival(lambda g, x: solve(x, g)[0], (np.log(decay), inputs, weight))

        return rival

    return build


def _log_space(module: Any) -> Callable:
    """A library that takes the logarithms of decay and inputs, so that inputs must be positive."""

    def rival(decay, inputs, weight):
        return _rival(module.heinsen_associative_scan_log, (np.log(decay), np.log(inputs), weight))

    return rival
