"""Corpora, vocabularies and their errors."""

import gzip
import http.server
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranjax import data, embedded, sources
from ranjax.data import columns, load_corpus, load_split, windows_per_epoch
from ranjax.data.builtin import MARKOV_NOISE, markov_entropy, markov_ids, task_answers
from ranjax.errors import UserError
from ranjax.data.files import SPLITS, path_texts, split_text
from ranjax.data.vocabulary import BytePairs, Bytes, Characters, Words, load_vocabulary, save_vocabulary

TEXT = "the cat sat on the mat\n\nthe dog sat on the log é\n" * 40


@pytest.fixture
def folder(tmp_path):
    """A directory of one's own text, one split in each kind of file."""
    from datasets import Dataset

    (tmp_path / "my.train.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "my.valid.tokens").write_text("the cat sat\non the zebra", "utf-8")
    Dataset.from_dict({"text": ["the dog", "", "sat\n"]}).to_parquet(tmp_path / "my.test.parquet")
    return tmp_path


def test_a_directory_of_words(folder):
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
def test_a_single_file_comes_back(tmp_path, tokenizer):
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


@pytest.mark.parametrize("character", ["é", "😀"])
def test_no_character_is_cut_in_two(character):
    text = character * 107  # a share ends after the first byte of one
    parts = split_text(text.encode())
    assert "".join(part.decode() for part in parts) == text


@pytest.mark.parametrize(
    "vocabulary", [Words.build(TEXT), Characters.build(TEXT), Bytes.build(TEXT.encode()), BytePairs.build(TEXT)]
)
def test_vocabularies_are_saved(vocabulary, tmp_path):
    save_vocabulary(vocabulary, tmp_path / "v.json")
    loaded = load_vocabulary(tmp_path / "v.json")
    assert loaded == vocabulary
    assert len(loaded) == len(vocabulary)
    np.testing.assert_array_equal(loaded.encode(TEXT), vocabulary.encode(TEXT))


@pytest.mark.parametrize(
    ("tokenizer", "content"),
    [
        *(("word", content) for content in (5, [], [1], ["a", "a"])),
        *(("character", content) for content in ("", "ba", "aa")),
        *(("byte", content) for content in ([7, 256], [[]], [7, 7], [8, 7])),
        *(("bpe", content) for content in (None, "", "x", "{}")),
    ],
)
def test_a_damaged_vocabulary_is_named(tokenizer, content, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"tokenizer": tokenizer, "content": content}))
    with pytest.raises(UserError, match=f"v.json must hold what `{tokenizer}` reads; got .* Restore it"):
        load_vocabulary(tmp_path / "v.json")


def test_python_docs_are_of_this_python():
    corpus = load_corpus("python-docs")
    assert corpus.source.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor}.")
    assert len(corpus.train) > 200_000
    assert min(len(corpus.valid), len(corpus.test)) > 10_000
    assert "iterable" in corpus.vocabulary.decode(corpus.train)
    topics = embedded._topics(Path(os.__file__).parent / "pydoc_data" / "topics.py")
    assert len(topics) > 50
    assert topics[-1] in "".join(text.decode() for text in embedded.python_docs()[1])
    assert corpus.train.max() < len(corpus.vocabulary) == 4096


def test_markov_has_the_entropy_it_says():
    ids = markov_ids(400_000, seed=3)
    assert sum(MARKOV_NOISE) == pytest.approx(1)
    unigram = _entropy(Counter(ids.tolist()))
    bigram = _entropy(Counter(zip(ids[1:].tolist(), ids[:-1].tolist()))) - unigram
    trigram = _entropy(Counter(zip(ids[2:].tolist(), ids[1:-1].tolist(), ids[:-2].tolist()))) - unigram - bigram
    assert trigram == pytest.approx(markov_entropy(), rel=0.003)
    assert unigram > 1.3 * markov_entropy()
    assert bigram > 1.3 * markov_entropy()  # so one symbol of context does not do


