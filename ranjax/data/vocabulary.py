"""Vocabularies: text to token ids and back. The ids of each are exactly 0 ... len - 1."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from ranjax.errors import UserError, is_size, needing
from ranjax.saved import MEND, is_text, parse_object, read_sealed, write_sealed

EOS, UNK = "<eos>", "<unk>"
TOKENIZERS = ("word", "character", "byte", "bpe")
BPE_SIZE = 4096  # tokens of a byte-pair vocabulary trained on one's own text
BPE_RUN = 256  # characters that byte pairs join; pairs within a longer word take a time that grows with its square
LONG_RUN = re.compile(rf"\S{{{BPE_RUN + 1},}}|\s{{{BPE_RUN + 1},}}")


class Vocabulary(Protocol):
    """The tokens of a corpus.

    Attributes:
      tokenizer: `"word"`, `"character"`, `"byte"` or `"bpe"`.
      unit: what one token is called in a report of bits: `"character"`, `"byte"` or None.
      separator: what stands between two tokens of a text.
    """

    tokenizer: ClassVar[str]
    unit: ClassVar[str | None]
    separator: ClassVar[str]

    def __len__(self) -> int: ...
    def encode(self, text: str) -> np.ndarray:
        """The int32 ids of a text; a token that is not in the vocabulary and has no `<unk>` is a UserError."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; others than 0 ... len - 1 are a UserError."""
        ...

    def content(self) -> object:
        """What `load_vocabulary` needs to build the same vocabulary again, as JSON."""
        ...


@dataclass(frozen=True)
class Words:
    """Whitespace-separated words, with `<eos>` for every newline, those of blank lines included."""

    tokens: tuple[str, ...]
    tokenizer: ClassVar[str] = "word"
    unit: ClassVar[str | None] = None
    separator: ClassVar[str] = " "

    @classmethod
    def build(cls, text: str, at_least: int = 1) -> "Words":
        """Every word seen at least so often, in the order of frequency; above once the others become `<unk>`."""
        counts = Counter(text.split())
        counts[EOS] += text.count("\n")
        kept = [word for word, n in counts.most_common() if n >= at_least or word in (EOS, UNK)]
        if at_least > 1 and UNK not in kept:
            kept.append(UNK)
        return cls(tuple(kept))

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        words = [word for line in text.split("\n") for word in (*line.split(), EOS)][:-1]
        unknown = self.ids.get(UNK)
        ids = [self.ids.get(word, unknown) for word in words]
        if unknown is None and None in ids:
            missing = sorted({word for word in words if word not in self.ids})
            raise UserError(f"the vocabulary has no {UNK} and not the words {_some(missing)}. Use words it has.")
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        text = " ".join("\n" if self.tokens[i] == EOS else self.tokens[i] for i in _checked(ids, len(self)))
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def content(self) -> object:
        return list(self.tokens)


@dataclass(frozen=True)
class Characters:
    """Single characters of a closed alphabet, in the order of their code points."""

    alphabet: str
    tokenizer: ClassVar[str] = "character"
    unit: ClassVar[str | None] = "character"
    separator: ClassVar[str] = ""

    @classmethod
    def build(cls, *texts: str) -> "Characters":
        return cls("".join(sorted(set().union(*map(set, texts)))))

    @cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.alphabet)

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        if np.any(self._codes[ids] != codes):
            missing = sorted(set(text) - set(self.alphabet))
            raise UserError(
                f"the vocabulary has no {UNK} and not the characters {_some(missing)}. Use characters it has."
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i] for i in _checked(ids, len(self)))

    def content(self) -> object:
        return self.alphabet


@dataclass(frozen=True)
class Bytes:
    """The bytes that occur in a corpus, in the order of their values."""

    values: tuple[int, ...]
    tokenizer: ClassVar[str] = "byte"
    unit: ClassVar[str | None] = "byte"
    separator: ClassVar[str] = ""

    @classmethod
    def build(cls, *parts: bytes) -> "Bytes":
        seen = np.zeros(256, bool)
        for part in parts:
            seen[np.unique(np.frombuffer(part, np.uint8))] = True
        return cls(tuple(np.flatnonzero(seen).tolist()))

    def __len__(self) -> int:
        return len(self.values)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> np.ndarray:
        table = np.full(256, -1, np.int32)
        table[list(self.values)] = np.arange(len(self))
        ids = table[np.frombuffer(data, np.uint8)]
        if np.any(ids < 0):
            missing = sorted(set(data) - set(self.values))
            raise UserError(f"the vocabulary has no {UNK} and not the bytes {_some(missing)}. Use bytes it has.")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self.values[i] for i in _checked(ids, len(self))).decode(errors="replace")

    def content(self) -> object:
        return list(self.values)


