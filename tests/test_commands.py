"""Every command of the README and of the pages is run, with a small text and a small network in place of its own.

The programs of benchmarks/ and experiments/ take minutes to days: their flags are parsed, and their own tests run them.
"""

import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from small_runs import TEXT, run_program

import ranjax.data
from ranjax import cli
from ranjax.training.flags import parse, parse_cluster

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
STUDIES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "experiments").rglob("README.md"))
MEASURED = ["benchmarks/README.md", *STUDIES]
PROGRAM = re.compile(r"(?:\S*python3?) -m ranjax\.([a-z]+)(?: (.*))?")
SCRIPT = re.compile(r"python ((?:experiments|benchmarks|notebooks|examples)/\S+\.py)(?: (.*))?")
IS_COMMAND = re.compile(r"(python3?|pip|\.venv/bin/\S+)( |$)")
SMALL = ["--features", "8", "--batch-size", "4", "--steps", "7", "--epochs", "1"]
ELSEWHERE = {"xprof"}  # packages that a page installs beside the project


class Command(NamedTuple):
    """A command as a page has it, its shell variables replaced, and whether it is in a block of its own."""

    text: str
    block: bool


def commands(page):
    """The commands of a page, in their order: in indented blocks, and, of the programs, between backticks."""
    text, variables, found = (ROOT / page).read_text("utf-8").replace("\\\n", " "), {}, []
    text = re.sub(r"^```python.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"^    (.+)$|`(python -m ranjax\.[a-z]+[^`]*)`", text, re.MULTILINE):
        line = re.sub(r" # .*", "", " ".join((match[1] or match[2]).split()))
        if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[f"${assigned[1]}"] = assigned[2]
        for name, value in variables.items():
            line = line.replace(name, value)
        found += [Command(one, match[1] is not None) for one in line.split(" && ") if IS_COMMAND.match(one)]
    return found


def flags(text):
    return shlex.split(text or "")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Small texts under the names of the data sets, in a directory of their own."""
    text = TEXT * 40
    monkeypatch.chdir(tmp_path)
    for name in ("ptb", "wikitext-2", "text8", "enwik8"):
        monkeypatch.setitem(ranjax.data.KNOWN, name, replace(ranjax.data.KNOWN[name], totals=(None,) * 4))
        for split in ("train", "valid", "test"):
            path = tmp_path / "DATA" / name / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "DIR").symlink_to("DATA")
    (tmp_path / "my" / "folder").mkdir(parents=True)
    (tmp_path / "chapter.txt").write_text(text)
    (tmp_path / "my" / "text.txt").write_text("Once upon a time\n" * 200)
    for split in ("train", "valid", "test"):
        (tmp_path / "my" / "folder" / f"{split}.txt").write_text(text)
    (tmp_path / "DATA" / "tiny-shakespeare").mkdir()
    (tmp_path / "DATA" / "tiny-shakespeare" / "input.txt").write_text(text)
    bytes_ = [("Return the name of the " + text).encode()] * 3
    monkeypatch.setattr(ranjax.data, "hub_texts", lambda *_: ("the hub", bytes_))
    monkeypatch.setattr(ranjax.data, "python_docs", lambda: ("the library", bytes_))
    return tmp_path


def shortened(name, arguments):
    """The flags of a program with a small network, a small batch and one epoch; one more for a run that goes on."""
    if name != "train":
        return [*arguments, "--length", "3"] if name == "generate" else arguments
    if "--resume" in arguments and "auto" not in arguments:
        return [*arguments, "--epochs", "2"]
    if "--features" in arguments:  # as many sizes as there are
        first = arguments.index("--features") + 1
        sizes = [one for one in arguments[first : first + 9] if one.isdigit()]
        arguments = [*arguments, *SMALL, "--features", *["8"] * len(sizes)]
    else:
        arguments = [*arguments, *SMALL]
    if "--mesh" not in arguments:
        arguments = [*arguments, "--mesh", "data=1"]
    return [*arguments, "--cutoffs", "4"] if parse(arguments).softmax == "adaptive" else arguments


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run(page, texts):
    ran = []
    for command in commands(page):
        if found := PROGRAM.fullmatch(command.text):
            name, arguments = found[1], flags(found[2])
            if name == "train" and command.text in ran:  # trained already
                continue
            if "--distributed" in arguments:  # tests/training/test_processes.py runs it
                assert parse_cluster(arguments).distributed
                continue
            if name == "export":  # the shape checks of the tests do not support its symbolic sizes
                done = run_program(name, *arguments)
                assert done.returncode == 0, done.stderr
            else:
                importlib.import_module(f"ranjax.{name}").main(shortened(name, arguments))
            ran.append(command.text)
            for unnamed in (texts / "runs").glob("*") if not command.block else ():
                unnamed.rename(texts / f"{unnamed.name}-{len(ran)}")  # the next in a text may have the same name
    assert bool(ran) == ("python -m ranjax." in (ROOT / page).read_text("utf-8"))


@pytest.mark.parametrize("page", MEASURED)
def test_the_programs_of_a_measured_page_are_parsed(page, texts):
    for command in commands(page):
        found = PROGRAM.fullmatch(command.text)
        if found and found[1] == "train":
            parse(flags(found[2]))


def options_of(path, monkeypatch):
    """The dataclass of a script's flags."""
    monkeypatch.syspath_prepend(ROOT / Path(path).parent)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    main = re.search(r"def main\(options: (\w+)", (ROOT / path).read_text("utf-8"))[1]
    return getattr(module, main)


@pytest.mark.parametrize("page", PAGES + MEASURED)
def test_the_flags_of_scripts_are_those_that_they_have(page, texts, monkeypatch):
    for command in commands(page):
        if (found := SCRIPT.fullmatch(command.text)) and not found[1].startswith(("notebooks", "examples")):
            cli.options(options_of(found[1], monkeypatch), flags(found[2]), f"python {found[1]}")


def test_the_table_of_the_page_on_robustness_is_that_of_its_command(capsys):
    module = importlib.import_module("robustness")
    [command] = [one.text for one in commands("docs/robustness.md") if "--table" in one.text]
    pattern = flags(SCRIPT.fullmatch(command)[2])[-1]
    module.main(module.Options(table=tuple(sorted(ROOT.glob(pattern)))))
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "robustness.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES + MEASURED)
def test_what_is_installed_is_an_extra_of_the_project(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for command in commands(page):
        if re.match(r"\S*pip install", command.text):
            [target] = [word for word in flags(command.text)[2:] if not word.startswith("-")]
            if target in ELSEWHERE:
                continue
            named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)[1]
            assert set(named.split(",") if named else []) <= set(extras)


KINDS = [
    PROGRAM,
    SCRIPT,
    re.compile(r"\S*pip install .*"),
    re.compile(r"python3 -m venv \.venv"),
    re.compile(r"\S*python -m pytest.*"),
    re.compile(r"\S*python -m sphinx -W --keep-going -c docs \. build/docs"),
    re.compile(r"\S*python notebooks/build\.py NAME"),
    re.compile(r"\.venv/bin/(ruff (check|format --check) \.|pyright --pythonpath \.venv/bin/python)"),
]


@pytest.mark.parametrize("page", PAGES + MEASURED)
def test_every_command_of_a_page_is_of_a_kind_that_is_tested(page):
    """`.ci/run` installs, tests, lints; tests/test_site.py builds the site, tests/test_notebooks.py the notebooks."""
    for command in commands(page):
        assert any(kind.fullmatch(command.text) for kind in KINDS), command.text


def test_files_that_contributing_names_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name in re.findall(r"(?:tests|ranjax|docs|notebooks|benchmarks|experiments|examples)/[\w/.]*", page):
        assert (ROOT / name).exists() or name in ("notebooks/NAME.py",), name


def test_the_pages_have_commands():
    assert len([command for page in PAGES for command in commands(page)]) > 40
