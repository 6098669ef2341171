"""Where texts come from: files in the forms they are shared in, and the hub."""

import gzip
import http.client
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ranjax.errors import UserError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".tokens", ".raw", ".parquet")
PACKED = (".7z", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".zst")  # archives: as bytes they would pass for a text
SHARES = (0.90, 0.05)  # of a single text: train, valid; the rest is test
WHOLE = "whole"  # a single text, not divided; of one that comes in splits it is none
# What systems and people put beside a text: hidden files, those of Windows and of its downloads, notes.
COMPANIONS = re.compile(r"\.|thumbs\.db$|desktop\.ini$|(readme|licen[cs]e|copying)\b|.*(:zone\.identifier|~)$", re.I)
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")  # as the hub writes large splits


def path_texts(path: Path, wanted: Sequence[str] = SPLITS) -> list[bytes]:
    """These splits of a directory or of a single text; of the latter also the whole."""
    found = _found(path)
    if WHOLE in found:
        text = read_file(found[WHOLE][0])
        parts: dict[str, bytes] = dict(zip((*SPLITS, WHOLE), (*split_text(text), text), strict=True))
        return [parts[split] for split in wanted]
    if not all(_is_split(found.get(split, [])) for split in wanted):
        got = ", ".join(f"{split}: {', '.join(f.name for f in found[split]) or 'none'}" for split in SPLITS)
        raise UserError(
            f"{path} must hold one file each for {', '.join(wanted)} ({', '.join(SUFFIXES)}, each also .gz; or all "
            f"shards of one, as train-00000-of-00002.parquet), or one text alone; got {got}."
        )
    return [b"".join(map(read_file, found[split])) for split in wanted]


def is_one_text(path: Path) -> bool:
    """Whether what is there is a single text, of which `WHOLE` can be read."""
    return WHOLE in _found(path)


def _found(path: Path) -> dict[str, list[Path]]:
    """The files of each split, or the one of a text alone as `WHOLE`."""
    if path.is_file():
        return {WHOLE: [path]}
    files = [f for f in sorted(path.iterdir()) if f.is_file() and not COMPANIONS.match(f.name)]
    texts = [f for f in files if _suffix(f) in SUFFIXES]
    found = {split: [f for f in texts if re.search(rf"(^|[^a-z]){split}", f.name.lower())] for split in SPLITS}
    return {WHOLE: files} if len(files) == 1 and not any(found.values()) else found


def _is_split(files: list[Path]) -> bool:
    """Whether these files, by name, are one split: one, or all shards of one."""
    shards = [(int(shard[1]), int(shard[2])) for f in files if (shard := SHARD.search(f.name))]
    names = {SHARD.sub("", f.name) for f in files}
    return len(names) == 1 and (shards or [(0, 1)]) == [(n, len(files)) for n in range(len(files))]


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path) -> bytes:
    """The text in a file, also in a packed one (.gz) or in the column `text` of a table (.parquet)."""
    if _suffix(path) in PACKED:
        raise UserError(f"{path} is an archive; expected a text, plain or as .gz. Unpack it first.")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} could not be read: {error}.") from None
    return _joined(_parquet_rows(data, path)) if _suffix(path) == ".parquet" else data


def _parquet_rows(data: bytes, path: Path) -> list[str | None]:
    from pyarrow import ArrowInvalid, parquet, types

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if "text" not in names:
            raise UserError(f"{path} must have a column `text`; got {', '.join(names) or 'none'}.")
        column = file.read(columns=["text"])["text"]
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} must be a parquet file: {' '.join(str(error).split()).rstrip('. ')}.") from None
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"the column `text` of {path} must be of strings; got {column.type}.")
    return column.to_pylist()


def _joined(rows: list[str | None]) -> bytes:
    """Rows of lines as one text; a blank row is a line like any other. A single row is the text itself."""
    if len(rows) == 1:
        return (rows[0] or "").encode()
    return "".join((row or "").removesuffix("\n") + "\n" for row in rows).encode()


def split_text(text: bytes) -> list[bytes]:
    """One text as train, valid and test, 90/5/5 by bytes; no character of UTF-8 is cut."""
    cuts, total = [0], 0.0
    for share in SHARES:
        total += share
        cut = round(len(text) * total)
        for _ in range(3):  # bytes of a character after its first, at most
            if 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
                cut += 1
        cuts.append(cut)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def hub_texts(name: str, hub_id: str, config: str, revision: str) -> tuple[str, list[bytes]]:
    """Where the splits of a data set on the hub come from, and the splits; through the cache of `datasets`, without a
    network from the cache alone."""
    answers = hub_answers()
    from datasets import load_dataset
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of whichever client it has

    try:
        with nullcontext() if answers else _offline():
            rows = load_dataset(hub_id, config, revision=revision)
    except (OSError, ValueError, HTTPError) as error:  # unreachable; or not this configuration in the cache
        raise UserError(
            f"{name} could not be loaded from the hub ({hub_id}): {type(error).__name__}: {error}. Ways out: local "
            "files with --data-dir DIR; a cached copy, fetched once with a network (HF_HOME says where); with a "
            "cached copy and no network, HF_HUB_OFFLINE=1. Without any of these: the data set python-docs, which "
            "needs no network."
        ) from None
    splits = "train", "validation", "test"
    return f"{hub_id}@{_commit(rows['train']) or revision}", [_joined(rows[split]["text"]) for split in splits]


def _commit(rows: Any) -> str | None:
    """The revision that a data set was built from, where it is recorded."""
    found = re.search(r"@([0-9a-f]{40})/", " ".join(rows.info.download_checksums or ()))
    return found and found[1]


@contextmanager
def _offline() -> Iterator[None]:
    """No requests to the hub meanwhile, nor minutes of their repetition; the next load asks again if it answers."""
    from datasets import config
    from huggingface_hub import constants

    before = [(vars(module), module.HF_HUB_OFFLINE) for module in (config, constants)]
    try:
        for names, _ in before:
            names["HF_HUB_OFFLINE"] = True
        yield
    finally:
        for names, value in before:
            names["HF_HUB_OFFLINE"] = value


def hub_answers() -> bool:
    """Whether the hub answers at all within ten seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        if not urllib.parse.urlsplit(endpoint).hostname:
            raise ValueError("there is no host")
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except (ValueError, http.client.HTTPException):
        raise UserError(
            f"HF_ENDPOINT must be an address such as https://huggingface.co; got {endpoint!r}. Correct or unset it."
        ) from None
    except OSError:
        return False
