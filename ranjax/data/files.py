"""Where texts come from: files in the forms they are shared in, and the hub."""

import gzip
import io
import os
import re
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from ranjax.errors import UserError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".tokens", ".raw", ".parquet")
PACKED = (".7z", ".bz2", ".tar", ".tgz", ".xz", ".zip", ".zst")  # not read: as bytes they would pass for a text
SHARES = (0.90, 0.05)  # of a single text: train, valid; the rest is test


def path_texts(path: Path) -> list[bytes]:
    """The three splits of a directory or of a single text."""
    if path.is_file():
        return split_text(_read_file(path))
    files = [f for f in sorted(path.iterdir()) if _suffix(f) in SUFFIXES]
    found = {split: [f for f in files if re.search(rf"(^|[^a-z]){split}", f.name.lower())] for split in SPLITS}
    if all(len(matches) == 1 for matches in found.values()):
        return [_read_file(found[split][0]) for split in SPLITS]
    texts = [f for f in sorted(path.iterdir()) if f.is_file() and not f.name.lower().startswith(("readme", "."))]
    if not any(found.values()) and len(texts) == 1:
        return split_text(_read_file(texts[0]))
    got = ", ".join(f"{split}: {', '.join(f.name for f in found[split]) or 'none'}" for split in SPLITS)
    raise UserError(
        f"{path} must hold one file each for train, valid and test ({', '.join(SUFFIXES)}, each also .gz), or one "
        f"text alone; got {got}."
    )


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path) -> bytes:
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
    if not (types.is_string(column.type) or types.is_large_string(column.type)):
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


def hub_texts(name: str, hub_id: str, config: str) -> list[bytes]:
    """The splits of a data set on the hub, through the cache of `datasets`; without a network from the cache alone."""
    if not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported: no minutes of retries
    from datasets import load_dataset
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of whichever client it has

    try:
        rows = load_dataset(hub_id, config)
    except (OSError, ValueError, HTTPError) as error:  # unreachable; or not this configuration in the cache
        raise UserError(
            f"{name} could not be loaded from the hub ({hub_id}): {type(error).__name__}: {error}. Ways out: local "
            "files with --data-dir DIR; a cached copy, fetched once with a network (HF_HOME says where); with a "
            "cached copy and no network, HF_HUB_OFFLINE=1. Without any of these: the data set python-docs, which "
            "needs no network."
        ) from None
    return [_joined(rows[split]["text"]) for split in ("train", "validation", "test")]


def _hub_answers() -> bool:
    """Whether the hub answers at all within ten seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
