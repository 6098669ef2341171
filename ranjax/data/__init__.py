"""Corpora: named data sets, one's own text, and those that need no network; and training streams.

A corpus is three arrays of token ids and the vocabulary that explains them.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ranjax.data.builtin import TASKS, python_docs, task_of, task_texts
from ranjax.data.files import SPLITS, WHOLE, hub_texts, is_one_text, path_texts
from ranjax.data.vocabulary import TOKENIZERS, BytePairs, Bytes, Characters, Vocabulary, Words
from ranjax.errors import UserError, check_choice, check_path, check_size, fitting


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
      totals: published numbers of its usual tokens, `<eos>` included, of train, valid and test, and of the vocabulary;
        None for one that is not known.
      revision: on the hub, a commit; "main" where none is known, and the totals alone say whether it is the text.
    """

    tokenizer: str
    closed: bool = False
    hub: tuple[str, str] | None = None
    totals: tuple[int | None, ...] = (None,) * 4
    revision: str = "main"

    def has(self, totals: tuple[int, ...], source: str) -> bool:
        """Whether these are the published totals; of a part of a text in local files, words alone must have them."""
        of_the_hub = self.hub is not None and source.startswith(f"{self.hub[0]}@")
        same = all(published in (None, got) for published, got in zip(self.totals, totals, strict=True))
        return same or not (self.closed or of_the_hub)


def _wikitext(size: str, closed: bool, train: int | None, vocabulary: int | None) -> Known:
    """A WikiText: those of both sizes are validated and tested on the same articles."""
    totals, commit = (train, 217_646, 245_569, vocabulary), "b08601e04326c79dfdd32d625aee71d232d685c3"
    return Known("word", closed, ("Salesforce/wikitext", f"wikitext-{size}-v1"), totals, commit)


KNOWN = {
    "wikitext-2": _wikitext("2", True, 2_088_628, 33_278),
    "wikitext-103": _wikitext("103", True, 103_227_021, 267_735),
    "wikitext-2-raw": _wikitext("2-raw", False, None, None),
    "wikitext-103-raw": _wikitext("103-raw", False, None, None),
    "ptb": Known("word", True, None, (929_589, 73_760, 82_430, 10_000)),
    "text8": Known("character", False, ("afmck/text8", "default"), (90_000_000, 5_000_000, 5_000_000, 27)),
    "enwik8": Known("byte"),
}
BUILTIN = {"python-docs": "bpe", "markov": "character"}  # and their usual tokenizers


class Texts(NamedTuple):
    """Texts of a corpus: where they come from, and how they usually become tokens."""

    source: str
    parts: list[bytes]
    tokenizer: str


def load_corpus(name: str | Path, data_dir: str | Path | None = None, tokenizer: str | None = None) -> Corpus:
    """Loads a corpus by its name or from a path.

    Args:
      name: `"python-docs"` (documentation that every Python carries), `"markov"` (synthetic, of known entropy),
        `"markov-D"`, `"copy-D"`, `"recall-D"` (tasks whose answers lie D tokens back; see
        `ranjax.data.builtin.task_texts`), one of `KNOWN`, or a path: a directory with train, valid and test files
        (`.txt`, `.tokens`, `.raw`, `.parquet`, each also `.gz`) or one text file, which is split 90/5/5.
      data_dir: the folder that holds a folder of that name, or that folder itself. None: a known name is loaded
        from the hub, through its cache.
      tokenizer: `"word"`, `"character"`, `"byte"` or `"bpe"`. None: the data set's usual one; words for a
        directory, characters for a single file.

    Returns:
      The corpus. Word vocabularies of known data sets are the published ones; those of other text keep the words
      seen at least twice in train and read the rest as `<unk>`, in train as well.

    Raises:
      UserError (a ValueError): an unknown name, a missing, packed, empty or undecodable file, totals that are not
        the published ones, a split of less than two tokens, a hub that cannot be reached.

    Example:
      >>> from ranjax.data import load_corpus
      >>> corpus = load_corpus("markov")
      >>> corpus.train.dtype.name, len(corpus.vocabulary)
      ('int32', 8)
    """
    if tokenizer is not None and tokenizer not in TOKENIZERS:
        raise UserError(f"`tokenizer` must be one of {', '.join(TOKENIZERS)}; got {tokenizer!r}.")
    name = str(name)
    texts = _texts(name, data_dir)
    return _corpus(name, texts.source, texts.parts, tokenizer or texts.tokenizer, KNOWN.get(name))


def load_split(name: str | Path, split: str, vocabulary: Vocabulary, data_dir: str | Path | None = None) -> np.ndarray:
    """The ids of one split of a corpus, read with the vocabulary of a trained model.

    Args:
      name: as of `load_corpus`. A directory need hold no more than this split.
      split: `"train"`, `"valid"` or `"test"`; of a path to a single text also `"whole"`, all of it.
      vocabulary: of the model.
      data_dir: as of `load_corpus`.

    Raises:
      UserError: as `load_corpus`; and for text that the vocabulary has no tokens for.
      ValueError: for another `split`.

    Example:
      >>> from ranjax.data import load_corpus, load_split
      >>> corpus = load_corpus("markov")
      >>> bool((load_split("markov", "valid", corpus.vocabulary) == corpus.valid).all())
      True
    """
    name = str(name)
    check_choice("split", split, (*SPLITS, WHOLE) if split_of(name) == WHOLE else SPLITS)
    texts = _texts(name, data_dir, [split])
    return encoded(
        vocabulary, texts.parts[0], texts.source if split == WHOLE else f"the {split} split of {texts.source}"
    )


