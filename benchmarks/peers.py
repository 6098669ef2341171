"""Other people's solvers of the same recurrence, where they are installed: the extra `bench`, and PyTorch.

Each takes tensors `(batch, time, features)`; what a library wants instead is made before the clock starts.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def installed() -> dict[str, Callable]:
    """By name, `build(decay, inputs, weight) -> TorchRival`, for what is installed and runs on this machine."""
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
            found[name] = build(importlib.import_module(module))
        except ImportError:
            continue
    return found


class TorchRival:
    """A way to solve the recurrence with PyTorch; the initial state is zero."""

    def __init__(self, solve: Callable, arrays: tuple[Any, ...], weight: Any, layout: Callable):
        self.solve, self.arrays, self.weight, self.layout = solve, arrays, weight, layout
        begin = time.perf_counter()
        self.states = solve(*arrays)
        self._pull()
        self.compile_seconds = time.perf_counter() - begin

    def _pull(self, states: Any = None) -> tuple[Any, ...]:
        import torch

        states = self.states if states is None else states
        return torch.autograd.grad(states, self.arrays, self.weight, retain_graph=True)

    def calls(self) -> dict[str, Callable[[], Any]]:
        import torch

        def forward():
            with torch.no_grad():
                return self.solve(*self.arrays)

        return {"forward": forward, "backward": self._pull, "gradient": lambda: self._pull(self.solve(*self.arrays))}

    def memory(self) -> None:
        """Not known."""

    def deviation(self, states: np.ndarray, gradient: np.ndarray) -> float:
        """Largest, of the states, over the largest there is; what is differentiated may be a logarithm."""
        ours = self.layout(self.states.detach()).cpu().numpy()
        return float(np.abs(ours - states).max() / np.abs(states).max())


def _rival(solve: Callable, decay: np.ndarray, inputs: np.ndarray, weight: np.ndarray, layout: Callable) -> TorchRival:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = tuple(layout(torch.tensor(a, device=device)).contiguous().requires_grad_() for a in (decay, inputs))
    return TorchRival(solve, arrays, layout(torch.tensor(weight, device=device)).contiguous(), layout)


def _channels_first(module: Any) -> Callable:
    return lambda *arrays: _rival(module.scan, *arrays, layout=lambda a: a.transpose(1, 2))


def _hgrn(name: str) -> Callable:
    """Takes the logarithm of the decay."""

    def build(module):
        solve = getattr(module, name)

        def made(decay, inputs, weight):
            return _rival(lambda g, x: solve(x, g)[0], np.log(decay), inputs, weight, layout=lambda a: a)

        return made

    return build


def _log_space(module: Any) -> Callable:
    """Takes the logarithms of decay and inputs, so the inputs must be positive."""

    def made(decay, inputs, weight):
        return _rival(module.heinsen_associative_scan_log, np.log(decay), np.log(inputs), weight, layout=lambda a: a)

    return made
