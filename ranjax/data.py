"""Corpora: named data sets, one's own text, and two that need no network; and training streams.

A corpus is three arrays of token ids and the vocabulary that explains them.
"""

import gzip
import io
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ranjax.embedded import markov, python_docs
from ranjax.errors import UserError
from ranjax.vocabulary import TOKENIZERS, BytePairs, Bytes, Characters, Vocabulary, Words

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".tokens", ".raw", ".parquet")
SHARES = (0.90, 0.05)  # of a single text: train, valid; the rest is test


@dataclass(frozen=True)
class Corpus:
    """Token ids and their vocabulary.

    Attributes:
      name: as it was asked for.
      train, valid, test: int32 ids, `(tokens,)`.
      vocabulary: the tokens; `len(vocabulary)` is their number, ids are 0 ... len - 1.
      source: where the text came from: a path, a hub's id, a version.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: Vocabulary
    source: str


@dataclass(frozen=True)
class Known:
    """A data set with a name.

    Attributes:
      tokenizer: its usual one.
      closed: its words are the published vocabulary, all of them; otherwise rare words become `<unk>`.
      hub: id and configuration on the hub, or None where only local files serve.
      totals: published numbers of word tokens, `<eos>` included, of train, valid and test, and of the vocabulary.
    """

    tokenizer: str
    closed: bool = False
    hub: tuple[str, str] | None = None
    totals: tuple[int, int, int, int] | None = None


KNOWN = {
    "wikitext-2": Known("word", True, ("Salesforce/wikitext", "wikitext-2-v1"), (2_088_628, 217_646, 245_569, 33_278)),
    "wikitext-103": Known("word", True, ("Salesforce/wikitext", "wikitext-103-v1")),
    "wikitext-2-raw": Known("word", False, ("Salesforce/wikitext", "wikitext-2-raw-v1")),
    "wikitext-103-raw": Known("word", False, ("Salesforce/wikitext", "wikitext-103-raw-v1")),
    "ptb": Known("word", True, None, (929_589, 73_760, 82_430, 10_000)),
    "text8": Known("character"),
    "enwik8": Known("byte"),
}
EMBEDDED = {"python-docs": "bpe", "markov": "character"}  # and their usual tokenizers


def load_corpus(name: str, data_dir: str | Path | None = None, tokenizer: str | None = None) -> Corpus:
    """Loads a corpus by its name or from a path.

    Args:
      name: `"python-docs"` (documentation that every Python carries), `"markov"` (synthetic, of known entropy),
        one of `KNOWN`, or a path: a directory with train, valid and test files (`.txt`, `.tokens`, `.raw`,
        `.parquet`, each also `.gz`) or one text file, which is split 90/5/5.
      data_dir: the folder that holds a folder of that name, or that folder itself. None: a known name is loaded
        from the hub, through its cache.
      tokenizer: `"word"`, `"character"`, `"byte"` or `"bpe"`. None: the data set's usual one; words for a
        directory, characters for a single file.

    Returns:
      The corpus. Word vocabularies of known data sets are the published ones; those of other text keep the words
      seen at least twice in train and read the rest as `<unk>`, in train as well.

    Raises:
      UserError (a ValueError): an unknown name, a missing, empty or undecodable file, totals that are not the
        published ones, a hub that cannot be reached.

    Example:
      >>> from ranjax.data import load_corpus
      >>> corpus = load_corpus("markov")
      >>> corpus.train.dtype.name, len(corpus.vocabulary)
      ('int32', 8)
    """
    if tokenizer is not None and tokenizer not in TOKENIZERS:
        raise UserError(f"`tokenizer` must be one of {', '.join(TOKENIZERS)}; got {tokenizer!r}.")
    source, texts = _texts(name, data_dir)
    known = KNOWN.get(name)
    usual = EMBEDDED.get(name) or (known.tokenizer if known else "word" if Path(source).is_dir() else "character")
    return _corpus(name, source, texts, tokenizer or usual, known)


def load_split(name: str, split: str, vocabulary: Vocabulary, data_dir: str | Path | None = None) -> np.ndarray:
    """The ids of one split of a corpus, read with the vocabulary of a trained model.

    Raises:
      UserError: as `load_corpus`; and for text that the vocabulary has no tokens for.
    """
    source, texts = _texts(name, data_dir)
    return _encoded(vocabulary, texts[SPLITS.index(split)], f"the {split} split of {source}")


def _texts(name: str, data_dir: str | Path | None) -> tuple[str, list[bytes]]:
    """Where a corpus comes from, and its three texts."""
    if name == "markov":
        return "ranjax.embedded", markov()
    if name == "python-docs":
        return python_docs()
    if name in KNOWN:
        return _known_texts(name, KNOWN[name], data_dir)
    path = Path(name).expanduser()
    if not path.exists():
        names = ", ".join((*EMBEDDED, *KNOWN))
        raise UserError(f"there is no data set or path {name!r}. Known names: {names}. Or give a file or a directory.")
    return str(path), _read_path(path)


def _corpus(name: str, source: str, texts: list[bytes], tokenizer: str, known: Known | None = None) -> Corpus:
    """Builds the vocabulary, encodes the splits, checks the totals of a known data set."""
    for split, text in _named(texts):
        if not text.strip():
            raise UserError(f"the {split} split of {source} is empty; expected text.")
    vocabulary = _built(tokenizer, source, texts, closed=known is not None and known.closed)
    parts = [_encoded(vocabulary, text, f"the {split} split of {source}") for split, text in _named(texts)]
    train, valid, test = parts
    totals = len(train), len(valid), len(test), len(vocabulary)
    if tokenizer == "word" and known and known.totals and totals != known.totals:
        raise UserError(
            f"{source} is not {name} as published: expected {known.totals} tokens in train, valid, test and the "
            f"vocabulary, got {totals}. Fetch the files again, or name the folder itself as --dataset."
        )
    return Corpus(name, train, valid, test, vocabulary, source)


def _named(texts: list[bytes]) -> Iterator[tuple[str, bytes]]:
    return zip(SPLITS, texts, strict=True)


def _built(tokenizer: str, source: str, texts: list[bytes], closed: bool) -> Vocabulary:
    """The vocabulary of a corpus; alphabets are closed over all splits, words and byte pairs come from train."""
    if tokenizer == "byte":
        return Bytes.build(*texts)
    train, *others = [_decoded(text, f"the {split} split of {source}") for split, text in _named(texts)]
    if tokenizer == "character":
        return Characters.build(train, *others)
    return Words.build(train, at_least=1 if closed else 2) if tokenizer == "word" else BytePairs.build(train)


def _encoded(vocabulary: Vocabulary, text: bytes, where: str) -> np.ndarray:
    if isinstance(vocabulary, Bytes):
        return vocabulary.encode_bytes(text)
    decoded = _decoded(text, where)
    if isinstance(vocabulary, Words) and not decoded.endswith("\n"):
        decoded += "\n"  # the last line is a line too
    return vocabulary.encode(decoded)


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {text[error.start]:#04x} at position {error.start}. "
            "Convert it (`iconv -t utf-8`), or read it as bytes with --tokenizer byte."
        ) from None


def _known_texts(name: str, known: Known, data_dir: str | Path | None) -> tuple[str, list[bytes]]:
    """The splits of a known data set, from a local folder if there is one, else from the hub."""
    if data_dir is None:
        if known.hub is None:
            raise UserError(
                f"{name} is read from local files only. Give the folder that holds them: --data-dir DIR, where "
                f"DIR/{name} or DIR has them."
            )
        return known.hub[0], _hub_texts(name, *known.hub)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder} is not a directory; expected the folder that holds {name}.")
    folder = folder / name if (folder / name).is_dir() else folder
    return str(folder), _read_path(folder)


def _hub_texts(name: str, hub_id: str, config: str) -> list[bytes]:
    """The splits of a data set on the hub, through the cache of `datasets`; without a network from the cache alone."""
    if not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported: no minutes of retries
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_id, config)
    except (OSError, ValueError) as error:  # unreachable; or not this configuration in the cache
        raise UserError(
            f"{name} could not be loaded from the hub ({hub_id}): {type(error).__name__}: {error}. Ways out: local "
            "files with --data-dir DIR; a cached copy, fetched once with a network (HF_HOME tells where); with a "
            "cached copy and no network, HF_HUB_OFFLINE=1. Without any: --dataset python-docs needs no network."
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


def _joined(rows: list[str | None]) -> bytes:
    """Rows of lines as one text; a blank row is a line like any other."""
    return "".join((row or "").removesuffix("\n") + "\n" for row in rows).encode()


def _read_path(path: Path) -> list[bytes]:
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
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} could not be read: {error}.") from None
    return _joined(_parquet_rows(data, path)) if _suffix(path) == ".parquet" else data


def _parquet_rows(data: bytes, path: Path) -> list[str | None]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(io.BytesIO(data), columns=["text"])["text"].to_pylist()
    except (ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} must be a parquet file with a column `text`: {error}.") from None


def split_text(text: bytes) -> list[bytes]:
    """One text as train, valid and test, 90/5/5 by bytes; no character of UTF-8 is cut."""
    cuts, total = [0], 0.0
    for share in SHARES:
        total += share
        cut = round(len(text) * total)
        while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
            cut += 1
        cuts.append(cut)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def columns(ids: np.ndarray, batch_size: int, steps: int, split: str = "train") -> np.ndarray:
    """A text laid out as `(batch, length)` contiguous columns: each row goes on where its last window ended.

    Window n of an epoch is `[:, n * steps : (n + 1) * steps]`, its targets are one further on, so a position
    in training is two integers, the epoch and n. The tokens that do not fill a row are left out.
    """
    length = len(ids) // batch_size
    if length < steps + 1:
        raise UserError(
            f"the {split} split has {len(ids):,} tokens, fewer than one batch of {batch_size} x {steps} and its "
            f"targets needs ({batch_size * (steps + 1):,}). Lower --batch-size or --steps, or give more text."
        )
    return ids[: batch_size * length].reshape(batch_size, length)


def windows_per_epoch(length: int, steps: int) -> int:
    """How many whole windows, targets included, a row of that length has."""
    return (length - 1) // steps