def _entropy(counts):
    p = np.array(list(counts.values())) / counts.total()
    return float(-(p * np.log(p)).sum())


def test_markov_of_a_higher_order():
    ids = markov_ids(1000, seed=0, order=7)
    noise = (ids[7:] - ids[6:-1] - 3 * ids[:-7]) % 8
    assert np.mean(noise == 0) == pytest.approx(MARKOV_NOISE[0], abs=0.05)
    with pytest.raises(UserError, match="`order` must be at least 2; got 1"):
        markov_ids(5, seed=0, order=1)


@pytest.mark.parametrize(("task", "copied"), [("copy-9", 8), ("copy-100", 8), ("recall-2", 1), ("recall-33", 1)])
def test_answers_repeat_what_lies_so_far_back(task, copied):
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
    assert _entropy(counts) == pytest.approx(math.log(8), rel=0.01)  # nothing else tells them
    assert re.fullmatch(
        r"(![a-h]{8}\.*\?[a-h]{8})+" if copied > 1 else r"(![a-h]+\?[a-h])+", text[: 50 * (1 + distance + copied)]
    )
    assert text[:1000] != corpus.vocabulary.decode(corpus.test)[:1000]


def test_markov_reaches_back_as_far_as_its_name_says():
    corpus = load_corpus("markov-7")
    np.testing.assert_array_equal(corpus.train[:1000], markov_ids(400_000, seed=0, order=7)[:1000])
    np.testing.assert_array_equal(load_corpus("markov").test, load_corpus("markov-2").test)
    assert not task_answers("0123").any()


def test_columns_are_contiguous():
    text = columns(np.arange(25), batch_size=2, steps=3)
    np.testing.assert_array_equal(text, np.arange(24).reshape(2, 12))


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


def test_ten_of_what_is_missing_are_named():
    with pytest.raises(UserError, match=r"not the characters '0', .*'9'\. Use"):
        Characters("a").encode("0123456789a")


def test_words_of_special_tokens_are_counted_with_them():
    assert Words.build("<eos> <eos> a a\n").tokens == ("<eos>", "a")
    assert Words.build("<unk> a a\n", at_least=2).tokens.count("<unk>") == 1


def test_byte_pairs_are_of_what_is_seen_twice():
    content = json.loads(BytePairs.build("ab ab\ncd\n").content())
    assert {"ab", "cd"} & content["model"]["vocab"].keys() == {"ab"}


@pytest.mark.data
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("name", "totals"),
    [("wikitext-2", (2_088_628, 217_646, 245_569, 33_278)), ("ptb", (929_589, 73_760, 82_430, 10_000))],
)
def test_known_totals(real_data, name, totals, inside):
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
def test_text8(real_data):
    corpus = load_corpus("text8", real_data)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (9_000_000, 500_000, 500_000)
    assert corpus.vocabulary == Characters(" abcdefghijklmnopqrstuvwxyz")


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_of_either_kind(tmp_path, kind):
    (tmp_path / "a.txt").write_text("abc " * 100)
    corpus = load_corpus(kind(tmp_path / "a.txt"))
    np.testing.assert_array_equal(load_split(kind(tmp_path / "a.txt"), "train", corpus.vocabulary), corpus.train)


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("abc " * 100)
    assert load_corpus("~/a.txt").source == str(tmp_path / "a.txt")
    with pytest.raises(UserError, match=f"{tmp_path} is not ptb as published"):
        load_corpus("ptb", "~")


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"abc " * 100)
    sizes = [len(load_corpus(str(tmp_path / "a.txt"), tokenizer=name).vocabulary) for name in ("character", "byte")]
    assert sizes == [4, 7]  # to bytes it is three like any others


