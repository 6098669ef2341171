"""The windows of a text that are trained on: all of one length, or of lengths that vary."""

from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ranjax.training.config import Config


class Steps:
    """The compiled step for each length of a window: `steps(state, text, number) -> state`.

    Args:
      step: as `ranjax.training.step.make_step` returns it.
      state, text: what it is called with; their shapes are compiled for.
      config: the settings.
      windows: of an epoch.

    Attributes:
      longest: the compiled step of the longest windows.
    """

    def __init__(self, step: Any, state: Any, text: Any, config: Config, windows: int):
        self._step, self._config, self._windows, self._compiled = step, config, windows, {}
        several = any(len(a.devices()) > 1 for a in jax.tree.leaves(state))
        # On a CPU the threads of two programs at once can wait for each other's collectives.
        self._one_at_a_time = several and jax.default_backend() == "cpu"
        length = min(config.steps + 2 * config.vary_steps, config.steps * windows)
        self.longest = self._of(state, text, length)

    def __call__(self, state: Any, text: Any, number: int) -> Any:
        """The state after step `number`, counted from the beginning of the run."""
        if not self._config.vary_steps:
            return self._run(self.longest, state, text, None)
        epoch, position = divmod(number, self._windows)
        bounds = boundaries(self._config.steps, self._windows, self._config.vary_steps, self._config.seed, epoch)
        start, end = bounds[position : position + 2]
        return self._run(self._of(state, text, int(end - start)), state, text, start)

    def _run(self, step: Any, *given: Any) -> Any:
        state = step(*given)
        return jax.block_until_ready(state) if self._one_at_a_time else state

    def _of(self, state: Any, text: Any, length: int) -> Any:
        if length not in self._compiled:
            start = np.int32(0) if self._config.vary_steps else None
            self._compiled[length] = self._step.lower(state, text, start, length).compile()
        return self._compiled[length]


@lru_cache(maxsize=2)
def boundaries(steps: int, windows: int, vary: int, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch begin, and where the last one ends.

    These are multiples of `steps`, and those between two windows are moved by -vary, 0 or vary. So lengths are of five
    kinds, each of which is compiled for, and their sum is that of all tokens.

    Example:
      >>> from ranjax.training.windows import boundaries
      >>> boundaries(steps=70, windows=4, vary=10, seed=0, epoch=0).tolist()
      [0, 70, 140, 200, 280]
    """
    moved = np.random.default_rng((seed, epoch)).integers(-1, 2, windows + 1) * vary
    moved[[0, -1]] = 0
    return (np.arange(windows + 1) * steps + moved).astype(np.int32)
