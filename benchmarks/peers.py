"""Other people's solvers of the same recurrence, where they are installed: the extra `bench`, and PyTorch.

Each takes tensors `(batch, time, features)`; what a library wants instead is made before the clock starts.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timing


def built(decay: np.ndarray, inputs: np.ndarray, weight: np.ndarray) -> dict[str, "TorchRival"]:
    """By name, those that are installed and run on this machine, on tensors of these values.

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
    """A way to solve the recurrence with PyTorch; the initial state is zero."""

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
        """Not known."""

    def deviation(self, states: np.ndarray, gradient: np.ndarray) -> float:
        """Largest, of the states, over the largest there is; what is differentiated may be a logarithm."""
        ours = self.layout(self.states.detach()).cpu().numpy()
        return float(np.abs(ours - states).max() / np.abs(states).max())


def _pull(states: Any, arrays: tuple[Any, ...], weight: Any) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(states, arrays, weight, retain_graph=True)


def _rival(solve: Callable, values: tuple[np.ndarray, ...], layout: Callable = lambda a: a) -> TorchRival:
    """`values`: what stands for decay and inputs, and the weight of the states in what is differentiated."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # accelerated-scan 0.3.1 reads past the end of its arrays where 2048 does not divide their length: let that be
        # memory of this process.
        torch.empty(2**30, dtype=torch.uint8, device=device)
    *arrays, weight = (layout(torch.tensor(a, device=device)).contiguous() for a in values)
    return TorchRival(solve, tuple(a.requires_grad_() for a in arrays), weight, layout)


def _channels_first(module: Any) -> Callable:
    def made(decay, inputs, weight):
        return _rival(module.scan, (decay, inputs, weight), lambda a: a.transpose(1, 2))

    return made


def _hgrn(name: str) -> Callable:
    """Takes the logarithm of the decay."""

    def build(module):
        solve = getattr(module, name)

        def made(decay, inputs, weight):
            return _rival(lambda g, x: solve(x, g)[0], (np.log(decay), inputs, weight))

        return made

    return build


def _log_space(module: Any) -> Callable:
    """Takes the logarithms of decay and inputs, so the inputs must be positive."""

    def made(decay, inputs, weight):
        return _rival(module.heinsen_associative_scan_log, (np.log(decay), np.log(inputs), weight))

    return made
