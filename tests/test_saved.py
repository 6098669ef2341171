"""The small files of a run: schemas, checksums."""

import json

import numpy as np
import pytest

from ranjax.errors import UserError
from ranjax.saved import is_count, is_number, is_text, parse_object, read_json, read_sealed, write_sealed

CONTENT = {"a": "caf\u00e9", "b": [1, 2.5e-3, None, True], "c": "\udce9"}
SCHEMA = {"a": is_text}


def test_an_object_is_read_as_it_was_written(tmp_path):
    write_sealed(tmp_path / "x.json", CONTENT)
    assert read_sealed(tmp_path / "x.json", SCHEMA) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_sealed(path, CONTENT)
    written, rng, named = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(500):
        flipped = bytearray(written)
        flipped[rng.integers(len(written))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            assert read_sealed(path, SCHEMA) == CONTENT
        except UserError as error:
            named.append(str(error))
    assert all(message.startswith(f"{path} is damaged: ") for message in named)
    assert 400 < len(named) < 500  # the others are of the spaces between


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json cannot be read: No such file"),
        (b"{", r"x\.json is damaged: Expecting property name.*\. Restore it, or train again\."),
        (b"\xff", r"x\.json is damaged: 'utf-8' codec"),
        (b"[]", r"x\.json is damaged: it must hold an object; got \[\]\. Restore it, or train again\."),
        (b'{"b": 1}', r"x\.json is damaged: it has no 'a'\."),
        (b'{"a": 1}', r"x\.json is damaged: its 'a' is not valid; got 1\."),
        (b'{"a": ["\\u001b[31m"]}', r"x\.json is damaged: its 'a' is not valid; got \['\\x1b\[31m'\]\."),
        (b'{"a": ' + b"[" * 100_000, r"x\.json is damaged: it is nested too deeply"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", r"x\.json is damaged: .*limit"),
    ],
)
def test_a_damaged_json_file_is_named(content, message, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path, SCHEMA)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "x.json").symlink_to("x.json")
    with pytest.raises(UserError, match=r"x\.json cannot be read: Too many levels of symbolic links\."):
        read_json(tmp_path / "x.json", {})
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path, {})


def test_a_file_without_its_checksum_is_damaged(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(CONTENT))
    with pytest.raises(UserError, match="it has no 'sha256'"):
        read_sealed(tmp_path / "x.json", SCHEMA)


@pytest.mark.parametrize("value", ["NaN", "1e999", "true", '"1"', "null", "[]"])
def test_a_number_is_finite(value):
    with pytest.raises(ValueError, match="'n' is not valid"):
        parse_object(f'{{"n": {value}}}', {"n": is_number})


@pytest.mark.parametrize(("value", "holds"), [(0, True), (5, True), (-1, False), (1.0, False), (True, False)])
def test_a_count_is_a_whole_number_from_0(value, holds):
    assert is_count(value) is holds
