"""Texts from files in the forms they are shared in, and from the hub."""

import gzip
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from serving import serving

from ranjax.data import files, load_corpus
from ranjax.data.files import SPLITS, path_texts, split_text
from ranjax.errors import UserError


@pytest.mark.parametrize("character", ["é", "😀"])
def test_a_split_cuts_no_character_in_two(character):
    text = character * 107  # a share ends after the first byte of one
    parts = split_text(text.encode())
    assert "".join(part.decode() for part in parts) == text


def test_a_single_text_is_split_90_5_5():
    assert list(map(len, split_text(b"x" * 1000))) == [900, 50, 50]


def test_names_of_files_may_be_in_capitals(tmp_path):
    (tmp_path / "TRAIN.TXT.GZ").write_bytes(gzip.compress(b"abc"))
    for name in ("Valid.TXT", "test.Tokens"):
        (tmp_path / name).write_bytes(b"abc")
    assert path_texts(tmp_path) == [b"abc"] * 3


def test_companions_that_systems_and_people_leave_are_no_texts(tmp_path):
    names = (
        "._train.txt",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "README.txt",
        "train.txt:Zone.Identifier",
        "train.txt~",
    )
    for name in (*names, "LICENSE"):
        (tmp_path / name).write_bytes(b"of the system")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._train.txt").write_bytes(b"of the system")
    (tmp_path / "one.txt").write_bytes(b"x" * 100)
    assert b"".join(path_texts(tmp_path)) == b"x" * 100
    (tmp_path / "one.txt").unlink()
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(split)
    assert path_texts(tmp_path) == [b"train", b"valid", b"test"]


def test_a_split_may_stand_alone_and_a_single_text_be_read_whole(tmp_path):
    (tmp_path / "test.txt").write_bytes(b"abc")
    assert path_texts(tmp_path, ["test"]) == [b"abc"]
    assert path_texts(tmp_path / "test.txt", [files.WHOLE]) == [b"abc"]
    with pytest.raises(UserError, match="must hold one file each for train, valid, test "):
        path_texts(tmp_path)


def test_names_of_splits_are_whole_words(tmp_path):
    for name in ("train.txt", "valid.txt", "test.txt", "latest.txt", "constrain.txt"):
        (tmp_path / name).write_text(name)
    assert path_texts(tmp_path) == [b"train.txt", b"valid.txt", b"test.txt"]


def test_a_readme_is_no_text(tmp_path):
    (tmp_path / "README.txt").write_text("about the text")
    (tmp_path / ".DS_Store").write_text("of the system")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text8").write_text("x" * 100)
    assert b"".join(path_texts(tmp_path)) == b"x" * 100


PACKED = gzip.compress(b"the cat sat on the mat\n" * 40)


@pytest.mark.parametrize(
    ("contents", "path", "message"),
    [
        ({"d/enwik8.zip": b"PK" * 100}, "d", "d/enwik8.zip is an archive; .* Unpack it first"),
        ({"a.tar.gz": PACKED}, "a.tar.gz", "a.tar.gz is an archive"),
        ({"a.txt.gz": b"not packed"}, "a.txt.gz", "a.txt.gz could not be read"),
        ({"a.txt.gz": PACKED[:-20]}, "a.txt.gz", "a.txt.gz could not be read"),
        ({"a.txt.gz": PACKED[:12] + b"\xff" * 20}, "a.txt.gz", "a.txt.gz could not be read"),
        ({"d/train.txt": b"a"}, "d", "must hold one file each .* valid: none, test: none"),
        (
            {f"d/{name}.txt": b"a" for name in ("train-00000-of-00002", "valid", "test")},
            "d",
            "or all shards of one, as .* got train: train-00000-of-00002.txt, valid: valid.txt",
        ),
        (
            {f"d/{name}": b"a b\n" for name in ("train.txt", "train.raw", "valid.txt", "test.txt")},
            "d",
            "must hold one file each .* got train: train.raw, train.txt, valid: valid.txt",
        ),
        ({"d/train.parquet": b"x", "d/valid.txt": b"a", "d/test.txt": b"a"}, "d", "must be a parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_named(contents, path, message, tmp_path):
    for file, content in contents.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        path_texts(tmp_path / path)


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


def test_long_strings_of_parquet_are_read_as_lines(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for split in SPLITS:
        column = pyarrow.array(["a b", None, " c "], pyarrow.large_string())
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{split}.parquet")
    corpus = load_corpus(str(tmp_path), tokenizer="character")
    assert corpus.vocabulary.decode(corpus.train) == "a b\n\n c \n"


@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary"])
def test_strings_of_parquet_are_read_whatever_they_are_called(kind, tmp_path):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(["a b", None, "c"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    for split in SPLITS:
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{split}.parquet")
    assert path_texts(tmp_path) == [b"a b\n\nc\n"] * 3


def test_the_shards_of_a_split_are_one_text_in_their_order(tmp_path):
    """As the hub has WikiText-103."""
    import pyarrow
    from pyarrow import parquet

    for name in ("train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        parquet.write_table(pyarrow.table({"text": [name[:11], "b"]}), tmp_path / f"{name}.parquet")
    assert path_texts(tmp_path)[:2] == [b"train-00000\nb\ntrain-00001\nb\n", b"validation-\nb\n"]
    (tmp_path / "train-00002-of-00002.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="or all shards of one"):
        path_texts(tmp_path)


def load_from_hub(port, cache):
    """The error of a process of its own, as a user meets it."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache)}
    code = "from ranjax.data import load_corpus; load_corpus('wikitext-2')"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stderr


WAYS_OUT = r"UserError: wikitext-2 could not be loaded.*--data-dir.*HF_HUB_OFFLINE"


def test_a_hub_out_of_reach_is_given_up_within_half_a_minute(tmp_path):
    """A server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert re.search(WAYS_OUT, load_from_hub(silent.getsockname()[1], tmp_path))
    assert time.monotonic() - began < 30


def answer_with(code):
    def answer(request):
        request.send_response(code)
        request.end_headers()

    return answer


def test_a_hub_that_hangs_up_is_an_error_with_ways_out(tmp_path):
    """It answers that it is there, and nothing more."""

    def answer(request):
        answer_with(200)(request) if request.path == "/" else request.connection.shutdown(socket.SHUT_RDWR)

    with serving(answer) as (_, port):
        assert re.search(WAYS_OUT, load_from_hub(port, tmp_path))


def test_a_hub_that_refuses_a_page_answers_and_one_that_is_offline_is_not_asked(monkeypatch):
    with serving(answer_with(403)) as (asked, port):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert files.hub_answers()
        assert len(asked) == 1
        for offline in ("1", "on", "Yes", "TRUE"):
            monkeypatch.setenv("HF_HUB_OFFLINE", offline)
            assert not files.hub_answers()
        assert len(asked) == 1


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://[::1", "http://a b/"])
def test_an_endpoint_that_is_no_address_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match=r"HF_ENDPOINT must be an address such as https://huggingface\.co; got"):
        load_corpus("wikitext-2")


def test_a_hub_out_of_reach_is_asked_again_by_the_next_load(monkeypatch):
    import datasets
    from huggingface_hub import constants

    seen = []

    def load(*_, **how):
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.is_offline_mode()))
        raise ConnectionError("out of reach")

    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for answers in (False, True):
        monkeypatch.setattr(files, "hub_answers", lambda answers=answers: answers)
        with pytest.raises(UserError, match="could not be loaded from the hub"):
            load_corpus("wikitext-2")
    assert seen == [(True, True), (False, False)]
    assert "HF_HUB_OFFLINE" not in os.environ