@dataclass(frozen=True)
class BytePairs:
    """Byte-level byte-pair encoding (the library `tokenizers`)."""

    serialised: str = field(repr=False)
    tokenizer: ClassVar[str] = "bpe"
    unit: ClassVar[str | None] = None
    separator: ClassVar[str] = ""

    @classmethod
    def build(cls, text: str) -> "BytePairs":
        with needing("export"):
            from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(_lines(text), vocab_size=BPE_SIZE, min_frequency=2, show_progress=False)
        return cls(bpe.to_str())

    @cached_property
    def _bpe(self):
        with needing("export"):
            from tokenizers import Tokenizer

        return Tokenizer.from_str(self.serialised)

    def __len__(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        parts = self._bpe.encode_batch_fast(list(_lines(text)))
        return np.concatenate([np.array(part.ids, np.int32) for part in parts] or [np.zeros(0, np.int32)])

    def decode(self, ids: Iterable[int]) -> str:
        return self._bpe.decode(_checked(ids, len(self)))

    def content(self) -> object:
        return self.serialised


def save_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Writes a vocabulary as JSON."""
    write_sealed(path, {"tokenizer": vocabulary.tokenizer, "content": vocabulary.content()})


def unknown(vocabulary: Vocabulary, ids: np.ndarray) -> int:
    """How many of the ids are that of `<unk>`: in the text itself, or for words that the vocabulary does not have."""
    return int(np.sum(ids == vocabulary.ids.get(UNK, -1))) if isinstance(vocabulary, Words) else 0


def load_vocabulary(path: Path) -> Vocabulary:
    """Reads a vocabulary that `save_vocabulary` wrote."""
    saved = read_sealed(path, {"tokenizer": is_text, "content": lambda value: isinstance(value, str | list)})
    content = saved["content"]
    match saved["tokenizer"], content:
        case "word", [_, *_] if all(isinstance(word, str) for word in content) and len(set(content)) == len(content):
            return Words(tuple(content))
        case "character", str() if content and content == "".join(sorted(set(content))):
            return Characters(content)
        case "byte", [_, *_] if content == [byte for byte in range(256) if byte in content]:
            return Bytes(tuple(map(int, content)))
        case "bpe", str() if _is_bpe(content):
            return BytePairs(content)
        case name, _ if name in TOKENIZERS:
            raise UserError(f"{path} must hold what `{name}` reads; got {content!a:.40}. {MEND}")
        case other, _:
            raise UserError(f"{path} names the tokenizer {other!a:.40}; expected one of {', '.join(TOKENIZERS)}.")


def _is_bpe(content: str) -> bool:
    """Whether it is what the library `tokenizers` writes, with ids without gaps, and can read.

    Its own error has no type of its own, and a panic of it is no Exception.
    """
    try:
        vocabulary = parse_object(content, {"model": lambda value: isinstance(value, dict)})["model"]["vocab"]
        whole = bool(vocabulary) and sorted(vocabulary.values()) == list(range(len(vocabulary)))
        return whole and len(BytePairs(content)) == len(vocabulary)
    except ModuleNotFoundError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return False


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, those with longer runs of characters without a space, or of spaces, in parts."""
    for line in text.splitlines(keepends=True):
        begun = 0
        for run in LONG_RUN.finditer(line) if len(line) > BPE_RUN else ():
            for cut in range(run.start() + BPE_RUN, run.end(), BPE_RUN):
                yield line[begun:cut]
                begun = cut
        yield line[begun:]


def _checked(ids: Iterable[int], tokens: int) -> list[int]:
    """Ids as numbers of Python, after a check that they are those of so many tokens."""
    ids = list(ids)
    wrong = [i for i in ids if not (is_size(i, 0) and i < tokens)]
    if wrong:
        raise UserError(f"`ids` must be whole numbers from 0 to {tokens - 1}, the vocabulary's; got {_some(wrong)}.")
    return [int(i) for i in ids]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _some(items: list) -> str:
    shown = ", ".join(repr(item) for item in items[:10])
    return f"{shown} and {len(items) - 10} more" if len(items) > 10 else shown
