"""Log-probabilities of the tokens of a text."""

import io
import json
import math

import jax
import numpy as np
import pytest
from small_runs import TEXT

from ranjax.data.vocabulary import Characters, Words
from ranjax.errors import DivergedError, UserError
from ranjax.lm import LanguageModel
from ranjax.training import score as module
from ranjax.training.metrics import make_evaluator
from ranjax.training.model import load_run
from ranjax.training.score import log_probabilities, score


@pytest.fixture(scope="module")
def run(pets_run):
    return load_run(pets_run[0].directory)


@pytest.mark.quick
@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 40])
def test_they_are_those_of_all_logits_of_the_whole_text(length, run, monkeypatch):
    """Whatever the chunks are; here of 16 tokens."""
    monkeypatch.setattr(module, "WINDOW", 16)
    ids = run.vocabulary.encode(TEXT)[:length]
    logits, _ = run.model.apply({"params": run.params}, ids[None], deterministic=True)
    expected = jax.nn.log_softmax(logits[0])[np.arange(length - 1), ids[1:]]
    parts = list(log_probabilities(run.model, run.params, ids))
    assert all(len(part) == 16 for part in parts[:-1])
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-6)


def test_those_of_an_adaptive_softmax_are_of_all_words():
    model = LanguageModel(30, features=8, layers=1, softmax="adaptive", cutoffs=(5, 12))
    ids = np.random.default_rng(0).integers(0, 30, 50)
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
    logits, _ = model.apply({"params": params}, ids[None], deterministic=True)
    expected = jax.nn.log_softmax(logits[0])[np.arange(49), ids[1:]]
    [found] = log_probabilities(model, params, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_their_mean_is_that_of_the_evaluation(run):
    ids = run.vocabulary.encode(TEXT * 20)  # three windows
    file = io.BytesIO()
    found = score(run.model, run.params, run.vocabulary, ids, file)
    expected = make_evaluator(run.model)(run.params, ids)
    assert found.tokens == expected.tokens == len(ids) - 1
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [row["position"] for row in rows] == list(range(len(ids)))
    assert "".join(row["token"] for row in rows) == TEXT * 20
    assert [row["id"] for row in rows] == ids.tolist()
    assert rows[0]["log_probability"] is None
    assert -sum(row["log_probability"] for row in rows[1:]) / (len(ids) - 1) == pytest.approx(found.nats, rel=1e-9)


def test_words_and_ends_of_lines_are_written_as_they_stand_in_a_text():
    vocabulary = Words(("<eos>", "<unk>", "Ω"))
    model = LanguageModel(3, features=4, layers=1)
    ids = vocabulary.encode("Ω cat\n")
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
    file = io.BytesIO()
    score(model, params, vocabulary, ids, file)
    assert [json.loads(line)["token"] for line in file.getvalue().decode().splitlines()] == ["Ω", "<unk>", "\n"]
    assert "Ω" in file.getvalue().decode()


def test_what_is_not_finite_is_an_error(run):
    params = jax.tree.map(lambda p: p * math.nan, run.params)
    with pytest.raises(DivergedError, match="the loss on this text is nan"):
        score(run.model, params, run.vocabulary, run.vocabulary.encode(TEXT), None)


def test_a_text_without_a_prediction_is_refused(run):
    with pytest.raises(UserError, match="at least 2 tokens is needed to predict one from another; got 1"):
        list(log_probabilities(run.model, run.params, np.array([0])))
    with pytest.raises(ValueError, match="`ids` must be whole numbers from 0 to 14, the model's"):
        list(log_probabilities(run.model, run.params, np.array([0, 15])))
    assert isinstance(run.vocabulary, Characters)
