"""The Python of the README and the docs runs as it stands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ranjax

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    """One after the other, the later with the names of the earlier."""
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/text.txt").write_text("Once upon a time\n" * 99)
    code = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(code) == 4
    exec(compile("\n".join(code), "README.md", "exec"), {})


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_examples_of_the_docs_run(page):
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL):
        exec(compile(code, page, "exec"), {})


def test_every_public_name_is_there_once_ranjax_is_imported():
    table = README.read_text("utf-8").split("## What is where")[1]
    names = re.findall(r"`(ranjax\.[\w.]+)`", table)
    assert len(names) > 10
    subprocess.run([sys.executable, "-c", "\n".join(["import ranjax", *names])], check=True)


def test_the_version_is_the_one_of_the_package():
    assert ranjax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_every_flag_named_exists():
    from dataclasses import fields

    from ranjax import evaluate, explain, generate
    from ranjax.training.config import Config

    known = {
        field.name
        for options in (Config, evaluate.Options, generate.Options, explain.Options)
        for field in fields(options)
    }
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", README.read_text("utf-8"))}
    assert named <= known | {"help"}
