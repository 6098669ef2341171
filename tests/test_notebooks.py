"""The notebooks: pairs of source and outputs, of a whole run; what they install on Colab; each runs in a short mode."""

import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from small_runs import TEXT

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.py"))
SET_UP = (NOTEBOOKS / "set_up.py").read_text("utf-8")
REASON = "needs the extra `notebooks`"


@pytest.fixture(scope="module")
def build():
    """notebooks/build.py as a module."""
    for name in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(name, reason=REASON)
    spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))


def lines(output):
    text = output.get("text", "")
    return text if isinstance(text, str) else "".join(text)


def printed(name):
    return "".join(lines(output) for cell in stored(name)["cells"] for output in cell.get("outputs", []))


def test_there_are_five():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_have_the_same_cells(name, build):
    def cells(notebook):
        return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]

    notebook = build.source(name)
    assert cells(stored(name)) == [(cell.cell_type, cell.source) for cell in notebook.cells]
    for cell in notebook.cells[:2]:  # the badge and the set-up cell are in the source, too
        text = (NOTEBOOKS / f"{name}.py").read_text("utf-8")
        assert all(line.strip() in text for line in cell.source.split("\n"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_selects_a_tpu_and_has_a_badge_and_minutes(name):
    notebook = stored(name)
    assert notebook["metadata"]["accelerator"] == "TPU"
    assert notebook["metadata"]["colab"]["gpuType"] == "V5E1"
    title, badge, paragraph = "".join(notebook["cells"][0]["source"]).split("\n\n", 2)
    assert title.startswith("# ")
    assert f"/notebooks/{name}.ipynb)" in badge
    assert "minute" in paragraph


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_of_a_whole_run(name):
    notebook = stored(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    first = "".join(map(lines, code[0]["outputs"]))
    assert re.match(r"20\d\d-\d\d-\d\d Python 3\.\d+\.\d+ jax ", first)
    assert "Device" in first
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 600_000
    assert not re.search(r"(?<![\w.:/])/(root|home|tmp|work|opt|mnt)/", json.dumps(notebook))


@pytest.fixture
def installed(monkeypatch):
    """`installed(folder, code)`: the command by which the set-up cell installs, where there is no ranjax."""

    def command(folder, code=SET_UP):
        called, find = [], importlib.util.find_spec
        monkeypatch.chdir(folder)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: find(name, *rest) if name != "ranjax" else None
        )
        monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command))
        exec(compile(code, "set_up.py", "exec"), {})
        [found] = called
        return found

    return command


def test_the_set_up_cell_installs_from_the_repository_and_keeps_the_jax_that_is_there(installed, tmp_path, capsys):
    command = installed(tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert re.fullmatch(r"ranjax\[train\] @ git\+https://github.com/[\w.-]+/ranjax", command[5])
    for name in ("jax", "jaxlib", "flax", "numpy"):
        assert f"{name}=={version(name)}" in command
    assert "Python" in capsys.readouterr().out


def test_the_set_up_cell_installs_a_checkout_that_it_is_in(installed, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    assert installed(tmp_path / "notebooks")[5] == "..[train]"


def test_a_jax_that_is_too_old_is_not_kept(installed, tmp_path):
    code = SET_UP.replace('"jax": (0, 7, 2)', '"jax": (99, 0)')
    command = installed(tmp_path, code)
    assert f"flax=={version('flax')}" in command
    assert f"jax=={version('jax')}" not in command


def test_the_set_up_cell_has_the_floors_of_the_project():
    floors = re.search(r"FLOORS = (.*)", SET_UP)[1]
    for name, floor in eval(floors).items():
        at_least = f'"{name}>={".".join(map(str, floor))}"'
        assert name == "jaxlib" or at_least in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_its_short_mode(name, build, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT * 150)
    monkeypatch.setenv("RANJAX_SHORT", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = build.executed(name, tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
