"""The study of parity: its settings, its seeds, its picture."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from harness.table import Table, chosen

from ranjax.training.model import build_model


@pytest.fixture
def parity(script):
    return script("parity")


def test_tuning_takes_the_best_of_the_grid(parity, monkeypatch, tmp_path):
    tried = []

    def row(config, **labels):
        tried.append((config.dropout, config.learning_rate, config.epochs))
        short = "-grid" if config.epochs == 4 else ""
        assert labels == {"study": f"ptb-small-tuned{short}", "model": "LSTM"}
        return {"valid_perplexity": abs(config.dropout - 0.25) + abs(config.learning_rate - 2)}

    table = Table(tmp_path, tmp_path)
    monkeypatch.setattr(table, "row", row)
    best = parity.settings(table, "ptb-small-tuned", "LSTM")
    assert (best.cell, best.dropout, best.learning_rate, best.epochs) == ("lstm", 0.25, 2.0, 8)
    short, full = [(0.25, rate, 4) for rate in (0.5, 1.0, 2.0)], [(dropout, 2.0, 8) for dropout in (0.1, 0.25, 0.4)]
    assert tried == [*short, *short, (0.25, 4.0, 4), *full]  # the highest was the best: a higher one too


def test_learning_rates_are_lowered_while_the_lowest_is_the_best(parity, monkeypatch, tmp_path):
    table, at, lowest = Table(tmp_path, tmp_path), 0.25, []

    def unstable(config, **labels):
        lowest.append(config.learning_rate)
        return {"valid_perplexity": None if config.learning_rate > at else abs(config.learning_rate - at)}

    monkeypatch.setattr(table, "row", unstable)
    assert parity.settings(table, "ptb-small-tuned", "S-RNN").learning_rate == 0.25
    assert min(lowest) == 0.125
    at = 0.001
    assert parity.settings(table, "ptb-small-tuned", "S-RNN").learning_rate == 0.0625  # three times at most


@pytest.mark.parametrize(
    ("study", "model", "rate"),
    [
        ("ptb-large", "RAN, identity", 0.5),
        ("text8", "RAN, identity", 2e-3),
        ("ptb-medium", "S-RNN", 0.25),
        ("ptb-large", "S-RNN", 0.25),
        ("ptb-medium", "LSTM", 1.0),
    ],
)
def test_a_model_may_have_its_own_learning_rate(study, model, rate, parity):
    assert parity.settings(None, study, model).learning_rate == rate


def test_the_study_of_reach_changes_the_reach_alone(parity):
    reach, whole = parity.STUDIES["ptb-small-reach"], parity.STUDIES["ptb-small-tuned"]
    assert reach.steps == parity.STUDIES["ptb-small-20-tuned"].steps
    assert reach.batch_size * reach.steps == whole.batch_size * whole.steps
    sums = whole.steps / reach.steps  # the gradient is a sum over time: so much shorter where there are fewer steps
    assert reach.learning_rate == sums * whole.learning_rate
    assert reach.clip * sums == whole.clip
    same = {"batch_size": 35, "steps": 20, "learning_rate": 1.75, "clip": 5 / 1.75}
    assert dataclasses.replace(whole, **same) == reach
    assert dataclasses.replace(reach, learning_rate=1.0, clip=5.0) == parity.STUDIES["ptb-small-35-columns"]


def test_wikitext_is_trained_at_what_came_out_best_on_penn_treebank(parity, recorded):
    rows = recorded("parity")
    for model in parity.MODELS:
        best = chosen(rows, study="ptb-small-tuned", model=model)[0]
        config = parity.settings(None, "wikitext-2", model)
        assert (config.learning_rate, config.dropout) == (best["learning_rate"], best["dropout"])


@pytest.mark.parametrize(("seeds", "more"), [(1, []), (2, [("RAN", 1), ("LSTM", 1)])])
def test_three_models_have_several_seeds(seeds, more, parity, tmp_path, monkeypatch):
    trained, models = [], ("RAN", "GRU", "LSTM")

    class Rows(Table):
        def row(self, config, *_, **labels):
            trained.append((labels["model"], config.seed))

    monkeypatch.setattr(parity, "draw", lambda *_: None)
    options = parity.Parity(study="wikitext-2", models=models, seeds=seeds)
    parity.main(options, Rows(tmp_path, tmp_path))
    assert trained == [*((model, 0) for model in models), *more]


def test_models_of_bytes_stay_within_forty_million_parameters(parity):
    for name in parity.MODELS:
        model = build_model(parity.settings(None, "enwik8", name), 205)
        init = partial(model.init, deterministic=True)
        shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
        assert 8e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) <= 40e6


def test_the_picture_shows_the_rows_that_exist(parity, tmp_path):
    base = parity.STUDIES["ptb-small-tuned"]
    rows = [
        {"study": "ptb-small-tuned", "model": model, "test_perplexity": test, "valid_perplexity": valid}
        | {"config": vars(dataclasses.replace(base, seed=seed, dropout=dropout))}
        for model, seed, dropout, valid, test in (
            ("RAN", 0, 0.1, 109.0, 105.0), ("RAN", 0, 0.4, 111.0, 107.0), ("RAN", 1, 0.1, None, None),
            ("LSTM", 0, 0.4, 104.0, 100.0),
        )
    ]  # fmt: skip
    for study in ("text8", "enwik8-small"):
        tested = {"test_bits": 2.0, "valid_perplexity": 4.0}
        rows.append({"study": study, "model": "RAN", "config": vars(parity.STUDIES[study])} | tested)
    rows.append(rows[-1] | {"model": "RAN, identity", "test_bits": None, "valid_perplexity": None})
    for some, diverged in (([row for row in rows if row["study"] == "enwik8-small"], 1), (rows, 2)):
        parity.draw(some, tmp_path / "some.svg")
        drawn = (tmp_path / "some.svg").read_text("utf-8")  # its texts are in comments, as they are in its paths
        assert drawn.count("<!-- not finite -->") == diverged
    for axis in ("test perplexity", "test bits per character", "test bits per byte"):
        assert drawn.count(f"<!-- {axis} -->") == 1


def test_the_picture_leaves_out_studies_of_two_models(parity, recorded, tmp_path):
    parity.draw(recorded("parity"), tmp_path / "all.svg")
    drawn = (tmp_path / "all.svg").read_text("utf-8")
    assert all(drawn.count(f"<!-- {title} -->") == 1 for title in parity.TITLES.values())
    assert "tied" not in drawn
    assert drawn.count("<!-- S-RNN -->") == 2  # once in each line of panels
    for beyond in ("719.6", "140.9"):
        assert f"<!-- {beyond}" in drawn
