"""A trace of some training steps by JAX's profiler."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ranjax.cli import warn
from ranjax.errors import UserError
from ranjax.training.config import Config
from ranjax.training.folder import absolute, is_empty

WARM_UP, TRACED = 10, 5  # steps of a process


def checked_profile_dir(config: Config) -> Config:
    """The settings, after the directory of a trace has been created, unless it is to be in that of the run.

    A run that goes on has none where there is one already: a scheduler starts the same command again.

    Raises:
      UserError: for one that exists and is not empty, or cannot be created.
    """
    if config.profile_dir is None:
        return config
    folder = absolute(config.profile_dir)
    try:
        if not folder.is_relative_to(config.directory):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile-dir {folder} cannot be written: {error.strerror or error}.") from None
    if not os.path.lexists(folder) or is_empty(folder):
        return config
    if not config.resume:
        raise UserError(f"--profile-dir {folder} exists and is not empty. Give another one.")
    warn(f"--profile-dir {folder} is not empty and is left unchanged: the run goes on without a trace.")
    return replace(config, profile_dir=None)


@contextmanager
def profiled(step: Callable, profile_dir: str | None) -> Iterator[Callable]:
    """The same step of training, which traces some of its calls if there is a directory for it."""
    if profile_dir is None:
        yield step
        return
    trace = _Trace(step, absolute(profile_dir))
    try:
        yield trace
    finally:
        trace.close()


class _Trace:
    """`step(state, text, number)`, of which the calls after a warm-up are traced, each named by its number."""

    def __init__(self, step: Callable, folder: Path):
        self._step, self._folder, self._calls, self._running = step, folder, 0, False

    def __call__(self, state: Any, text: Any, number: int) -> Any:
        if self._calls == WARM_UP:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        self._calls += 1
        if not self._running:
            return self._step(state, text, number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state = self._step(state, text, number)
        if self._calls == WARM_UP + TRACED:
            jax.block_until_ready(state)
            self._stop()
        return state

    def close(self) -> None:
        if self._running:
            self._stop()
        elif self._calls <= WARM_UP:
            warn(f"there is no trace in --profile-dir {self._folder}: it begins after {WARM_UP} steps of training.")

    def _stop(self) -> None:
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, jax.errors.JaxRuntimeError) as error:  # it cannot be written
            warn(f"there is no trace in --profile-dir {self._folder}: {str(error).splitlines()[0]}")
