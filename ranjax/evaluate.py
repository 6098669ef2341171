"""Exact evaluation of a language model: `python -m ranjax.evaluate --checkpoint DIR`."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.choices import Split
from ranjax.device import check_device
from ranjax.errors import UserError, flag

if TYPE_CHECKING:
    import numpy as np

    from ranjax.training.metrics import Evaluation as Evaluation
    from ranjax.training.metrics import make_evaluator as make_evaluator
    from ranjax.training.metrics import perplexity as perplexity
    from ranjax.training.model import Run as Run
    from ranjax.training.model import load_run as load_run
    from ranjax.training.run import load_text as load_text
    from ranjax.training.score import log_probabilities as log_probabilities

METRICS, MODEL, RUN = "ranjax.training.metrics", "ranjax.training.model", "ranjax.training.run"
SCORE = "ranjax.training.score"
__getattr__ = cli.lazy(
    __name__,
    {
        "Evaluation": METRICS,
        "make_evaluator": METRICS,
        "perplexity": METRICS,
        "Run": MODEL,
        "load_run": MODEL,
        "load_text": RUN,
        "log_probabilities": SCORE,
    },
)


@dataclass(frozen=True)
class Options:
    """Evaluates a run on a whole split, every prediction counted."""

    checkpoint: str
    """The --out directory of a run, or a folder that ranjax.export wrote."""
    dataset: str | None = None
    """Another corpus; that of the run if not given. Its text is read with the run's vocabulary."""
    data_dir: str | None = None
    """Folder of the data set; that of the run if neither is given."""
    split: Split | None = None
    """Which part of the corpus; if not given, the test split, or the whole of another text that is one file."""
    text: str | None = None
    """A text file, in place of a corpus: all of it, as one stream. Its first token is not counted."""
    out: str | None = None
    """With --text, a new file (.jsonl): position, text, id and log-probability in nats of each token."""


def check_options(given: Options) -> None:
    """Raises a UserError for flags that do not go together, or an --out that cannot be written."""
    others = [name for name in ("dataset", "data_dir", "split") if getattr(given, name) is not None]
    if given.text is not None and others:
        raise UserError(
            f"--text is a text of its own; got it with {' and '.join(map(flag, others))}. Give one of them."
        )
    if given.out is None:
        return
    out = Path(os.path.expanduser(given.out))
    if given.text is None:
        raise UserError(f"--out is for the tokens of a --text; got --out {out} without it.")
    if out.suffix.lower() != ".jsonl":
        raise UserError(f"--out must end in .jsonl; got {out}.")
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists and is left unchanged. Give another --out.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out must be in a directory that exists; got {out}.")


def read_ids(run: "Run", text: str) -> "np.ndarray":
    """The ids of the text in a file, by the vocabulary of a run."""
    from ranjax.data import encoded
    from ranjax.data.files import read_file

    path = Path(os.path.expanduser(text))
    if not text or not path.exists() or path.is_dir():
        kind = "a directory" if text and path.is_dir() else "no file"
        raise UserError(f"--text must be a text file; got {text!r}, which is {kind}.")
    return encoded(run.vocabulary, read_file(path), f"--text {path}")


def evaluate_text(run: "Run", given: Options) -> str:
    """Evaluates the text of --text, writes its tokens to --out, and returns the line to print."""
    from ranjax.data.vocabulary import unknown
    from ranjax.training.score import score

    ids, out = read_ids(run, str(given.text)), Path(os.path.expanduser(given.out or os.devnull))
    try:
        with nullcontext() if given.out is None else cli.written_whole(out) as file:
            evaluation = score(run.model, run.params, run.vocabulary, ids, file)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
    line = evaluation.line(run.vocabulary.unit or "token", unknown(run.vocabulary, ids[1:]))
    return f"{given.text}: {line}" + ("" if given.out is None else f"; written: {out}")


def evaluate_corpus(run: "Run", given: Options) -> str:
    """Evaluates a split of the run's corpus or of another one, and returns the line to print."""
    from ranjax.data import load_split, split_of
    from ranjax.data.vocabulary import unknown
    from ranjax.training.metrics import finite, make_evaluator
    from ranjax.training.run import load_text

    if given.dataset is None:
        split = given.split or "test"
        ids = load_text(run, given.checkpoint, split, given.data_dir)
    else:
        split = given.split or split_of(given.dataset)
        ids = load_split(given.dataset, split, run.vocabulary, given.data_dir)
    evaluation = finite(make_evaluator(run.model, run.config.streams)(run.params, ids))
    line = evaluation.line(run.vocabulary.unit, unknown(run.vocabulary, ids[1:]))
    return f"{given.dataset or run.config.dataset} {split}: {line}"


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        given = cli.options(Options, argv, "python -m ranjax.evaluate")
        check_options(given)
        check_device()
        from ranjax.training.model import load_run

        run = load_run(given.checkpoint)
        print((evaluate_corpus if given.text is None else evaluate_text)(run, given))


if __name__ == "__main__":
    cli.start(main, huge_pages=True)
