"""The Python of the README runs, and the names and flags it uses exist."""

import inspect
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import ranjax
from ranjax import compare, evaluate, explain, export, generate
from ranjax.training.config import Config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_example_of_the_readme_runs():
    [code] = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ranjax.__all__)
def test_every_public_name_is_an_attribute_after_import(name):
    assert getattr(ranjax, name) is not None


@pytest.mark.parametrize("name", [name for name in ranjax.__all__ if inspect.ismodule(getattr(ranjax, name))])
def test_every_public_module_can_be_imported_by_its_name(name):
    code = f"import ranjax.{name}, ranjax; assert ranjax.{name} is __import__('sys').modules['ranjax.{name}']"
    subprocess.run([sys.executable, "-c", f"{code}; from ranjax.{name} import __doc__"], check=True)


def test_the_version_is_that_of_the_project_file():
    assert ranjax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_the_newest_release_of_the_changelog_and_the_citation_are_that_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert headings[:2] == ["Unreleased", f"{version} ({citation['date-released']})"]
    assert citation["version"] == version


def test_the_citation_has_what_its_format_demands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license"]
    assert all(work["title"] and work["authors"] for work in citation["references"])


def test_contributing_is_one_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 60


def test_every_flag_named_in_the_readme_exists():
    known = {
        field.name
        for options in (Config, evaluate.Options, generate.Options, explain.Options, export.Options, compare.Options)
        for field in fields(options)
    }
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", README.read_text("utf-8"))}
    assert named <= known | {"help", "preset"}


def test_the_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 700


def test_links_and_pictures_of_the_readme_exist():
    paths = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text("utf-8"))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
