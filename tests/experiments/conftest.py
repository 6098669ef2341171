"""The scripts of experiments/ as modules, and what they have recorded."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    """`script(study, name="run")`: a script of a study as a new module, which can import the modules beside it."""

    def load(study, name="run"):
        monkeypatch.syspath_prepend(EXPERIMENTS / study)
        spec = importlib.util.spec_from_file_location(f"{study}_{name}", EXPERIMENTS / study / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def recorded():
    """`recorded(study)`: the rows of its results.jsonl."""

    def rows(study):
        lines = (EXPERIMENTS / study / "results.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return rows


@pytest.fixture
def page():
    """`page(study)`: the text of its README."""
    return lambda study: (EXPERIMENTS / study / "README.md").read_text("utf-8")
