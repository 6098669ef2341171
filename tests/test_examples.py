"""The examples run, and what they claim holds."""

import importlib.util
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        most = 80 if path.stem == "numpy_reader" else 60  # read and checked in tests/training/test_exported.py
        assert len(path.read_text("utf-8").splitlines()) < most, path


def test_a_policy_by_the_layer_is_that_by_the_cell_in_a_scan(capsys):
    outputs = example("policy").main()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *outputs.values())
    assert capsys.readouterr().out.count("ms a gradient") == 2


def test_the_tagger_learns_what_is_before_and_after():
    assert example("tagger").main() > 0.95


def test_the_forecast_is_better_than_the_sample_before():
    found, same = example("forecast").main()
    assert found < same


def test_the_model_of_characters_learns():
    assert example("characters").main(steps=60) < 2.6


def test_the_model_of_characters_needs_no_flax():
    assert "flax" not in inspect.getsource(example("characters")).replace("no Flax", "")
