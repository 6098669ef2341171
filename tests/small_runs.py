"""Runs of seconds on a small text: their settings, what they save, and ways to stop them."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax.data import load_corpus, windows_per_epoch
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import Config
from ranjax.training.model import build_model
from ranjax.training.optimizer import make_optimizer
from ranjax.training.report import Report
from ranjax.training.run import train
from ranjax.training.step import TrainState, initial_state

TEXT = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the dog\n"


def settings(dataset, out, **options):
    defaults = {"features": (8,), "layers": 1, "batch_size": 4, "steps": 7, "epochs": 2, "mesh": "data=1"}
    return Config(dataset=str(dataset), out=str(out), **defaults | options)


def resumed(config, **options):
    return dataclasses.replace(config, resume=True, **options)


def windows_of(config):
    """Steps an epoch."""
    return windows_per_epoch(len(load_corpus(config.dataset).train) // config.batch_size, config.steps)


def saved_state(config):
    """The training state that a run would resume from, without its wall-clock time."""
    model = build_model(config, len(load_corpus(config.dataset).vocabulary))
    like = initial_state(model, make_optimizer(config, 1), config)
    return Checkpoints(config.directory).load("latest", like)._replace(seconds=0, timed=0)


def position(config):
    """Steps and epochs of the saved training state."""
    state = saved_state(config)
    return int(state.step), int(state.epoch)


def metrics_rows(config):
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def blank_state(**fields):
    """A training state without arrays, and all counters 0 but for those given."""
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    counts = count, count, zero, count, count, count, zero, zero, count, zero
    state = TrainState({}, {}, (), *counts, average={}, averaged=jnp.array(-1), recent=jnp.zeros(0), older=zero)
    return state._replace(**{name: jnp.asarray(value) for name, value in fields.items()})


def train_until(condition, config, monkeypatch, send=lambda: signal.raise_signal(signal.SIGINT), code=130):
    """Trains, sends a signal after the first burst of steps whose state fulfils a condition, and expects the exit."""
    progress, sent = Report.progress, []

    def observed(self, state, *rest):
        progress(self, state, *rest)
        if not sent and condition(state):
            sent.append(int(state.step))
            send()

    with monkeypatch.context() as patch:
        patch.setattr(Report, "progress", observed)
        with pytest.raises(SystemExit) as ended:
            train(config)
    assert ended.value.code == code
    assert len(sent) == 1


@contextmanager
def files_of_at_most(size):
    """The system refuses to write more bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def command(module, *flags):
    """The words of a program; a training is on one device where nothing else is asked of it."""
    alone = ("--mesh", "data=1") if module == "train" and "--mesh" not in flags else ()
    return [sys.executable, "-m", f"ranjax.{module}", *map(str, flags), *alone]


def run_program(module, *flags):
    """A program in a process of its own, finished."""
    return subprocess.run(command(module, *flags), capture_output=True, text=True, check=False)


def with_startup_code(folder: Path, code: str):
    """The environment of a Python process that runs `code` before anything else."""
    (folder / "sitecustomize.py").write_text(code)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def exported_by_the_program(directory, out):
    """In a process of its own: the shape checks of the tests do not support the symbolic sizes of `jax.export`."""
    command = [sys.executable, "-m", "ranjax.export", "--checkpoint", str(directory), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"written: {out}\n", done.stderr
    return out
