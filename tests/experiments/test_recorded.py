"""The recorded rows: whole, and found by the studies that they are of."""

import dataclasses
import json
import shutil
from pathlib import Path

import harness
import pytest
from harness import table
from harness.table import Table

EXPERIMENTS = Path(harness.__file__).parents[1]

PROMISED = (
    "dataset cell gates activation seed dropout test_perplexity valid_perplexity tokens config versions device date "
    "seconds"
)


@pytest.mark.parametrize("name", ["parity", "ablation", "long-context", "on-par"])
def test_rows_are_whole(name, recorded):
    rows = recorded(name)
    assert rows
    assert all(set(PROMISED.split()) <= row.keys() for row in rows)


def test_a_row_says_how_it_was_ablated(script, recorded):
    """Beside its settings, which are those of a training."""
    variants = script("ablation").VARIANTS
    for row in recorded("ablation"):
        assert row.get("ablation") == variants[row["variant"]].ablation


class Found(Table):
    """A table that lists the rows it has returned."""

    def __init__(self, folder):
        super().__init__(folder, folder / "runs")
        self.found = []

    def row(self, *args, **labels):
        row = super().row(*args, **labels)
        self.found.append(json.dumps(row))
        return row


def recorded_models(module, rows):
    """Every study and model that there are rows of, and the number of seeds."""
    seeds = {}
    for row in rows:
        if row["study"] in module.STUDIES:
            labels = row["study"], row["model"]
            seeds[labels] = max(seeds.get(labels, 1), row["seed"] + 1)
    return [{"study": study, "models": (model,), "seeds": n} for (study, model), n in seeds.items()]


def parity(module, rows):
    return [module.Parity(**options) for options in recorded_models(module, rows)]


def ablation(module, rows):
    return [module.Ablation()]


def long_context(module, rows):
    return [module.LongContext(study=study) for study in ("truncation", "tasks")]


def on_par(module, rows):
    return [module.OnPar(**options) for options in recorded_models(module, rows)]


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("parity", parity, 1),  # one RAN of another dropout: see the page
        ("ablation", ablation, 0),
        ("long-context", long_context, 0),
        ("on-par", on_par, 0),
    ],
)
def test_a_study_finds_its_recorded_rows(name, options, others, script, tmp_path, monkeypatch):
    """Started again it trains nothing. If settings drifted from those of the rows, all would be trained again."""
    shutil.copy(EXPERIMENTS / name / "results.jsonl", tmp_path)
    kept = (tmp_path / "results.jsonl").read_bytes()
    module, recorded_rows = script(name), Found(tmp_path)
    monkeypatch.setattr(table, "train", lambda config, **_: pytest.fail(f"trains {config}"))
    monkeypatch.setattr(Table, "_check_text", lambda self, config: pytest.fail(f"would train {config}"))
    monkeypatch.setattr(module, "draw", lambda *_: None)
    for given in options(module, recorded_rows.rows):
        module.main(given, recorded_rows)
    assert len(set(recorded_rows.found)) == len(recorded_rows.rows) - others
    assert (tmp_path / "results.jsonl").read_bytes() == kept


def test_settings_that_drift_are_noticed(script, tmp_path, monkeypatch):
    """The test above can fail."""
    shutil.copy(EXPERIMENTS / "ablation" / "results.jsonl", tmp_path)
    module = script("ablation")
    monkeypatch.setattr(module, "CONFIG", dataclasses.replace(module.CONFIG, clip=5.5))
    monkeypatch.setattr(Table, "_check_text", lambda self, config: pytest.fail(f"would train {config}"))
    with pytest.raises(pytest.fail.Exception, match="would train"):
        module.main(module.Ablation(), Table(tmp_path, tmp_path))
