"""Exact evaluation of a language model: `python -m ranjax.evaluate --checkpoint DIR`."""

import math
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ranjax.errors import UserError, check_size, exit_with_message, read_json
from ranjax.cli import restart_with_huge_pages

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import ArrayLike

    from ranjax.training.config import Config
    from ranjax.lm import LanguageModel
    from ranjax.data.vocabulary import Vocabulary

MOST = 1e100  # perplexity: JSON and pictures have no infinity
# Tokens a call. The state goes on from one to the next, so the result does not depend on it; of several streams,
# though, each but the first reads as many before it counts.
WINDOW = 512


def perplexity(nats: float) -> float:
    """exp(nats), at most `MOST`."""
    return min(math.exp(min(nats, 700.0)), MOST)


def shown(perplexity: float) -> str:
    """Two digits after the point; of a model that has diverged, three in all."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text.

    Attributes:
      nats: mean cross-entropy of a prediction.
      tokens: number of predictions that count: of a whole text, one less than it has tokens.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats)

    @property
    def bits(self) -> float:
        """Mean bits a prediction."""
        return self.nats / math.log(2)


@dataclass(frozen=True)
class Run:
    """A trained model: the best parameters of a run, its settings and its vocabulary."""

    config: "Config"
    vocabulary: "Vocabulary"
    model: "LanguageModel"
    params: Any


def load_run(directory: str | Path) -> Run:
    """Loads the best state of the run that `--out` named.

    Raises:
      UserError: if the directory is not a run, has no checkpoint yet, or one that does not fit its settings.
    """
    import jax
    import jax.numpy as jnp

    from ranjax.training.checkpoint import Checkpoints
    from ranjax.training.config import load_config
    from ranjax.training.step import build_model
    from ranjax.data.vocabulary import load_vocabulary

    directory = Path(os.path.expanduser(directory)).resolve()
    config = load_config(directory)
    vocabulary = load_vocabulary(directory / "vocabulary.json")
    model = build_model(config, len(vocabulary))
    init = partial(model.init, deterministic=True)
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return Run(config, vocabulary, model, Checkpoints(directory).load("best", like))


def load_text(run: Run, directory: str | Path, split: str, data_dir: str | None = None) -> "np.ndarray":
    """The ids of a split of the text that the run in this directory was made with.

    Args:
      data_dir: the folder it is in, where that is not the run's own.

    Raises:
      UserError: if it is not there, or is another text by now.
      ValueError: for a `split` other than `"train"`, `"valid"` and `"test"`.
    """
    from ranjax.data import identity, load_split

    dataset, data_dir = run.config.dataset, data_dir or run.config.data_dir
    ids = load_split(dataset, split, run.vocabulary, data_dir)
    if read_json(Path(os.path.expanduser(directory)) / "text.json").get(split) != identity(ids):
        there = f"--split {split} --dataset {shlex.quote(dataset)}"
        there += f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
        raise UserError(
            f"the {split} split of {dataset} is not the one that the run in {directory} was made with, and may hold "
            "what it was trained on (the embedded corpora change with the version of Python). Restore it; or, to read "
            f"what is there: python -m ranjax.evaluate --checkpoint {shlex.quote(str(directory))} {there}"
        )
    return ids


def make_evaluator(model: "LanguageModel", streams: int = 1) -> Callable[..., Evaluation]:
    """`evaluate(params, ids, counted=None) -> Evaluation`: the whole text as one stream.

    Every prediction counts, once, or those of the tokens that `counted`, bool of the shape of `ids`, marks. Of several
    `streams` each but the first begins `WINDOW` tokens before those that it counts: side by side they are read sooner,
    and the state at a stream's first prediction remembers no further back.

    Raises:
      ValueError: for a number of streams that is none; from the function, for ids that are not the model's, for
        `counted` of another shape or dtype, or with none marked.
      UserError: from the function, for a text without a prediction.

    Example:
      >>> import jax, numpy as np, ranjax
      >>> from ranjax.evaluate import make_evaluator
      >>> model, ids = ranjax.LanguageModel(vocabulary=9, layers=1, features=4), np.arange(100) % 9
      >>> params = model.init(jax.random.key(0), ids[None, :1], deterministic=True)["params"]
      >>> make_evaluator(model)(params, ids).tokens
      99
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ranjax.lm import cross_entropy, zero_state

    check_size("streams", streams)

    @partial(jax.jit, donate_argnums=1)
    def window(params, state, tokens, targets):
        logits, state = model.apply({"params": params}, tokens, state, deterministic=True)
        return state, jnp.sum(jnp.where(targets < 0, 0.0, cross_entropy(logits, jnp.maximum(targets, 0))))

    def evaluate(params, ids, counted=None) -> Evaluation:
        ids = checked_text("ids", ids, model.vocabulary)
        if len(ids) < 2:
            raise UserError(f"a text of at least 2 tokens is needed to predict one from another; got {len(ids)}.")
        counts = np.ones(len(ids) - 1, bool) if counted is None else _checked_marks(np.asarray(counted), len(ids))[1:]
        side_by_side = min(streams, max(1, -(-(len(counts) - WINDOW) // WINDOW)))  # others would have no text
        state, losses = zero_state(model, params, side_by_side), []
        for inputs, outputs in _windows(ids[:-1], np.where(counts, ids[1:], -1), side_by_side):
            state, loss = window(params, state, inputs, outputs)
            losses.append(loss)
        total, number = np.sum(jax.device_get(losses), dtype=np.float64), int(counts.sum())
        return Evaluation(float(total) / number, number)

    return evaluate


def checked_text(name: str, ids: "ArrayLike", vocabulary: int) -> "np.ndarray":
    """The ids of a text as int32, once they are seen to be the model's."""
    import numpy as np

    text, expected = np.asarray(ids), f"whole numbers from 0 to {vocabulary - 1}, the model's"
    if not np.issubdtype(text.dtype, np.number):
        raise ValueError(f"`{name}` must be {expected}; got {ids!r:.40}.")
    if text.ndim != 1:
        raise ValueError(f"`{name}` must be the ids of one text, (tokens,); got the shape {text.shape}.")
    if len(text) and (not np.issubdtype(text.dtype, np.integer) or text.min() < 0 or text.max() >= vocabulary):
        raise ValueError(f"`{name}` must be {expected}; got {text.dtype} from {text.min()} to {text.max()}.")
    return text.astype(np.int32)


def _checked_marks(counted: "np.ndarray", tokens: int) -> "np.ndarray":
    """The marks of a text of so many tokens, once one that has a prediction is seen to be marked."""
    fits = counted.shape == (tokens,) and counted.dtype == bool
    if not (fits and counted[1:].any()):
        got = "no such mark" if fits else f"{counted.dtype} of the shape {counted.shape}"
        raise ValueError(
            f"`counted` must be bool, of the shape {(tokens,)} of `ids`, and mark a token after the first; got {got}."
        )
    return counted


def _windows(tokens: "np.ndarray", targets: "np.ndarray", streams: int) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Both, a window of every stream at a time, `(streams, WINDOW)`; a target is -1 where it does not count."""
    import numpy as np

    own = -(-max(len(tokens) - WINDOW, 0) // (streams * WINDOW)) * WINDOW  # what a stream after the first counts
    padding = (0, streams * own + WINDOW - len(tokens))
    tokens, targets = np.pad(tokens, padding), np.pad(targets, padding, constant_values=-1)
    for first in range(0, own + WINDOW, WINDOW):
        at = first + np.arange(streams)[:, None] * own + np.arange(WINDOW)
        outputs = targets[at]
        if first == 0:
            outputs[1:] = -1
        yield tokens[at], outputs


@dataclass(frozen=True)
class Options:
    """Evaluates the best state of a run on a whole split, every prediction counted: one stream of text, or as many as
    the run's --streams."""

    checkpoint: str
    """The --out directory of a run."""
    dataset: str | None = None
    """Another corpus; that of the run if not given. Its text is read with the run's vocabulary."""
    data_dir: str | None = None
    """Folder of the data set; that of the run if neither is given."""
    split: Literal["train", "valid", "test"] = "test"
    """Which part of the corpus."""


def evaluate_split(options: Options) -> tuple[Evaluation, Run, "np.ndarray"]:
    """What the program computes, of which run, and the ids of the split."""
    from ranjax.data import load_split

    run = load_run(options.checkpoint)
    if options.dataset is None:
        ids = load_text(run, options.checkpoint, options.split, options.data_dir)
    else:
        ids = load_split(options.dataset, options.split, run.vocabulary, options.data_dir)
    return make_evaluator(run.model, run.config.streams)(run.params, ids), run, ids


def report(evaluation: Evaluation, unit: str | None, unknown: int = 0) -> str:
    """One line: perplexity, bits a character or byte, and the number of tokens they are of."""
    bits = f", {evaluation.bits:.4f} bits per {unit}" if unit else ""
    tokens = f"{evaluation.tokens:,} tokens" + (f", {unknown:,} of them <unk>" if unknown else "")
    return f"perplexity {shown(evaluation.perplexity)}{bits}, {evaluation.nats:.4f} nats, {tokens}"


def main(argv: list[str] | None = None) -> None:
    """The program."""
    import tyro

    from ranjax.data.vocabulary import unknown

    with exit_with_message():
        options = tyro.cli(Options, args=argv, prog="python -m ranjax.evaluate")
        evaluation, run, ids = evaluate_split(options)
        line = report(evaluation, run.vocabulary.unit, unknown(run.vocabulary, ids[1:]))
        print(f"{options.dataset or run.config.dataset} {options.split}: {line}")


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
