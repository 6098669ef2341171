"""Corpora that need no network: Python's documentation, and tasks of known entropy."""

import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ranjax.data import builtin, load_corpus
from ranjax.data.builtin import MARKOV_NOISE, markov_entropy, markov_ids, task_answers
from ranjax.errors import UserError


def test_python_docs_are_of_this_python():
    corpus = load_corpus("python-docs")
    assert corpus.source.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")
    assert len(corpus.train) > 200_000
    assert min(len(corpus.valid), len(corpus.test)) > 10_000
    assert "iterable" in corpus.vocabulary.decode(corpus.train)
    topics = builtin._topics(Path(os.__file__).parent / "pydoc_data" / "topics.py")
    assert len(topics) > 50
    assert topics[-1] in "".join(text.decode() for text in builtin.python_docs()[1])
    assert corpus.train.max() < len(corpus.vocabulary) == 4096


def test_no_text_of_the_docs_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(builtin, "_sources", lambda _: [None])
    monkeypatch.setattr(builtin, "_topics", lambda _: [])
    monkeypatch.setattr(builtin, "_docstrings", lambda _: [f"text {n % 180}" for n in range(200)])
    parts = [text.decode().strip().split("\n\n") for text in builtin.python_docs()[1]]
    assert list(map(len, parts)) == [162, 9, 9]
    assert len(set().union(*parts)) == 180
    monkeypatch.setattr(builtin, "_docstrings", lambda _: [f"text {n}" for n in range(99)])
    with pytest.raises(UserError, match="carries no sources to read"):
        builtin.python_docs()


def test_a_link_to_nothing_in_the_library_has_no_docstrings(tmp_path):
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "gone.py")
    assert not list(builtin._docstrings(tmp_path / "sitecustomize.py"))


def _entropy(counts):
    p = np.array(list(counts.values())) / counts.total()
    return float(-(p * np.log(p)).sum())


def test_the_markov_source_has_the_stated_entropy():
    ids = markov_ids(400_000, seed=3)
    assert sum(MARKOV_NOISE) == pytest.approx(1)
    unigram = _entropy(Counter(ids.tolist()))
    bigram = _entropy(Counter(zip(ids[1:].tolist(), ids[:-1].tolist()))) - unigram
    trigram = _entropy(Counter(zip(ids[2:].tolist(), ids[1:-1].tolist(), ids[:-2].tolist()))) - unigram - bigram
    assert trigram == pytest.approx(markov_entropy(), rel=0.003)
    assert unigram > 1.3 * markov_entropy()
    assert bigram > 1.3 * markov_entropy()  # so one symbol of context does not do


def test_a_markov_source_of_higher_order_has_the_stated_noise():
    ids = markov_ids(1000, seed=0, order=7)
    noise = (ids[7:] - ids[6:-1] - 3 * ids[:-7]) % 8
    assert np.mean(noise == 0) == pytest.approx(MARKOV_NOISE[0], abs=0.05)
    with pytest.raises(UserError, match="`order` must be at least 2; got 1"):
        markov_ids(5, seed=0, order=1)


def test_the_order_of_a_markov_source_is_that_of_its_name():
    corpus = load_corpus("markov-7")
    np.testing.assert_array_equal(corpus.train[:1000], markov_ids(400_000, seed=0, order=7)[:1000])
    np.testing.assert_array_equal(load_corpus("markov").test, load_corpus("markov-2").test)
    assert not task_answers("0123").any()


@pytest.mark.parametrize(("task", "copied"), [("copy-9", 8), ("copy-100", 8), ("recall-2", 1), ("recall-33", 1)])
def test_answers_repeat_the_letters_one_distance_back(task, copied):
    corpus, distance = load_corpus(task), int(task.split("-")[1])
    text = corpus.vocabulary.decode(corpus.train)
    answers = task_answers(text)
    assert len(text) == 20_000 * (1 + distance + copied)
    at = np.flatnonzero(answers)
    assert len(at) == copied * text.count("?") == copied * text.count("!")
    letters = np.array(list(text))
    np.testing.assert_array_equal(letters[at], letters[at - distance])
    counts = Counter(letters[at].tolist())
    assert sorted(counts) == list("abcdefgh")
    assert _entropy(counts) == pytest.approx(math.log(8), rel=0.01)  # no other letters predict them
    assert re.fullmatch(
        r"(![a-h]{8}\.*\?[a-h]{8})+" if copied > 1 else r"(![a-h]+\?[a-h])+", text[: 50 * (1 + distance + copied)]
    )
    assert text[:1000] != corpus.vocabulary.decode(corpus.test)[:1000]


def test_the_splits_of_a_task_are_drawn_apart():
    for name in ("markov", "copy-9", "recall-2"):
        corpus = load_corpus(name)
        assert len({split[:1000].tobytes() for split in (corpus.train, corpus.valid, corpus.test)}) == 3
        assert len(corpus.valid) == len(corpus.test) == {"markov": 20_000, "copy-9": 18_000, "recall-2": 4_000}[name]
