"""The Python of the README runs, and the names and flags it uses exist."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import ranjax
from ranjax import compare, evaluate, explain, export, generate
from ranjax.training.config import Config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_examples_of_the_readme_run_in_sequence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/text.txt").write_text("Once upon a time\n" * 99)
    code = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(code) == 3
    exec(compile("\n".join(code), "README.md", "exec"), {})


@pytest.mark.parametrize("name", ranjax.__all__)
def test_every_public_name_is_an_attribute_after_import(name):
    assert getattr(ranjax, name) is not None


def test_the_version_is_that_of_the_project_file():
    assert ranjax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_every_flag_named_in_the_readme_exists():
    known = {
        field.name
        for options in (Config, evaluate.Options, generate.Options, explain.Options, export.Options, compare.Options)
        for field in fields(options)
    }
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", README.read_text("utf-8"))}
    assert named <= known | {"help", "preset"}


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150
