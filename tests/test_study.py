"""Studies: rows that are there are not trained for again, what was cut off goes on, time runs out."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranjax import study
from ranjax.config import Config
from ranjax.errors import UserError

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pets.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 80)
    return Config(dataset=str(tmp_path / "pets.txt"), features=(8,), layers=1, batch_size=4, steps=7, epochs=1)


def test_a_row_is_trained_for_once(config, tmp_path, capsys):
    options = study.Options(runs=str(tmp_path / "runs"))
    table = study.Table(tmp_path / "results.jsonl", options)
    row = table.row(config, study="pets", model="RAN, input gates")
    promised = (
        "dataset cell gates activation seed dropout test_perplexity valid_perplexity tokens config versions device"
    )
    assert set(promised.split()) | {"date", "seconds", "study", "model"} <= set(row)
    assert row["test_perplexity"] > 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [
        "pets-RAN-input-gates-1-epochs-dropout-0.2-rate-0.002-seed-0"
    ]
    assert "== pets, RAN, input gates, 1 epochs" in capsys.readouterr().out

    again = study.Table(tmp_path / "results.jsonl", options)
    assert again.rows == [json.loads(json.dumps(row))]
    assert again.row(config, study="pets", model="RAN, input gates") == again.rows[0]
    assert capsys.readouterr().out == ""  # no training
    assert again.row(config, study="pets", model="another")["model"] == "another"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

    (tmp_path / "results.jsonl").unlink()  # a run that is there goes on: this one is at its end
    once_more = study.Table(tmp_path / "results.jsonl", options).row(config, study="pets", model="RAN, input gates")
    assert once_more["test_perplexity"] == row["test_perplexity"]
    assert once_more["seconds"] == row["seconds"]


def test_time_runs_out(config, tmp_path):
    """Cut off by its budget, saved as by Ctrl-C, without a row."""
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from ranjax import study; from ranjax.config import Config\n"
        "minutes = float(sys.argv[2]) if len(sys.argv) > 2 else None\n"
        "table = study.Table(Path(sys.argv[1]) / 'rows.jsonl', study.Options(runs=sys.argv[1] + '/runs'))\n"
        f"config = Config(dataset={config.dataset!r}, features=(8,), layers=1, batch_size=4, steps=7, epochs=400)\n"
        "with study.budget(minutes):\n"
        "    table.row(config, study='pets')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cut")]
    first = subprocess.run([*command, "0.12"], capture_output=True, text=True, check=False, timeout=120)
    assert first.returncode == 143, first.stderr
    assert "saved. Go on with" in first.stdout
    assert not (tmp_path / "cut" / "rows.jsonl").exists()
    assert list((tmp_path / "cut" / "runs").iterdir())


def test_a_budget_is_taken_back(config):
    with study.budget(0.001):
        pass
    time.sleep(0.1)
    with pytest.raises(UserError, match="--minutes must be above 0; got 0"), study.budget(0):
        pass


def test_tuning_takes_the_best_of_the_short_runs(monkeypatch, tmp_path):
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    tried = []

    class Rows:
        def row(self, config, **labels):
            tried.append((config.dropout, config.learning_rate, config.epochs))
            assert labels == {"study": "ptb-small-tuned-grid", "model": "LSTM"}
            return {"valid_perplexity": abs(config.dropout - 0.25) + abs(config.learning_rate - 2)}

    best = parity["tuned"](Rows(), "ptb-small-tuned", "LSTM")
    assert (best.cell, best.dropout, best.learning_rate, best.epochs) == ("lstm", 0.25, 2.0, 8)
    assert tried == [(0.1, 1.0, 4), (0.25, 1.0, 4), (0.4, 1.0, 4), (0.25, 0.5, 4), (0.25, 1.0, 4), (0.25, 2.0, 4)]


def test_the_parity_study_draws_what_there_is(tmp_path):
    parity = runpy.run_path(str(EXPERIMENTS / "parity" / "run.py"))
    rows = [{"study": "ptb-small", "model": model, "test_perplexity": 120.0} for model in ("RAN", "LSTM")]
    parity["draw"](rows, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--study must be of"):
        parity["main"](parity["Parity"](study="ptb"))
