"""The device that computes: whether there is one, and its free memory."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from ranjax import device


def gpu(stats):
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ({"bytes_limit": 1000, "bytes_in_use": 300}, 700),
        ({"bytes_limit": 1000, "bytes_in_use": 1300}, 0),
        ({"bytes_in_use": 300}, None),
        ({}, None),
        (None, None),
    ],
)
def test_free_memory_of_an_accelerator_is_its_limit_less_what_is_in_use(stats, free):
    assert device.free_memory(gpu(stats)) == free


def test_free_memory_of_a_cpu_is_what_psutil_reports_as_available(monkeypatch):
    cpu = SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    reported = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=2000))
    monkeypatch.setitem(sys.modules, "psutil", reported)
    assert device.free_memory(cpu) == 2000
    monkeypatch.setitem(sys.modules, "psutil", None)  # not installed
    assert device.free_memory(cpu) is None


@pytest.mark.parametrize("program", ["train", "evaluate", "generate", "explain"])
def test_a_platform_that_is_not_there_is_one_message(program, pets_run, pets_text, tmp_path):
    flags = {"train": ["--dataset", pets_text, "--out", tmp_path / "x"], "explain": ["--text", "the"]}.get(program, [])
    flags += [] if program == "train" else ["--checkpoint", pets_run[0].directory]
    command = [sys.executable, "-m", f"ranjax.{program}", *map(str, flags)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cdua"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: JAX has no device of the platforms it is to use, cdua (JAX_PLATFORMS): ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("no driver.\nmore"), AssertionError()])
def test_a_device_that_is_not_there_has_a_way_out(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=r": (no driver|it is not installed)\. Name one that is there"):
        device.check_device()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--nosuch", "Unknown flag in XLA_FLAGS: --nosuch"),
        ("--xla_force_host_platform_device_count=x", "Couldn't interpret value x for flag xla_force_"),
        ("nosuch.txt", "Could not open file"),
    ],
)
def test_flags_that_xla_does_not_take_are_one_message(flags, why, pets_run):
    command = [sys.executable, "-m", "ranjax.generate", "--checkpoint", str(pets_run[0].directory)]
    environment = os.environ | {"XLA_FLAGS": flags}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: XLA_FLAGS={flags} is refused: {why}")
    assert ended.stderr.count("\n") == 1
