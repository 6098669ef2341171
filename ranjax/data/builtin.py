"""Corpora that need no network: documentation that every Python carries, and tasks of known entropy."""

import ast
import math
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ranjax.errors import UserError

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def python_docs() -> tuple[str, list[bytes]]:
    """Docstrings of the standard library and the topics of pydoc, as train, valid and test texts.

    Read with `ast`, never imported. Of every twenty texts one goes to valid and one to test. The text is that of
    the running Python's version, which the first value records.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = list(dict.fromkeys(text for path in _sources(library) for text in _docstrings(path)))
    texts += _topics(library / "pydoc_data" / "topics.py")
    if len(texts) < 100:
        raise UserError(f"the Python at {library} carries no sources to read. Give --dataset a text of your own.")
    parts = [
        [t for n, t in enumerate(texts) if n % 20 not in (9, 19)],
        [t for n, t in enumerate(texts) if n % 20 == 9],
        [t for n, t in enumerate(texts) if n % 20 == 19],
    ]
    return f"Python {platform.python_version()}", [("\n\n".join(part) + "\n").encode() for part in parts]


def _sources(library: Path) -> Iterator[Path]:
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(library).parts):
            yield path


def _parsed(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, OSError):  # a template, a file for another version, a link to nothing
            return None


def _docstrings(path: Path) -> Iterator[str]:
    tree = _parsed(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text.split()) > 3:
                yield text


def _topics(path: Path) -> list[str]:
    tree = _parsed(path) if path.exists() else None
    if tree is None:
        return []
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return [text.strip() for value in assigned for text in ast.literal_eval(value).values()]


TASKS = {"markov": 2, "copy": 9, "recall": 2}  # and the least distance of each
FARTHEST = 2048
TASK_TOKENS = (400_000, 20_000, 20_000)  # of train, valid and test of markov-D
TASK_RECORDS = (20_000, 1_000, 1_000)  # of those of copy-D and recall-D
TASK_LETTERS = "abcdefgh"


def task_of(name: str) -> tuple[str, int] | None:
    """The task that a data set's name means, and its distance; None if it means none.

    Raises:
      UserError: for a distance that the task does not have.
    """
    named = re.fullmatch(rf"({'|'.join(TASKS)})-([0-9]{{1,99}})", "markov-2" if name == "markov" else name)
    if named is None:
        return None
    task, distance = named[1], int(named[2])
    if not TASKS[task] <= distance <= FARTHEST:
        raise UserError(f"the distance of the task {task} must be {TASKS[task]} to {FARTHEST}; got {name!r}.")
    return task, distance


def task_texts(task: str, distance: int) -> list[bytes]:
    """Train, valid and test texts of a task, in which what matters lies `distance` tokens back.

    `markov-D` has the digits of `markov_ids` of order D. `copy-D` repeats eight random letters,
    `!abcdefgh.....?abcdefgh`, each D tokens after it stood there first. `recall-D` asks for one letter among others,
    `!cfhaagbd?c`. Their numbers of questions do not depend on D. Every text is drawn from a seed of its own.
    """
    if task == "markov":
        return ["".join(map(str, markov_ids(n, seed, distance))).encode() for seed, n in enumerate(TASK_TOKENS)]
    copied = 8 if task == "copy" else 1
    return [_questions(n, seed, copied, distance).encode() for seed, n in enumerate(TASK_RECORDS)]


def _questions(records: int, seed: int, copied: int, distance: int) -> str:
    """Records of letters, what lies between, a question mark and the letters again."""
    letters = np.random.default_rng(seed).choice(list(TASK_LETTERS), size=(records, distance - 1))
    if copied > 1:
        letters[:, copied:] = "."
    return "".join(f"!{row}?{row[:copied]}" for row in map("".join, letters))


def task_answers(text: str) -> np.ndarray:
    """Which tokens of a task's text are answers, those from a question mark to the next record: bool, `(tokens,)`."""
    tokens = np.array(list(text))
    asked, begun = np.cumsum(tokens == "?"), np.cumsum(tokens == "!")
    return (asked == begun) & (tokens != "?") & (asked > 0)


MARKOV_SYMBOLS = 8
MARKOV_NOISE = (0.7, 0.1, 0.06, 0.05, 0.04, 0.03, 0.01, 0.01)  # probabilities of e_t


def markov_ids(length: int, seed: int, order: int = 2) -> np.ndarray:
    r"""Symbols of a Markov source of the given order, every one of whose contexts is equally uncertain.

    .. math::
        x_t = x_{t-1} + 3 x_{t-\text{order}} + e_t \mod 8, \qquad e_t \sim \text{MARKOV\_NOISE}

    Given its context x_t is a shift of the same noise, so the entropy rate is that noise's entropy
    (`markov_entropy`, nats); x_t alone, or given fewer than `order` symbols, is uniform.

    Args:
      length: number of symbols.
      seed: of the random numbers.
      order: distance of the farther symbol, at least 2.

    Returns:
      int32 ids, `(length,)`.
    """
    if order < 2:
        raise UserError(f"`order` must be at least 2; got {order}.")
    rng = np.random.default_rng(seed)
    noise = rng.choice(MARKOV_SYMBOLS, size=length, p=MARKOV_NOISE)
    x = rng.integers(MARKOV_SYMBOLS, size=order).tolist()
    for e in noise.tolist():
        x.append((x[-1] + 3 * x[-order] + e) % MARKOV_SYMBOLS)
    return np.array(x[order:], np.int32)


def markov_entropy() -> float:
    """The entropy rate of `markov_ids`, in nats per symbol."""
    return -sum(p * math.log(p) for p in MARKOV_NOISE)
