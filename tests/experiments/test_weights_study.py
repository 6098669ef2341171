"""The study of weights: what a model of words remembers."""

import dataclasses
import json

import numpy as np
import pytest

from ranjax.data.vocabulary import Words
from ranjax.errors import UserError
from ranjax.interpret.memory import Memory
from ranjax.training.run import train


def test_what_a_model_of_words_remembers_is_measured(script, pets, tmp_path):
    (tmp_path / "text").mkdir()
    for split, times in (("train", 200), ("valid", 400), ("test", 20)):
        text = "the cat sat on the mat\nthe dog sat on the log of a dog\n"
        (tmp_path / "text" / f"{split}.txt").write_text(text * times)
    config = dataclasses.replace(pets, dataset=str(tmp_path / "text"), out=str(tmp_path / "run"))
    train(config)
    weights = script("weights")
    sizes = {"contexts": 3, "length": 5, "most": 16, "passage": 0}
    weights.main(weights.Options(config.out, out=str(tmp_path / "out"), **sizes))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "half-lives.png", "layer-1.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["passage"].startswith("the cat sat on the mat")
    assert results["attribution"]["largest_completeness_error"]["shares"] < 1e-4
    assert {row["rule"] for row in results["attribution"]["rank_correlation"]} == {
        "shares", "integrated_gradients", "weights of layer 1, l2", "nearness"
    }  # fmt: skip


def test_results_have_the_keys_of_the_recorded_file(script, pets, tmp_path):
    """And its half-lives the same quantiles."""
    weights = script("weights")
    saved = json.loads((weights.HERE / "results.json").read_text("utf-8"))
    layer = Memory(np.ones((4, 1), int), np.array([3, 1, 5]))
    assert saved["half_lives"][0].keys() == weights.half_lives(layer).keys()
    assert saved["components_of_half_life"][0].keys() == weights.components_of_half_life(layer).keys()


def test_what_the_study_cannot_use_is_refused_before_anything_is_written(script, pets, tmp_path):
    characters, words, others = (
        dataclasses.replace(pets, tokenizer=tokenizer, cell=cell, out=str(tmp_path / f"{tokenizer}-{cell}"))
        for tokenizer, cell in (("character", "ran"), ("word", "ran"), ("word", "lstm"))
    )
    for run in (characters, words, others):
        train(run)
    weights, out = script("weights"), tmp_path / "out"
    for run, options, message in (
        (characters, {}, "must be a RAN on words; got one of --cell ran with --tokenizer character"),
        (others, {}, "must be a RAN on words; got one of --cell lstm"),
        (characters, {"most": 0}, "--most must be a whole"),
        (words, {"passage": 0}, r"--contexts \+ --length must be below \d+, the tokens for validation; got 250"),
    ):
        with pytest.raises(UserError, match=message):
            weights.main(weights.Options(run.out, out=str(out), **options))
    assert not out.exists()


def test_spans_of_ranks_that_a_vocabulary_does_not_have_are_left_out(script):
    measures = script("weights", "measures")
    words, text = Words(("<eos>", "a", "b")), np.array([1, 2, 1, 0])
    layer = Memory(np.ones((4, 1), int), np.array([3, 1, 5]))
    rows = measures.by_frequency(layer, text, text, words)
    assert [(row["ranks"], row["tokens"], row["mean"]) for row in rows] == [("1 to 10", 3, 3.0)]
