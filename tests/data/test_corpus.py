"""Corpora by name or path, their splits, and training streams."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranjax import data
from ranjax.data import columns, load_corpus, load_split, windows_per_epoch
from ranjax.data.files import SPLITS
from ranjax.data.vocabulary import BytePairs, Bytes, Characters, Words
from ranjax.errors import UserError

TEXT = "the cat sat on the mat\n\nthe dog sat on the log é\n" * 40


@pytest.fixture
def folder(tmp_path):
    """A directory of one's own text, one split in each kind of file."""
    from datasets import Dataset

    (tmp_path / "my.train.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "my.valid.tokens").write_text("the cat sat\non the zebra", "utf-8")
    Dataset.from_dict({"text": ["the dog", "", "sat\n"]}).to_parquet(tmp_path / "my.test.parquet")
    return tmp_path


def test_a_directory_is_read_as_words(folder):
    corpus = load_corpus(str(folder))
    words = corpus.vocabulary
    assert words.decode(corpus.train) == TEXT
    assert words.decode(corpus.valid) == "the cat sat\non the <unk>\n"  # the last line is a line too
    assert words.decode(corpus.test) == "the dog\n\nsat\n"
    assert corpus.train.dtype == np.int32
    assert sorted(set(corpus.train.tolist())) == [i for i in range(len(words)) if words.tokens[i] != "<unk>"]


def test_rare_words_are_unknown_in_train_too(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a a b b once\n")
    corpus = load_corpus(str(tmp_path))
    assert corpus.vocabulary.decode(corpus.train) == "a a b b <unk>\n"


@pytest.mark.parametrize("tokenizer", ["character", "byte", "bpe"])
def test_a_single_file_is_split_and_decodes_to_itself(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text(TEXT, "utf-8")
    corpus = load_corpus(str(tmp_path / "one.txt"), tokenizer=tokenizer)
    parts = corpus.train, corpus.valid, corpus.test
    assert "".join(map(corpus.vocabulary.decode, parts)) == TEXT
    assert 0 <= min(map(np.min, parts)) <= max(map(np.max, parts)) < len(corpus.vocabulary)
    if tokenizer != "bpe":
        assert len(corpus.train) == pytest.approx(0.9 * sum(map(len, parts)), abs=2)
        assert set(np.concatenate(parts).tolist()) == set(range(len(corpus.vocabulary)))


def test_characters_are_the_default_of_a_file(tmp_path):
    (tmp_path / "one.txt").write_text(TEXT, "utf-8")
    assert load_corpus(str(tmp_path / "one.txt")).vocabulary == Characters.build(TEXT)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_be_a_string_or_a_path(tmp_path, kind):
    (tmp_path / "a.txt").write_text("abc " * 100)
    corpus = load_corpus(kind(tmp_path / "a.txt"))
    np.testing.assert_array_equal(load_split(kind(tmp_path / "a.txt"), "train", corpus.vocabulary), corpus.train)


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("abc " * 100)
    assert load_corpus("~/a.txt").source == str(tmp_path / "a.txt")
    with pytest.raises(UserError, match=f"{tmp_path} is not ptb as published"):
        load_corpus("ptb", "~")


def test_another_text_under_the_name_of_a_closed_data_set_is_called_that(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split} has a word of its own\n")
    with pytest.raises(UserError, match=f"{tmp_path} is not wikitext-2 as published: the valid split of .* 'valid'"):
        load_corpus("wikitext-2", tmp_path)


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"abc " * 100)
    sizes = [len(load_corpus(str(tmp_path / "a.txt"), tokenizer=name).vocabulary) for name in ("character", "byte")]
    assert sizes == [4, 7]  # to bytes it is three like any others


def test_the_alphabet_of_bytes_is_that_of_all_splits(tmp_path):
    for split, content in (("train", "aab"), ("valid", "abc"), ("test", "abd")):
        (tmp_path / f"{split}.txt").write_text(content)
    assert len(load_corpus(str(tmp_path), tokenizer="byte").vocabulary) == 4


def test_each_split_has_its_own_text(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"a {split} b\n" * 20)
    corpus = load_corpus(str(tmp_path), tokenizer="character")
    for split in SPLITS:
        assert split in corpus.vocabulary.decode(getattr(corpus, split))
        np.testing.assert_array_equal(load_split(str(tmp_path), split, corpus.vocabulary), getattr(corpus, split))
    assert load_corpus(str(tmp_path), tokenizer="bpe").vocabulary == BytePairs.build("a train b\n" * 20)


def test_a_split_is_read_with_another_vocabulary(folder):
    ids = load_split(str(folder), "test", Words(("<eos>", "<unk>", "dog")))
    np.testing.assert_array_equal(ids, [1, 2, 0, 0, 1, 0])
    with pytest.raises(UserError, match="no <unk> and not the words 'sat', 'the'"):
        load_split(str(folder), "test", Words(("<eos>", "dog")))
    with pytest.raises(UserError, match="not the characters"):
        load_split(str(folder), "test", Characters("abc"))
    with pytest.raises(UserError, match="not the bytes 10, 32, 97, 100, 101, 103, 104, 111, 115, 116"):
        load_split(str(folder), "test", Bytes((0, 200)))
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'valid', 'test'; got 'validation'"):
        load_split(str(folder), "validation", Characters("abc"))


@pytest.mark.parametrize(
    ("files", "name", "options", "message"),
    [
        ({}, "no-such-thing", {}, "no data set or path 'no-such-thing'. Known names: python-docs, markov, wikitext-2"),
        ({}, "word " * 100, {}, "no data set or path 'word word"),
        ({}, "", {}, "no data set or path ''"),
        ({}, "ptb", {}, "ptb is read from local files only.* --data-dir DIR"),
        ({}, "ptb", {"data_dir": "nowhere"}, "--data-dir .*nowhere is not a directory"),
        ({}, "recall-99999999999", {}, "the distance of the task recall must be 2 to 2048; got 'recall-99999999999'"),
        ({}, "recall-\u0663", {}, "no data set or path"),
        ({}, "recall-" + "9" * 5000, {}, "no data set or path"),
        ({}, "markov", {"tokenizer": "words"}, "`tokenizer` must be one of word, character, byte, bpe; got 'words'"),
        ({"a.txt": b""}, "a.txt", {}, "the train split of .*a.txt is empty"),
        ({"a.txt": b" \n" * 100}, "a.txt", {}, "the train split of .*a.txt is empty"),
        ({"a.txt": b"abc"}, "a.txt", {}, "the valid split of .*a.txt is empty"),
        ({"a.txt": b"\x80\x81\x82" * 100}, "a.txt", {}, "the train split of .*a.txt is not UTF-8 text: byte 0x80"),
        ({"a.txt": b"caf\xe9 au lait" * 20}, "a.txt", {}, "not UTF-8 text: byte 0xe9 at position 3.*--tokenizer byte"),
        (
            {"a.txt": ("the cat\n" * 90).encode("utf-16-le")},
            "a.txt",
            {},
            r"not UTF-8 text: byte 0x00 at position 1\. .*utf-16le",
        ),
        (
            {"a.txt": "\u0434\u0430 ".encode("utf-16-le") * 90},
            "a.txt",
            {"tokenizer": "bpe"},
            "not UTF-8 text: byte 0x00",
        ),
        ({}, "markov", {"data_dir": "nowhere"}, "--data-dir nowhere is not a directory"),
        ({}, "ptb", {"data_dir": 5}, "`data_dir` must be a path; got 5"),
        (
            {"d/train.txt": b"a b\n", "d/valid.txt": b"a\n", "d/test.txt": b"b"},
            "d",
            {"tokenizer": "character"},
            "the test split of d must have at least 2 tokens, .* got 1",
        ),
        (
            {f"ptb/ptb.{split}.txt": b"a b\n" for split in ("train", "valid", "test")},
            "ptb",
            {"data_dir": "."},
            r"is not ptb as published: expected \(929589, .* got \(3, 3, 3, 3\)",
        ),
    ],
)
def test_bad_input_is_named(files, name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(name, **options)


@pytest.mark.data
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "totals"),
    [("wikitext-2", (2_088_628, 217_646, 245_569, 33_278)), ("ptb", (929_589, 73_760, 82_430, 10_000))],
)
def test_known_data_sets_have_the_published_totals(real_data, name, totals, inside):
    corpus = load_corpus(name, real_data / name if inside else real_data)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test), len(corpus.vocabulary)) == totals
    assert set(np.unique(corpus.train)) == set(range(totals[-1]))


