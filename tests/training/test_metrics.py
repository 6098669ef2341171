"""Cross-entropy, perplexity, and the evaluation of a text, against log-probabilities in plain NumPy."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax.cli import Stop, Stopped
from ranjax.errors import DivergedError, UserError
from ranjax.lm import LanguageModel
from ranjax.training import metrics
from ranjax.training.metrics import Evaluation, finite, make_evaluator, perplexity, shown

VOCABULARY = 15


@pytest.fixture(scope="module")
def model():
    return LanguageModel(VOCABULARY, layers=1, features=8)


@pytest.fixture(scope="module")
def params(model):
    """Random weights, with forget gates that remember for long."""
    shapes = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = tree.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])
    random["stack_0"]["cell"]["gates"]["bias"] = random["stack_0"]["cell"]["gates"]["bias"].at[1].add(4.0)
    return random


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(VOCABULARY, size=199).astype(np.int32)


def log_probabilities(model, params, ids):
    """Of each token but the first, given those before it."""
    logits, _ = model.apply({"params": params}, ids[None, :-1], deterministic=True)
    logits = np.asarray(logits[0], np.float64)
    return logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))


def test_evaluation_counts_every_prediction_whatever_the_window(model, params, ids, monkeypatch):
    expected = log_probabilities(model, params, ids)
    for window in (7, len(ids) - 1, 512):
        monkeypatch.setattr(metrics, "WINDOW", window)
        result = make_evaluator(model)(params, ids)
        assert result.tokens == len(ids) - 1
        assert result.nats == pytest.approx(-expected.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats))
    assert make_evaluator(model)(params, ids.astype(np.uint8)) == result

    counted = np.arange(len(ids)) % 5 == 0
    result = make_evaluator(model)(params, ids, counted)
    assert result.tokens == counted[1:].sum()
    assert result.nats == pytest.approx(-expected[counted[1:]].mean(), rel=1e-5)


def test_evaluation_refuses_what_is_no_text_of_the_model(model, params, ids):
    evaluate = make_evaluator(model)
    for wrong in (ids - 1, ids + 1, ids.astype(float)):
        with pytest.raises(ValueError, match="`ids` must be whole numbers from 0 to 14, the model's; got"):
            evaluate(params, wrong)
    with pytest.raises(ValueError, match=r"`ids` must be the ids of one text, \(tokens,\); got the shape \(1, "):
        evaluate(params, ids[None])
    with pytest.raises(UserError, match=r"at least 2 tokens is needed .*; got 1"):
        evaluate(params, ids[:1])
    with pytest.raises(ValueError, match="`streams` must be a whole number, at least 1; got 0"):
        make_evaluator(model, 0)
    counted = np.arange(len(ids)) % 5 == 0
    for wrong in (np.arange(len(ids)) == 0, counted[:-1], counted[:2], counted.astype(int), True, "all"):
        with pytest.raises(ValueError, match=r"`counted` must be bool, of the shape .* and mark a token"):
            evaluate(params, ids, wrong)


@pytest.mark.parametrize("streams", [2, 5, 40, 10**9])  # most of the last would have nothing to read
def test_a_stream_reads_a_window_before_what_it_counts(streams, model, params, ids, monkeypatch):
    monkeypatch.setattr(metrics, "WINDOW", 16)
    own = -(-(len(ids) - 17) // (16 * streams)) * 16
    expected = []
    for first in range(0, min(streams * own, len(ids) - 17), own):
        part = log_probabilities(model, params, ids[first : first + own + 17])
        expected.extend(part[16 if first else 0 :])
    expected = np.array(expected)
    assert len(expected) == len(ids) - 1
    result = make_evaluator(model, streams)(params, ids)
    assert result.tokens == len(ids) - 1
    assert result.nats == pytest.approx(-expected.mean(), rel=1e-5)
    assert result.nats != make_evaluator(model)(params, ids).nats
    short = make_evaluator(model, streams)(params, ids[:4])
    assert (short.tokens, short.nats) == (3, pytest.approx(-expected[:3].mean(), rel=1e-5))

    counted = np.arange(len(ids)) % 5 == 0
    result = make_evaluator(model, streams)(params, ids, counted)
    assert result.tokens == counted[1:].sum()
    assert result.nats == pytest.approx(-expected[counted[1:]].mean(), rel=1e-5)


def test_evaluation_can_be_stopped_between_two_windows(model, params, ids, monkeypatch):
    monkeypatch.setattr(metrics, "WINDOW", 16)
    calls, stop = [], Stop()

    def between():
        calls.append(None)
        if len(calls) == 3:
            stop.ask(15)
        stop.check()

    with pytest.raises(Stopped, match="143"):
        make_evaluator(model, between=between)(params, ids)
    assert len(calls) == 3
    stop, calls = Stop(), []
    assert make_evaluator(model, between=between)(params, ids[:20]) == make_evaluator(model)(params, ids[:20])
    assert len(calls) == 2


def test_the_perplexity_of_a_diverged_model_is_finite_and_short():
    result = Evaluation(451_570.0, 10)
    assert json.loads(json.dumps(result.perplexity, allow_nan=False)) == perplexity(math.inf) == 1e100
    assert result.line(None) == "perplexity 1.00e+100, 451570.0000 nats, 10 tokens"
    assert shown(123_456.0) == "123456.00"


def test_the_line_of_an_evaluation_names_its_units():
    assert Evaluation(4.5, 10).line(None) == "perplexity 90.02, 4.5000 nats, 10 tokens"
    assert Evaluation(4.5, 1000).line(None, 7) == "perplexity 90.02, 4.5000 nats, 1,000 tokens, 7 of them <unk>"
    assert Evaluation(math.log(8), 1).bits == pytest.approx(3)
    assert "perplexity 8.00, 3.0000 bits per byte, " in Evaluation(math.log(8), 10).line("byte")
    assert dataclasses.asdict(Evaluation(1.0, 2)) == {"nats": 1.0, "tokens": 2}


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(nats):
    assert finite(Evaluation(1.0, 10)) == Evaluation(1.0, 10)
    with pytest.raises(DivergedError, match=f"the loss on this text is {nats}: .* not finite"):
        finite(Evaluation(nats, 10))
