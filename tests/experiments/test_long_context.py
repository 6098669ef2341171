"""The study of long contexts: its settings, what is recalled, its picture."""

import math
import re

import numpy as np
import pytest

from ranjax.data import load_corpus
from ranjax.data.builtin import markov_entropy
from ranjax.training.config import Config
from ranjax.training.metrics import Evaluation
from ranjax.training.model import Run


@pytest.fixture
def study(script):
    return script("long-context")


def test_every_truncation_length_has_as_many_tokens_an_update(study):
    for length in study.LENGTHS:
        config = study.truncated(study.TEXT, length)
        assert config.steps == length
        assert 0.99 * study.UPDATE < config.steps * config.batch_size <= study.UPDATE


def test_every_task_is_a_data_set(study):
    for task, distances in study.DISTANCES.items():
        assert load_corpus(f"{task}-{distances[0]}").train.size


def test_the_picture_shows_the_rows_that_exist(study, tmp_path):
    rows = [{"model": "RAN", "task": "copy", "length": n, "recalled": 1 / n} for n in (16, 8)]
    rows.append({"model": "RAN", "task": "copy", "length": 32})  # it diverged
    study.draw(rows, "recalled", ["copy", "recall"], tmp_path / "some.svg")
    texts = re.findall("<!-- (.*?) -->", (tmp_path / "some.svg").read_text())
    assert "RAN" in texts  # in the legend, with a panel empty


@pytest.mark.parametrize("name", ["recall-3", "markov-2"])
def test_what_is_recalled_is_0_for_a_guess_and_1_for_an_answer(name, study, tmp_path, monkeypatch):
    corpus = load_corpus(name)
    monkeypatch.setattr(study, "load_run", lambda _: Run(Config(dataset=name), corpus.vocabulary, None, None))
    for nats, recalled in ((math.log(8), 0.0), (0.0 if name == "recall-3" else markov_entropy(), 1.0)):

        def evaluator(_, nats=nats):
            def evaluate(params, ids, counted):
                np.testing.assert_array_equal(ids, corpus.test)
                assert (counted is None) == (name == "markov-2")
                assert counted is None or counted.sum() * 5 == len(ids)  # one answer for every "!ab?a"
                return Evaluation(nats, 10)

            return evaluate

        monkeypatch.setattr(study, "make_evaluator", evaluator)
        assert study.recalled(tmp_path)["recalled"] == pytest.approx(recalled)