def split_of(name: str | Path) -> str:
    """What of a corpus a model is evaluated on, if nothing else is asked for: `"whole"` of a path to a single text."""
    name = str(name)
    return WHOLE if not is_named(name) and is_one_text(_path(name)) else "test"


def is_named(name: str) -> bool:
    """Whether it names a data set, which a path of the same name does not replace."""
    return name in KNOWN or name in BUILTIN or task_of(name) is not None


def _texts(name: str, data_dir: str | Path | None, wanted: Sequence[str] = SPLITS) -> Texts:
    """These splits of a corpus."""
    if data_dir is not None:
        check_path("data_dir", data_dir)
        data_dir = Path(os.path.expanduser(data_dir))
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a directory; expected the folder that holds {name}.")
    if name in KNOWN:
        return _known_texts(name, KNOWN[name], data_dir, wanted)
    if not is_named(name):
        path = _path(name)
        return Texts(str(path), path_texts(path, wanted), "word" if path.is_dir() else "character")
    task = task_of(name)
    source, parts = python_docs() if task is None else ("ranjax.data.builtin", task_texts(*task))
    return Texts(source, [parts[SPLITS.index(split)] for split in wanted], BUILTIN.get(name, "character"))


def _path(name: str) -> Path:
    """The path that a name is, after a check that text can be read there, and again."""
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):  # False, too, for a name that no path can have
        names = ", ".join((*BUILTIN, *KNOWN, *(f"{task}-D" for task in TASKS)))
        raise UserError(f"there is no data set or path {name!r}. Known names: {names}. Or give a file or a directory.")
    if not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{name} is a pipe or a device, and a text is read more than once: by training, by --resume, by "
            "evaluation. Write it to a file, and give that."
        )
    return path


def _corpus(name: str, source: str, texts: list[bytes], tokenizer: str, known: Known | None = None) -> Corpus:
    """Builds the vocabulary, encodes the splits, checks the totals of a known data set."""
    for split, text in _named(texts):
        if not text.strip():
            raise UserError(f"the {split} split of {source} is empty; expected text.")
    vocabulary = _built(tokenizer, source, texts, closed=known is not None and known.closed)
    try:
        parts = [encoded(vocabulary, text, f"the {split} split of {source}") for split, text in _named(texts)]
    except UserError as error:
        if known is None or not known.closed:
            raise
        raise UserError(f"{source} is not {name} as published: {error}") from None
    train, valid, test = parts
    totals = len(train), len(valid), len(test), len(vocabulary)
    if known and tokenizer == known.tokenizer and not known.has(totals, source):
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


def encoded(vocabulary: Vocabulary, text: bytes, where: str) -> np.ndarray:
    """The ids of a text. A UserError names it `where`: if it is not UTF-8, does not fit, or has less than 2 tokens."""
    decoded = "" if isinstance(vocabulary, Bytes) else _decoded(text, where)
    if isinstance(vocabulary, Words) and not decoded.endswith("\n"):
        decoded += "\n"  # the last line is a line too
    with fitting(where):
        ids = vocabulary.encode_bytes(text) if isinstance(vocabulary, Bytes) else vocabulary.encode(decoded)
    if len(ids) < 2:
        more = "Give more text" + (" (a single file is split 90/5/5)." if " split of " in where else ".")
        raise UserError(f"{where} must have at least 2 tokens, to predict one from another; got {len(ids)}. {more}")
    return ids


def _decoded(text: bytes, where: str) -> str:
    try:
        decoded = text.decode("utf-8-sig")  # a byte order mark is no character of a text
        at = text.find(0)  # UTF-16 without its mark passes for UTF-8
    except UnicodeDecodeError as error:
        decoded, at = "", error.start
    if at < 0:
        return decoded
    raise UserError(
        f"{where} is not UTF-8 text: byte {text[at]:#04x} at position {at}. Convert it from the encoding it has "
        "(`iconv -f latin1 -t utf-8`, or -f utf-16, -f utf-16le), or read it as bytes with --tokenizer byte."
    )


def _known_texts(name: str, known: Known, data_dir: Path | None, wanted: Sequence[str]) -> Texts:
    """Splits of a known data set, from a local folder if there is one, else from the hub."""
    if data_dir is None:
        if known.hub is None:
            raise UserError(
                f"{name} is read from local files only. Give the folder that holds them: --data-dir DIR, where "
                f"DIR/{name} or DIR has them."
            )
        source, parts = hub_texts(name, *known.hub, known.revision)
        return Texts(source, [parts[SPLITS.index(split)] for split in wanted], known.tokenizer)
    folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    return Texts(str(folder), path_texts(folder, wanted), known.tokenizer)


def identity(ids: np.ndarray) -> dict[str, Any]:
    """What distinguishes one text from another, as `text.json` has it of each split."""
    return {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def columns(ids: np.ndarray, batch_size: int, steps: int, split: str = "train") -> np.ndarray:
    """A text laid out as `(batch, length)` contiguous columns: each row goes on where its last window ended.

    Window n of an epoch is `[:, n * steps : (n + 1) * steps]`, its targets are one further on, so a position
    in training is two integers, the epoch and n. The tokens that do not fill a row are left out.

    Raises:
      UserError: for a text, the `split` by name, that is too short for a window of every row.
      ValueError: for a `batch_size` or `steps` that is no size.

    Example:
      >>> import numpy as np
      >>> from ranjax.data import columns
      >>> columns(np.arange(11), batch_size=2, steps=4).tolist()
      [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    """
    check_size("batch_size", batch_size)
    check_size("steps", steps)
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
