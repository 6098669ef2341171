"""Vocabularies: text to ids and back, and how they are saved."""

import json

import numpy as np
import pytest

from ranjax.data.vocabulary import BytePairs, Bytes, Characters, Words, load_vocabulary, save_vocabulary, unknown
from ranjax.errors import UserError
from ranjax.saved import write_sealed

TEXT = "the cat sat on the mat\n\nthe dog sat on the log é\n" * 40


@pytest.mark.parametrize(
    "vocabulary", [Words.build(TEXT), Characters.build(TEXT), Bytes.build(TEXT.encode()), BytePairs.build(TEXT)]
)
def test_a_saved_vocabulary_encodes_as_before(vocabulary, tmp_path):
    save_vocabulary(vocabulary, tmp_path / "v.json")
    loaded = load_vocabulary(tmp_path / "v.json")
    assert loaded == vocabulary
    assert len(loaded) == len(vocabulary)
    np.testing.assert_array_equal(loaded.encode(TEXT), vocabulary.encode(TEXT))


@pytest.mark.parametrize(
    ("tokenizer", "content"),
    [
        *(("word", content) for content in ("a", [], [1], ["a", "a"])),
        *(("character", content) for content in ("", "ba", "aa")),
        *(("byte", content) for content in ([7, 256], [[]], [7, 7], [8, 7])),
        *(("bpe", content) for content in ([], "", "x", "{}", "[" * 10_000)),
        ("bpe", BytePairs.build("ab ab").content().replace('"merges":[', '"merges":[["a","nothing"],')),
        ("bpe", BytePairs.build("ab ab").content().replace('"ab":256', '"ab":1000')),
        ("bpe", BytePairs.build("ab ab").content().replace('"type":"BPE"', '"type":5')),
    ],
)
def test_a_damaged_vocabulary_is_named(tokenizer, content, tmp_path):
    write_sealed(tmp_path / "v.json", {"tokenizer": tokenizer, "content": content})
    with pytest.raises(UserError, match=f"v.json must hold what `{tokenizer}` reads; got .* Restore it"):
        load_vocabulary(tmp_path / "v.json")


@pytest.mark.parametrize("vocabulary", [Words.build(TEXT), BytePairs.build(TEXT)])
def test_a_vocabulary_with_a_flipped_bit_is_refused(vocabulary, tmp_path):
    path, rng = tmp_path / "v.json", np.random.default_rng(0)
    save_vocabulary(vocabulary, path)
    written, named = path.read_bytes(), []
    for _ in range(100):
        flipped = bytearray(written)
        flipped[rng.integers(len(written))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            assert load_vocabulary(path) == vocabulary
        except UserError as error:
            named.append(str(error))
    assert all(message.startswith(f"{path} is damaged: ") for message in named)
    assert len(named) > 50


def test_an_unknown_tokenizer_is_named(tmp_path):
    write_sealed(tmp_path / "v.json", {"tokenizer": "syllable", "content": ["a"]})
    with pytest.raises(UserError, match=r"v\.json names the tokenizer 'syllable'; expected one of word, character, "):
        load_vocabulary(tmp_path / "v.json")


def test_at_most_ten_missing_characters_are_named():
    with pytest.raises(UserError, match=r"not the characters '0', .*'9'\. Use"):
        Characters("a").encode("0123456789a")


def test_words_that_are_special_tokens_are_counted_with_them():
    assert Words.build("<eos> <eos> a a\n").tokens == ("<eos>", "a")
    assert Words.build("<unk> a a\n", at_least=2).tokens.count("<unk>") == 1


def test_byte_pairs_are_those_seen_twice():
    content = json.loads(BytePairs.build("ab ab\ncd\n").content())
    assert {"ab", "cd"} & content["model"]["vocab"].keys() == {"ab"}


def test_only_words_have_an_unknown_token():
    assert unknown(Words(("a", "<unk>")), np.array([1, 0, 1])) == 2
    assert unknown(Words(("a", "b")), np.array([1, 0, 1])) == 0
    assert unknown(Characters("ab"), np.array([1, 0, 1])) == 0
