"""The program `compare`."""

import re
import subprocess
import sys

import pytest

from ranjax import compare
from ranjax.training import comparison


def test_the_names_of_the_program_are_those_of_training():
    for name in ("Compared", "draw", "read_runs", "table"):
        assert getattr(compare, name) is getattr(comparison, name)


def test_runs_are_printed_and_drawn(pets_run, copied_run, tmp_path, capsys):
    before = sorted(path.stat().st_mtime_ns for path in copied_run.directory.rglob("*"))
    out = tmp_path / "picture.png"
    out.write_bytes(b"an older one")
    compare.main([str(pets_run[0].directory), str(copied_run.directory), "--out", str(out)])
    said = capsys.readouterr()
    headings, first, second, written = said.out.splitlines()
    assert headings.split()[:3] == ["run", "data", "set"]
    assert first.startswith("pets ")
    assert second.startswith("copy ")
    assert written == f"written: {out}"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert said.err == ""
    assert sorted(path.stat().st_mtime_ns for path in copied_run.directory.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the --out directories of two or more runs, each once; got none"),
        (["{run}"], "give the --out directories of two or more runs, each once; got .*pets"),
        (["{run}", "{run}"], "give the --out directories of two or more runs, each once; got .*pets, .*pets"),
        (["{run}", "{tmp}"], "is not a run: it has no config.json"),
        (["{run}", "{tmp}/none"], "none is not a run: it has no config.json"),
        (["{run}", "{copy}", "--out", "{tmp}/x.pdf"], "--out must end in .png .a figure.; got .*x.pdf"),
        (
            ["{run}", "{copy}", "--out", "{tmp}/none/x.png"],
            "--out must be a file in a directory that exists; got .*x.png",
        ),
        (
            ["{run}", "{copy}", "--out", "/dev/null/x.png"],
            "--out must be a file in a directory that exists; got .*x.png",
        ),
    ],
)
def test_bad_input_is_one_message(flags, message, pets_run, copied_run, tmp_path, capsys):
    places = {"run": pets_run[0].directory, "copy": copied_run.directory, "tmp": tmp_path}
    with pytest.raises(SystemExit) as ended:
        compare.main([flag.format(**places) for flag in flags])
    assert ended.value.code == 1
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_help_imports_no_jax():
    code = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); from ranjax.compare import main; "
    ended = subprocess.run(
        [sys.executable, "-c", code + "main(['--help'])"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.endswith("False\n")