@pytest.mark.parametrize(
    ("files", "name", "options", "message"),
    [
        ({}, "no-such-thing", {}, "no data set or path 'no-such-thing'. Known names: python-docs, markov, wikitext-2"),
        ({}, "ptb", {}, "ptb is read from local files only.* --data-dir DIR"),
        ({}, "ptb", {"data_dir": "nowhere"}, "--data-dir .*nowhere is not a directory"),
        ({}, "recall-99999999999", {}, "the distance of the task recall must be 2 to 2048; got 'recall-99999999999'"),
        ({}, "recall-\u0663", {}, "no data set or path"),
        ({}, "recall-" + "9" * 5000, {}, "no data set or path"),
        ({"a.txt": b" \n" * 100}, "a.txt", {}, "the train split of .*a.txt is empty"),
        (
            {f"d/{name}": b"a b\n" for name in ("train.txt", "train.raw", "valid.txt", "test.txt")},
            "d",
            {},
            "must hold one file each .* got train: train.raw, train.txt, valid: valid.txt",
        ),
        ({}, "markov", {"tokenizer": "words"}, "`tokenizer` must be one of word, character, byte, bpe; got 'words'"),
        ({"a.txt": b""}, "a.txt", {}, "the train split of .*a.txt is empty"),
        ({"a.txt": b"\x80\x81\x82" * 100}, "a.txt", {}, "the train split of .*a.txt is not UTF-8: byte 0x80"),
        ({"a.txt": b"caf\xe9 au lait" * 20}, "a.txt", {}, "not UTF-8: byte 0xe9 at position 3.*--tokenizer byte"),
        ({"d/enwik8.zip": b"PK" * 100}, "enwik8", {"data_dir": "d"}, "d/enwik8.zip is an archive; .* Unpack it first"),
        ({"a.tar.gz": gzip.compress(b"a" * 200)}, "a.tar.gz", {"tokenizer": "byte"}, "a.tar.gz is an archive"),
        ({"a.txt.gz": b"not packed"}, "a.txt.gz", {}, "a.txt.gz could not be read"),
        ({"a.txt": b"abc"}, "a.txt", {}, "the valid split of .*a.txt is empty"),
        (
            {"d/train.txt": b"a b\n", "d/valid.txt": b"a\n", "d/test.txt": b"b"},
            "d",
            {"tokenizer": "character"},
            "the test split of d must have at least 2 tokens, .* got 1",
        ),
        ({}, "word " * 100, {}, "no data set or path 'word word"),
        ({"a.txt": b"abc " * 100}, "", {}, "no data set or path ''"),
        ({"d/train.txt": b"a"}, "d", {}, "must hold one file each .* valid: none, test: none"),
        ({"a.txt.gz": gzip.compress(TEXT.encode())[:-20]}, "a.txt.gz", {}, "a.txt.gz could not be read"),
        ({"a.txt.gz": gzip.compress(TEXT.encode())[:12] + b"\xff" * 20}, "a.txt.gz", {}, "a.txt.gz could not be read"),
        ({"d/train.parquet": b"x", "d/valid.txt": b"a", "d/test.txt": b"a"}, "d", {}, "must be a parquet file"),
        (
            {f"ptb/ptb.{split}.txt": b"a b\n" for split in ("train", "valid", "test")},
            "ptb",
            {"data_dir": "."},
            r"is not ptb as published: expected \(929589, .* got \(3, 3, 3, 3\)",
        ),
    ],
)
def test_bad_input(files, name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        write(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        load_corpus(name, **options)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("text", r"the column `text` of .*train.parquet must be of strings; got int64"),
        ("words", r"train.parquet must have a column `text`; got words\.$"),
    ],
)
def test_a_parquet_file_without_a_column_of_text_is_refused(column, message, tmp_path):
    import pyarrow
    from pyarrow import parquet

    for split in ("train", "valid", "test"):
        parquet.write_table(pyarrow.table({column: [1, 2]}), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("damage", [slice(4, 30), slice(60, 90), slice(-8, -4)])
def test_a_damaged_parquet_file_is_named(damage, tmp_path):
    from pyarrow import parquet, table

    for split in SPLITS:
        parquet.write_table(
            table({"text": ["a b c"] * 500 + list(map(str, range(500)))}), tmp_path / f"{split}.parquet"
        )
    data = bytearray((tmp_path / "test.parquet").read_bytes())
    data[damage] = bytes(byte ^ 255 for byte in data[damage])
    (tmp_path / "test.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"test.parquet must be a parquet file: .*[^.]\.$"):
        load_corpus(str(tmp_path))


def test_long_strings_of_parquet_are_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for split in SPLITS:
        column = pyarrow.array(["a b", None, " c "], pyarrow.large_string())
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{split}.parquet")
    corpus = load_corpus(str(tmp_path), tokenizer="character")
    assert corpus.vocabulary.decode(corpus.train) == "a b\n\n c \n"


def test_names_of_files_may_be_in_capitals(tmp_path):
    (tmp_path / "TRAIN.TXT.GZ").write_bytes(gzip.compress(b"abc"))
    for name in ("Valid.TXT", "test.Tokens"):
        (tmp_path / name).write_bytes(b"abc")
    assert path_texts(tmp_path) == [b"abc"] * 3


def test_a_hub_out_of_reach(tmp_path):
    """A server that takes the connection and never answers; in a process of its own, as a user meets it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        code = "from ranjax.data import load_corpus; load_corpus('wikitext-2')"
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert time.monotonic() - began < 30
    assert re.search(r"UserError: wikitext-2 could not be loaded.*--data-dir.*HF_HUB_OFFLINE", done.stderr)


def test_a_hub_that_hangs_up(tmp_path):
    """It answers that it is there, and nothing more."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            if self.path == "/":
                self.send_response(200)
                self.end_headers()
            else:
                self.do_GET()

        def do_GET(self):
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        code = "from ranjax.data import load_corpus; load_corpus('wikitext-2')"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        hub.shutdown()
    assert re.search(r"UserError: wikitext-2 could not be loaded.*--data-dir.*HF_HUB_OFFLINE", done.stderr)


def test_rows_of_the_hub_are_lines(monkeypatch):
    import datasets

    titles = {"train": "A B C", "validation": "B", "test": "C"}
    hub = {split: datasets.Dataset.from_dict({"text": ["", f" = {t} = \n", "", "b \n"]}) for split, t in titles.items()}
    hub, asked = datasets.DatasetDict(hub), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what: asked.append(what) or hub)
    corpus = load_corpus("wikitext-103")
    for split, title in zip((corpus.train, corpus.valid, corpus.test), titles.values(), strict=True):
        assert corpus.vocabulary.decode(split) == f"\n= {title} =\n\nb\n"
    for name in ("wikitext-2-raw", "wikitext-103-raw"):
        assert "<unk>" in load_corpus(name).vocabulary.tokens  # not closed: rare words are there
    monkeypatch.setitem(data.KNOWN, "wikitext-2", replace(data.KNOWN["wikitext-2"], totals=None))
    load_corpus("wikitext-2")
    names = ("wikitext-103", "wikitext-2-raw", "wikitext-103-raw", "wikitext-2")
    assert asked == [("Salesforce/wikitext", f"{name}-v1") for name in names]


def test_text8_of_the_hub_is_all_of_it_or_nothing(monkeypatch):
    import datasets

    texts = {"train": "ab" * 50, "validation": "ba", "test": "aa"}
    hub = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [t]}) for split, t in texts.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *asked: {("afmck/text8", "default"): hub}[asked])
    with pytest.raises(UserError, match=r"afmck/text8 is not text8 as published: .* got \(100, 2, 2, 2\)"):
        load_corpus("text8")
    monkeypatch.setitem(data.KNOWN, "text8", replace(data.KNOWN["text8"], totals=(100, 2, 2, 3)))
    with pytest.raises(UserError, match="not text8 as published"):
        load_corpus("text8")
    assert len(load_corpus("text8", tokenizer="bpe").train)  # the totals are those of characters
    monkeypatch.setitem(data.KNOWN, "text8", replace(data.KNOWN["text8"], totals=(100, 2, 2, 2)))
    corpus = load_corpus("text8")
    assert corpus.vocabulary == Characters("ab")  # no line ends a text of one row
    ids = load_corpus("text8", tokenizer="byte").train
    assert "".join(chr(97 + i) for i in ids) == "ab" * 50


