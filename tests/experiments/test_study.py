"""The command line of a study: its flags, and how it stops."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import study, table

from ranjax.errors import UserError

EXPERIMENTS = Path(harness.__file__).parents[1]


def test_seeds_are_counted_from_zero_and_at_least_one():
    assert list(study.seeds(3)) == [0, 1, 2]
    with pytest.raises(UserError, match="--seeds must be at least 1; got 0"):
        study.seeds(0)


def test_the_end_of_the_minutes_saves_the_run_and_stops_the_study(pets, tmp_path):
    """There is no row; the table and the runs are where the flags say."""
    program = (
        f"import pathlib, sys, threading, time; sys.path.insert(0, {str(EXPERIMENTS)!r})\n"
        "from harness import study; from ranjax import cli; from ranjax.training.config import Config\n"
        f"config = Config(dataset={pets.dataset!r}, features=(8,), layers=1, batch_size=4, steps=7, epochs=4000)\n"
        "def hurry(stop):\n"  # the minutes end once the training has begun, however slow the machine is
        "    while not any(path.stat().st_size for path in pathlib.Path('kept').glob('*/metrics.jsonl')):\n"
        "        time.sleep(0.1)\n"
        "    stop._end = 0.0\n"
        "def main(options, table):\n"
        "    print(table.folder, table.data_dir)\n"
        "    threading.Thread(target=hurry, args=(table.stop,), daemon=True).start()\n"
        "    table.row(config, study='pets')\n"
        "cli.start(lambda: study.run(main, study.Options, pathlib.Path('the study')), huge_pages=True)\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "study.py").write_text(program)
    command = [sys.executable, "study.py", "--minutes", "5", "--runs", "kept", "--out", "~/cut", "--data-dir", "data"]
    home = os.environ | {"HOME": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=home)
    assert first.returncode == 143, first.stderr
    assert first.stdout.startswith(f"{tmp_path}/cut data\n")
    assert "saved. Go on with" in first.stdout
    assert first.stdout.endswith("The study was stopped; the same command goes on with it.\n")
    assert not list((tmp_path / "cut").iterdir())
    assert [path.name[:4] for path in (tmp_path / "kept").iterdir()] == ["pets"]


@pytest.mark.parametrize("minutes", [0, -1, math.inf, math.nan, 1e300])
def test_minutes_out_of_range_are_refused(minutes, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        study.run(pytest.fail, study.Options, tmp_path, ["--minutes", str(minutes)])
    assert ended.value.code == 1
    message = rf"--minutes must be above 0 and at most 1000000; got {re.escape(str(float(minutes)))}\."
    assert re.search(message, capsys.readouterr().err)


def test_a_study_restores_the_signal_handlers(tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]

    def main(options, table):
        assert options.minutes == 1
        assert all(signal.getsignal(number) not in before for number in numbers)

    study.run(main, study.Options, tmp_path, ["--minutes", "1"])
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_trainings_stops_the_study(number, pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "train", pytest.fail)

    def main(options, table):
        signal.raise_signal(number)
        table.row(pets)

    with pytest.raises(SystemExit) as ended:
        study.run(main, study.Options, tmp_path, [])
    assert ended.value.code == 128 + number
    assert capsys.readouterr().out == "The study was stopped; the same command goes on with it.\n"


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("parity", ["--study", "ptb"], "invalid choice"),
        ("ablation", ["--variants", "GRU"], "invalid choice"),
        ("long-context", ["--models", "GRU"], "invalid choice"),
        ("parity", ["--models"], "--models must be followed by at least one name."),
    ],
)
def test_what_a_study_does_not_know_is_refused(name, flags, message):
    program = [sys.executable, str(EXPERIMENTS / name / "run.py"), *flags]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert flags[-1] in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["parity", "ablation", "long-context"])
def test_a_script_imports_only_the_library_and_the_harness(name):
    program = (EXPERIMENTS / name / "run.py").read_text("utf-8")
    imported = set(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"ranjax", "harness"}
