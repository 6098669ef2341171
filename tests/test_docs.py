"""The API reference has every public name, public names have docstrings, and the Python of the pages runs."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest

import ranjax

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Names of public modules that are of the programs, and of no use elsewhere.
INTERNAL = {
    "compare": {"checked_out"},
    "config": {
        *("Rule", "check", "check_same", "goes_on", "kept", "load_config", "normalised"),
        "save_config",
    },
    "data": {"encoded"},
    "evaluate": {"check_options", "evaluate_corpus", "evaluate_text", "read_ids"},
    "explain": {"checked_out", "read_text", "writing"},
}


def documented():
    """The objects that the API reference documents, by the names that it gives them."""
    text = "".join(page.read_text("utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    return set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", text, re.MULTILINE))


def resolved(name):
    """The object of a full name; names of a module may be lazy."""
    parts = name.split(".")
    found = ranjax
    for n, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:n]))
    return found


def public(name):
    """The public names of a module: those it lists, or those that it defines or exports by `import X as X`."""
    module = getattr(ranjax, name)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname == alias.name}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names.add(node.name)
    return names - INTERNAL.get(name, set()) - {"main"}


MODULES = [name for name in ranjax.__all__ if inspect.ismodule(getattr(ranjax, name))]
NAMES = [f"ranjax.{name}" for name in ranjax.__all__ if name not in MODULES]
NAMES += [f"ranjax.{module}.{name}" for module in MODULES for name in sorted(public(module))]


def test_the_public_names_are_found():
    assert {"ranjax.RAN", "ranjax.weights.top", "ranjax.generate.Sampling", "ranjax.config.Config"} <= set(NAMES)
    assert len(NAMES) > 60


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name):
    found = resolved(name)
    assert any(resolved(other) is found for other in documented()), f"{name} is on no page of docs/api"
    if callable(found):
        assert len(inspect.getdoc(found) or "") > 20


def test_what_the_reference_documents_exists():
    for name in documented():
        assert resolved(name) is not None


@pytest.mark.quick
@pytest.mark.shipped
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_sequence(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/text.txt").write_text("Once upon a time\n" * 99)
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        with jax.numpy_rank_promotion("allow"):  # as users have it
            exec(compile(code, page.name, "exec"), scope)


def test_the_figures_of_the_recipes_are_those_of_the_experiments():
    """But for that of python-docs, which the README has."""
    pages = [ROOT / "README.md", *(ROOT / "experiments").rglob("README.md"), ROOT / "benchmarks" / "README.md"]
    known = set(re.findall(r"\d+\.\d+", " ".join(page.read_text("utf-8") for page in pages)))
    for name in ("recipes", "which-ran"):
        stated = re.findall(r"(?<![-\d])\d+\.\d+(?!e)", (ROOT / "docs" / f"{name}.md").read_text("utf-8"))
        assert set(stated) - {"64.0", "0.2"} <= known