@pytest.mark.data
def test_raw_text_keeps_only_words_seen_twice(real_data, tmp_path):
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for split, source in (("train", "test"), ("valid", "valid"), ("test", "test")):
        (folder / f"wiki.{split}.raw").write_bytes((real_data / "wikitext-2-raw" / f"wiki.{source}.raw").read_bytes())
    corpus = load_corpus("wikitext-2-raw", tmp_path)
    assert (len(corpus.valid), len(corpus.test)) == (217_646, 245_569)
    assert "<unk>" in corpus.vocabulary.tokens


@pytest.mark.data
def test_text8_is_split_90_5_5_over_27_characters(real_data):
    corpus = load_corpus("text8", real_data)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (9_000_000, 500_000, 500_000)
    assert corpus.vocabulary == Characters(" abcdefghijklmnopqrstuvwxyz")


COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


def on_the_hub(texts, commit=None):
    """A data set of the hub, of whose splits these are the rows."""
    import datasets

    rows = {split: datasets.Dataset.from_dict({"text": lines}) for split, lines in texts.items()}
    if commit is not None:
        rows["train"].info.download_checksums = {f"hf://datasets/a/b@{commit}/c.parquet": {"num_bytes": 1}}
    return datasets.DatasetDict(rows)


def test_rows_of_the_hub_are_lines(monkeypatch):
    import datasets

    titles = {"train": "A B C", "validation": "B", "test": "C"}
    hub, asked = on_the_hub({split: ["", f" = {t} = \n", "", "b \n"] for split, t in titles.items()}, COMMIT), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what, **how: asked.append((*what, how)) or hub)
    names = ("wikitext-103", "wikitext-2-raw", "wikitext-103-raw", "wikitext-2")
    for name in names:
        monkeypatch.setitem(data.KNOWN, name, replace(data.KNOWN[name], totals=(None,) * 4))
    corpus = load_corpus("wikitext-103")
    for split, title in zip((corpus.train, corpus.valid, corpus.test), titles.values(), strict=True):
        assert corpus.vocabulary.decode(split) == f"\n= {title} =\n\nb\n"
    for name in ("wikitext-2-raw", "wikitext-103-raw"):
        assert "<unk>" in load_corpus(name).vocabulary.tokens  # not closed: rare words are there
    load_corpus("wikitext-2")
    assert asked == [("Salesforce/wikitext", f"{name}-v1", {"revision": COMMIT}) for name in names]


