"""The study of parity with one scan: its models are of one size, its pieces lack what they name."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.table import Table

from ranjax.data import load_corpus
from ranjax.errors import UserError
from ranjax.training.model import abstract_params, build_model


@pytest.fixture
def on_par(script):
    return script("on-par")


@pytest.mark.parametrize("name", ["ptb-small", "pieces"])
def test_models_of_a_study_are_of_one_size(on_par, name):
    study, sizes = on_par.STUDIES[name], {}
    for model in study.models:
        with on_par.without(model):
            config = on_par.settings(study, model)
            leaves = jax.tree.leaves(abstract_params(build_model(config, study.vocabulary)))
            sizes[model] = sum(leaf.size for leaf in leaves)
    assert max(sizes.values()) / min(sizes.values()) < 1.03


def test_a_size_that_no_width_has_is_refused(on_par):
    study = on_par.STUDIES["text8"]._replace(lstm=1, models={"wide": {"embedding": 500}})
    with pytest.raises(UserError, match=r"wide has [\d,]+ parameters at the nearest width, and 105 are asked"):
        on_par.settings(study, "wide")


def test_pieces_are_left_out(on_par):
    study = on_par.STUDIES["pieces"]
    config = on_par.replace(on_par.settings(study, "all"), features=(8,), layers=1)
    tokens = np.arange(12)[None] % 27

    def logits(piece, params=None):
        with on_par.without(piece):
            model = build_model(on_par.replace(config, **study.models[piece]), 27)
            params = params or model.init(jax.random.key(0), tokens, deterministic=True)["params"]
            return params, model.apply({"params": params}, tokens, deterministic=True)[0]

    whole, expected = logits("all")
    without_norms, _ = logits("no norms")
    assert whole.keys() - without_norms.keys() == set()  # the norm before the output layer stays
    assert whole["stack_0"].keys() - without_norms["stack_0"].keys() == {"norm", "mlp_norm"}
    without_gate, _ = logits("no output gate")
    assert whole["stack_0"].keys() - without_gate["stack_0"].keys() == {"gate"}
    assert "mlp_gate" in without_gate["stack_0"]
    np.testing.assert_array_equal(logits("all", whole)[1], expected)  # nothing stays left out
    assert not jnp.allclose(logits("no norms", whole)[1], expected)


def test_a_study_trains_the_best_of_its_grid(on_par, monkeypatch, tmp_path):
    asked = []

    def row(config, **labels):
        assert labels["study"] == "text8"
        asked.append((labels["model"], config.learning_rate, config.seed))
        return {"valid_perplexity": abs(config.learning_rate - 1.2e-3)}

    table = Table(tmp_path, tmp_path)
    monkeypatch.setattr(table, "row", row)
    monkeypatch.setattr(on_par, "draw", lambda table: None)
    on_par.main(on_par.OnPar(study="text8", models=("RAN",), seeds=2), table)
    rates = sorted({rate for _, rate, _ in asked})
    assert rates == [5e-4, 1e-3, 2e-3, 4e-3]  # the lowest was the best: its half is tried, too
    assert ("RAN", 1e-3, 1) in asked
    with pytest.raises(UserError, match=r"--models must be of 'LSTM', .*; got 'GRU'"):
        on_par.main(on_par.OnPar(study="text8", models=("GRU",)), table)


def test_the_first_bytes_of_enwik8_are_a_data_set(on_par, tmp_path, monkeypatch):
    (tmp_path / "data" / "enwik8").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "enwik8" / "enwik8.gz", "wb") as file:
        file.write(b"a page of text. " * 100)
    monkeypatch.setattr(on_par, "ENWIK8", 1000)
    part = on_par.first_of_enwik8(str(tmp_path / "data"), tmp_path / "runs")
    corpus = load_corpus("enwik8", part)
    assert sum(map(len, (corpus.train, corpus.valid, corpus.test))) == 1000
    with pytest.raises(UserError, match=r"--data-dir must have enwik8/enwik8 or enwik8/enwik8\.gz"):
        on_par.first_of_enwik8(str(tmp_path), tmp_path / "runs")


@pytest.mark.data
def test_vocabularies_are_those_of_the_texts(on_par, real_data):
    assert on_par.STUDIES["python-docs"].vocabulary == 4096  # as its test says
    for name in ("text8", "ptb-small"):
        study = on_par.STUDIES[name]
        assert len(load_corpus(study.config.dataset, real_data).vocabulary) == study.vocabulary


def test_the_pictures_have_the_tasks_whose_rows_exist(on_par, tmp_path):
    def row(study, model, bits, seed=0):
        config = on_par.settings(on_par.STUDIES[study], model)
        row = {"study": study, "model": model, "seconds": 600, "test_bits": bits, "test_perplexity": 2**bits}
        return row | {"valid_perplexity": 2**bits, "config": json.loads(json.dumps(vars(config))) | {"seed": seed}}

    rows = [row("text8", "LSTM", 1.85), row("text8", "RAN", 1.95), row("text8", "RAN", 1.85, 1)]
    rows.append(row("ptb-small", "RAN", 6.0))
    on_par.draw_minutes(rows, tmp_path / "minutes.svg")
    drawn = (tmp_path / "minutes.svg").read_text("utf-8")
    assert "<!-- text8 -->" in drawn
    assert "<!-- ptb-small -->" in drawn
    tables = {"on-par": rows, "parity": [], "wikitext-2": []}
    on_par.draw_beside(tables, tmp_path / "on-par.svg")
    drawn = (tmp_path / "on-par.svg").read_text("utf-8")
    titles = [f"<!-- {line.title} -->" for line in on_par.BESIDE]
    assert [title for title in titles if title in drawn] == ["<!-- text8 (10 MB), 1.07M parameters, tuned -->"]
    shares = {"LSTM": [0.0], "RAN": pytest.approx([100 * (2**0.1 - 1), 0.0])}
    assert on_par.relative(tables, on_par.BESIDE[-1]) == shares


def test_every_line_of_the_picture_has_its_rows(on_par, recorded):
    tables = {"on-par": recorded("on-par"), **on_par.other_tables()}
    for line in on_par.BESIDE:
        assert {"LSTM"} < on_par.relative(tables, line).keys(), line