def test_a_split_shorter_than_a_batch():
    with pytest.raises(UserError, match=r"the train split has 20 tokens, fewer than one batch of 4 x 5 .*\(24\)"):
        columns(np.arange(20), 4, 5)


def test_a_link_to_nothing_in_the_library_has_no_docstrings(tmp_path):
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "gone.py")
    assert not list(embedded._docstrings(tmp_path / "sitecustomize.py"))


def test_each_split_is_its_own(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"a {split} b\n" * 20)
    corpus = load_corpus(str(tmp_path), tokenizer="character")
    for split in SPLITS:
        assert split in corpus.vocabulary.decode(getattr(corpus, split))
        np.testing.assert_array_equal(load_split(str(tmp_path), split, corpus.vocabulary), getattr(corpus, split))
    assert load_corpus(str(tmp_path), tokenizer="bpe").vocabulary == BytePairs.build("a train b\n" * 20)


def test_no_text_of_the_docs_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(embedded, "_sources", lambda _: [None])
    monkeypatch.setattr(embedded, "_topics", lambda _: [])
    monkeypatch.setattr(embedded, "_docstrings", lambda _: [f"text {n % 180}" for n in range(200)])
    parts = [text.decode().strip().split("\n\n") for text in embedded.python_docs()[1]]
    assert list(map(len, parts)) == [162, 9, 9]
    assert len(set().union(*parts)) == 180
    monkeypatch.setattr(embedded, "_docstrings", lambda _: [f"text {n}" for n in range(99)])
    with pytest.raises(UserError, match="carries no sources to read"):
        embedded.python_docs()