def test_the_source_of_a_text_of_the_hub_has_the_revision_it_was_built_from(monkeypatch):
    import datasets

    texts, built = {"train": ["ab" * 50], "validation": ["ba"], "test": ["aa"]}, "0123456789" * 4
    monkeypatch.setitem(data.KNOWN, "text8", replace(data.KNOWN["text8"], totals=(100, 2, 2, 2)))
    for commit, expected in ((built, f"afmck/text8@{built}"), (None, "afmck/text8@main")):
        hub = on_the_hub(texts, commit)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, hub=hub, **how: hub)
        assert load_corpus("text8").source == expected


@pytest.mark.parametrize("name", [name for name, known in data.KNOWN.items() if known.hub])
def test_a_text_of_the_hub_must_have_the_published_totals(name, monkeypatch):
    import datasets

    hub = on_the_hub({"train": ["ab ba " * 50], "validation": ["ba"], "test": ["ab ba"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **how: hub)
    with pytest.raises(UserError, match=rf"{data.KNOWN[name].hub[0]}@\w+ is not {name} as published: expected \("):
        load_corpus(name)
    assert len(load_corpus(name, tokenizer="byte").train)  # the totals are those of the usual tokens


def test_text8_of_the_hub_is_one_row(monkeypatch):
    import datasets

    hub = on_the_hub({"train": ["ab" * 50], "validation": ["ba"], "test": ["aa"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked, **how: {("afmck/text8", "default"): hub}[asked])
    monkeypatch.setitem(data.KNOWN, "text8", replace(data.KNOWN["text8"], totals=(100, 2, 2, 3)))
    with pytest.raises(UserError, match="not text8 as published"):
        load_corpus("text8")
    monkeypatch.setitem(data.KNOWN, "text8", replace(data.KNOWN["text8"], totals=(100, 2, 2, 2)))
    corpus = load_corpus("text8")
    assert corpus.vocabulary == Characters("ab")  # no line ends a text of one row
    ids = load_corpus("text8", tokenizer="byte").train
    assert "".join(chr(97 + i) for i in ids) == "ab" * 50


@pytest.mark.data
def test_the_raw_text_has_the_published_totals_of_valid_and_test(real_data):
    totals = data.KNOWN["wikitext-2-raw"].totals
    for n, split in ((1, "valid"), (2, "test")):
        ids = load_split("wikitext-2-raw", split, Words(("<eos>", "<unk>")), real_data)
        assert len(ids) == totals[n] == data.KNOWN["wikitext-2"].totals[n]


def test_the_tokenizer_follows_from_the_data_set_and_not_from_a_directory_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ranjax.data.builtin", "markov-3", "afmck", "Salesforce"):
        (tmp_path / name).mkdir()
    assert load_corpus("markov-3").vocabulary.tokenizer == "character"


def test_a_pipe_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match=f"{name} is a pipe or a device, and a text is read more than once"):
            load_corpus(name)


def test_a_single_text_may_be_read_whole(tmp_path):
    (tmp_path / "one.txt").write_text("abc" * 40)
    assert data.split_of(tmp_path / "one.txt") == "whole"
    assert len(load_split(tmp_path / "one.txt", "whole", Characters("abc"))) == 120
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("abc")
    assert data.split_of(tmp_path) == data.split_of("markov") == "test"
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'valid', 'test'; got 'whole'"):
        load_split(tmp_path, "whole", Characters("abc"))


def test_columns_are_contiguous():
    text = columns(np.arange(25), batch_size=2, steps=3)
    np.testing.assert_array_equal(text, np.arange(24).reshape(2, 12))


def test_whole_windows_have_their_targets():
    assert [windows_per_epoch(length, 3) for length in (4, 6, 7, 9, 10)] == [1, 1, 2, 2, 3]


def test_a_split_shorter_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"the train split has 20 tokens, fewer than one batch of 4 x 5 .*\(24\)"):
        columns(np.arange(20), 4, 5)


@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (-1, 5), (4, 0), (4, -1), (4, 2.0)])
def test_a_layout_without_rows_or_steps_is_refused(batch, steps):
    with pytest.raises(ValueError, match=r"`(batch_size|steps)` must be a whole number, at least 1; got"):
        columns(np.arange(100), batch, steps)


def test_the_identity_of_a_text_depends_on_every_token():
    ids = np.arange(3000)
    assert data.identity(ids) != data.identity(np.append(ids[:-1], 0))
