"""Explanations: shares of the model's own logits, sources and half-lives of all weights, memory of the device."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from pets_run import PETS, pets_run

from ranjax import weights
from ranjax.data.vocabulary import Characters
from ranjax.errors import UserError
from ranjax.interpret import explanation
from ranjax.interpret.attribution import decompositions
from ranjax.lm import LanguageModel


@pytest.fixture(scope="module")
def run():
    return pets_run()


def characters_run(alphabet, **options):
    model = LanguageModel(len(alphabet), features=4, layers=1, **options)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32), deterministic=True)["params"]
    return SimpleNamespace(model=model, params=params, vocabulary=Characters(alphabet))


def test_predictions_have_the_logits_and_probabilities_of_the_model(run):
    found = explanation.explain(run, PETS)
    logits, _ = run.model.apply({"params": run.params}, run.vocabulary.encode(PETS)[None], deterministic=True)
    probabilities = jax.nn.softmax(logits[0, -1])
    assert len(found.predictions) == explanation.PREDICTIONS
    for prediction in found.predictions:
        token = next(i for i in range(len(run.vocabulary)) if explanation.piece(run.vocabulary, i) == prediction.word)
        assert prediction.logit == pytest.approx(float(logits[0, -1, token]), abs=1e-5)
        assert prediction.probability == pytest.approx(float(probabilities[token]), abs=1e-6)


def test_sources_are_the_largest_pairs_without_the_step_itself(run):
    found, time = explanation.explain(run, PETS), len(run.vocabulary.encode(PETS))
    layer = found.layers[0]
    assert layer.pairs.shape == (time, time)
    assert not np.any(layer.sources == np.arange(time)[:, None])
    np.testing.assert_allclose(layer.weights[-1], np.sort(layer.pairs[-1, :-1])[::-1][:3], rtol=1e-5)


def test_half_lives_and_spans_are_those_of_all_weights(run):
    text = "the cat sat on the mat\nthe dog sat\n"
    ids = run.vocabulary.encode(text)
    for reduce in ("l2", "contribution"):
        layer, _ = explanation.explain(run, text, reduce=reduce).layers
        parts, _ = decompositions(run.model, run.params, ids)
        pairs, w, time = np.array(weights.reduced(parts, reduce)), np.array(weights.full(parts)), len(ids)

        def until(kept, half, most):
            return min(next((n for n in range(1, len(kept)) if kept[n] <= half), most), most)

        np.testing.assert_allclose(layer.pairs, pairs, rtol=1e-5)
        np.testing.assert_allclose(layer.own, np.diag(pairs), rtol=1e-5)
        assert layer.lasting.tolist() == [until(pairs[j:, j], pairs[j, j] / 2, time) for j in range(time)]
        horizon = time // 2 + 1
        lives = [[until(w[j:, j, k], w[j, j, k] / 2, horizon) for j in range(time - horizon + 1)] for k in range(8)]
        assert layer.half_lives.tolist() == [sorted(of)[(len(of) - 1) // 2] for of in lives]


def test_a_text_of_one_token_has_no_earlier_sources():
    found = explanation.explain(characters_run("ab"), "a")
    assert found.words == ["a"]
    assert found.layers[0].sources.shape == (1, 0)


def test_a_vocabulary_of_two_has_two_predictions():
    found = explanation.explain(characters_run("ab"), "abba")
    assert sorted(prediction.word for prediction in found.predictions) == ["a", "b"]


def test_pairs_are_kept_up_to_the_length_that_is_drawn(monkeypatch):
    monkeypatch.setattr(explanation, "DRAWN", 3)
    for text, kept in (("aba", True), ("abba", False)):
        (layer,) = explanation.explain(characters_run("ab"), text).layers
        assert (layer.pairs is not None) == kept


def test_a_model_of_another_cell_raises():
    with pytest.raises(UserError, match="'lstm', whose states are not weighted sums"):
        explanation.explain(characters_run("ab", cell="lstm"), "ab")


def test_a_text_that_does_not_fit_the_vocabulary_raises():
    run = characters_run("ab")
    with pytest.raises(UserError, match="the text is empty"):
        explanation.explain(run, "")
    with pytest.raises(UserError, match=r"the text does not fit the model: .* not the characters 'c'"):
        explanation.explain(run, "abc")


def test_tokens_are_displayed_with_symbols_for_what_cannot_be_printed():
    assert [explanation.piece(Characters("\t\n\x1ba"), n) for n in range(4)] == ["⇥", "⏎", "\\x1b", "a"]
    assert explanation.visible("  ") == "␠␠"


def test_half_lives_of_a_long_text_are_followed_for_the_horizon():
    assert explanation._horizon(5000) == explanation.HORIZON < 2500


def gpu(stats):
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


def test_a_text_that_needs_more_than_the_free_memory_raises():
    needed = SimpleNamespace(temp_size_in_bytes=60_000, output_size_in_bytes=40_000)
    device = gpu({"bytes_limit": 100_000, "bytes_in_use": 0})
    explanation._check_memory(needed, device, 5)
    explanation._check_memory(needed, gpu(None), 5)  # not known
    needed.output_size_in_bytes += 1
    with pytest.raises(UserError, match="a text of 5 tokens takes"):
        explanation._check_memory(needed, device, 5)


def test_the_memory_is_that_of_the_device_with_the_parameters(monkeypatch):
    asked = []
    monkeypatch.setattr(explanation, "free_memory", asked.append)
    run = characters_run("ab")
    for device in jax.devices()[:2]:
        run.params = jax.device_put(run.params, device)
        explanation.explain(run, "abba")
    assert asked == jax.devices()[:2]


def test_explains_where_jit_is_disabled():
    """Without a comparison of memory, since nothing is compiled."""
    expected = explanation.explain(characters_run("abc"), "abba")
    with jax.disable_jit():
        found = explanation.explain(characters_run("abc"), "abba")
    np.testing.assert_allclose(found.layers[0].own, expected.layers[0].own, rtol=1e-5)


def test_explains_under_strict_promotion_of_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        assert explanation.explain(characters_run("abc"), "abba").words == ["a", "b", "b", "a"]