def test_texts_of_tasks_are_drawn_apart():
    for name in ("markov", "copy-9", "recall-2"):
        corpus = load_corpus(name)
        assert len({split[:1000].tobytes() for split in (corpus.train, corpus.valid, corpus.test)}) == 3
        assert len(corpus.valid) == len(corpus.test) == {"markov": 20_000, "copy-9": 18_000, "recall-2": 4_000}[name]


def test_a_text_is_known_by_all_of_it():
    ids = np.arange(3000)
    assert data.identity(ids) != data.identity(np.append(ids[:-1], 0))


def test_whole_windows_have_their_targets():
    assert [windows_per_epoch(length, 3) for length in (4, 6, 7, 9, 10)] == [1, 1, 2, 2, 3]


def test_a_single_text_is_split_90_5_5():
    assert list(map(len, split_text(b"x" * 1000))) == [900, 50, 50]


def test_names_of_splits_are_whole_words(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt", "latest.txt", "constrain.txt"):
        (tmp_path / name).write_text(name)
    assert path_texts(tmp_path) == [b"train.txt", b"valid.txt", b"test.txt"]


def test_a_readme_is_no_text(tmp_path):
    (tmp_path / "README.txt").write_text("how it was made")
    (tmp_path / ".DS_Store").write_text("of the system")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text8").write_text("x" * 100)
    assert b"".join(path_texts(tmp_path)) == b"x" * 100


def test_bytes_of_every_split_are_known(tmp_path):
    for split, content in (("train", "aab"), ("valid", "abc"), ("test", "abd")):
        (tmp_path / f"{split}.txt").write_text(content)
    assert len(load_corpus(str(tmp_path), tokenizer="byte").vocabulary) == 4


def test_a_hub_that_refuses_a_page_is_there_and_one_that_is_offline_is_not_asked(monkeypatch):
    def refused(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 403, "", {}, None)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sources.urllib.request, "urlopen", refused)
    assert sources._hub_answers()
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *_, **__: pytest.fail("it was asked"))
    for offline in ("1", "on", "Yes", "TRUE"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert not sources._hub_answers()
