"""Trains a language model: `python -m ranjax.train --dataset wikitext-2`."""

import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranjax.config import Config, check, parse, save_config
from ranjax.errors import UserError, exit_with_message
from ranjax.hugepages import restart_with_huge_pages
from ranjax.vocabulary import load_vocabulary, save_vocabulary

if TYPE_CHECKING:
    from ranjax.checkpoint import Checkpoints
    from ranjax.data import Corpus
    from ranjax.evaluate import Evaluation
    from ranjax.report import Report
    from ranjax.step import TrainState

SAVE_SECONDS = 60.0


def train(config: Config) -> dict[str, Any]:
    """Trains, validates after each epoch, tests the best state, and writes all of it to the run's directory.

    Returns:
      What `result.json` holds.

    Raises:
      UserError: for bad input, a directory that exists, five steps in a row that were not finite.
      SystemExit: after an interrupt, once the state is saved.
    """
    directory = config.directory
    if directory.exists() and not config.resume:
        raise UserError(
            f"--out {directory} exists and is left as it is. Go on with it: --out {directory} --resume; or give "
            "another --out."
        )
    import jax

    from ranjax.checkpoint import Checkpoints
    from ranjax.data import columns, load_corpus, windows_per_epoch
    from ranjax.evaluate import make_evaluator
    from ranjax.report import Report
    from ranjax.step import build_model, initial_state, make_optimizer, make_step

    check(config)
    corpus = load_corpus(config.dataset, config.data_dir, config.tokenizer)
    text = columns(corpus.train, config.batch_size, config.steps)
    windows = windows_per_epoch(text.shape[1], config.steps)
    model = build_model(config, len(corpus.vocabulary))
    optimizer = make_optimizer(config, windows)
    checkpoints = Checkpoints(directory)
    state = _begin(config, corpus, initial_state(model, optimizer, config))

    report = Report(directory, config, windows, first_step=int(state.step))
    step = make_step(model, optimizer, config, windows)
    loop = Loop(config, step, jax.device_put(text), windows, checkpoints, report)
    evaluate = make_evaluator(model)
    with report, _interrupts(report) as stop:
        while int(state.epoch) < config.epochs:
            state = loop.epoch(state, stop)
            evaluation = evaluate(state.params, corpus.valid)
            stop.saved = None  # a save that is cut short would leave threads that wait for its end
            state = loop.validate(state, evaluation)
        stop.saved = int(state.step)
        best = checkpoints.load("best", state.params)
        return report.result(corpus, state, evaluate(best, corpus.valid), evaluate(best, corpus.test))


def _begin(config: Config, corpus: "Corpus", state: "TrainState") -> "TrainState":
    """Makes the run's directory with `state` in it, or takes the state of the run that is there to go on from."""
    from ranjax.checkpoint import Checkpoints

    directory = config.directory
    if config.resume:
        _check_text(directory, corpus)
        state = Checkpoints(directory).load("latest", state)
        save_config(config, directory)
        return state
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")  # a kill leaves no run that is half there
    unfinished.mkdir(parents=True)
    try:
        _save_text(unfinished, corpus)
        Checkpoints(unfinished).save("latest", 0, state)
        save_config(config, unfinished)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return state


@dataclass
class Loop:
    """The loop over an epoch's windows: dispatches steps, looks at them about once a second, saves now and then."""

    config: Config
    step: "Callable[[TrainState, Any], TrainState]"
    text: Any
    windows: int
    checkpoints: "Checkpoints"
    report: "Report"

    def epoch(self, state: "TrainState", stop: "Interrupt") -> "TrainState":
        """Trains to the end of the state's epoch and saves; an interrupt saves too and leaves the program."""
        stop.saved = None
        at, end = int(state.step), (int(state.epoch) + 1) * self.windows
        burst, saved = 1, time.monotonic()
        while at < end:
            began, compiling = time.monotonic(), not self.report.steps
            n = min(burst, end - at)
            for _ in range(n):
                state = self.step(state, self.text)
            at += n
            self._check(state)  # waits for the burst
            elapsed = time.monotonic() - began
            if not compiling:
                state = state._replace(seconds=state.seconds + elapsed, timed=state.timed + n)
                burst = max(1, min(2 * burst, round(burst / elapsed)))
            self.report.progress(state, n, elapsed)
            if stop.signal is not None or at == end or time.monotonic() - saved > SAVE_SECONDS:
                self._save(state)
                saved = time.monotonic()
            if stop.signal is not None:
                self.report.interrupted(at)
                raise SystemExit(128 + stop.signal)
        stop.saved = at
        return state

    def validate(self, state: "TrainState", evaluation: "Evaluation") -> "TrainState":
        """Ends an epoch: keeps the state if it is the best so far, and saves it to go on from."""
        if not math.isfinite(evaluation.nats):
            raise UserError(
                f"the validation loss is {evaluation.nats}; the checkpoints before it are intact. Lower "
                "--learning-rate or --clip and start again, with another --out."
            )
        if evaluation.nats < float(state.best):
            self.checkpoints.save("best", int(state.step), state.params)
            state = state._replace(best=state.best.at[()].set(evaluation.nats))
        state = state._replace(epoch=state.epoch + 1)
        self._save(state)
        self.report.epoch(state, evaluation)
        return state

    def _save(self, state: "TrainState") -> None:
        """The end of an epoch is saved before its validation and after it: the number grows with either."""
        self.checkpoints.save("latest", int(state.step) + int(state.epoch), state)

    def _check(self, state: "TrainState") -> None:
        from ranjax.step import BAD_STEPS

        if int(state.bad_in_row) >= BAD_STEPS:
            raise UserError(
                f"the loss or its gradient was not finite {BAD_STEPS} steps in a row, up to step {int(state.step)}; "
                "the last good checkpoint is intact. Lower --learning-rate or --clip and start again, with another "
                "--out."
            )


@dataclass
class Interrupt:
    """A wish to stop.

    Attributes:
      signal: the signal that came, if one did.
      saved: the step at which all that there is to save is saved, so that a signal may end the program at once.
    """

    signal: int | None = None
    saved: int | None = None


@contextmanager
def _interrupts(report: "Report") -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one is not waited for."""
    asked = Interrupt()

    def ask(number, _):
        if asked.saved is not None:
            report.interrupted(asked.saved)
            raise SystemExit(128 + number)
        asked.signal = number
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_text(directory: Path, corpus: "Corpus") -> None:
    """The vocabulary, and what identifies the text."""
    save_vocabulary(corpus.vocabulary, directory / "vocabulary.json")
    (directory / "text.json").write_text(json.dumps(_identity(corpus), indent=2) + "\n", "utf-8")


def _check_text(directory: Path, corpus: "Corpus") -> None:
    """A run goes on with the text and the vocabulary it began with."""
    if load_vocabulary(directory / "vocabulary.json") != corpus.vocabulary:
        changed = "the vocabulary of the data set"
    elif json.loads((directory / "text.json").read_text("utf-8")) != _identity(corpus):
        changed = "the text of the data set"
    else:
        return
    raise UserError(
        f"{changed} is not the one the run in {directory} was trained with. Resume with the text it began with (the "
        "embedded corpora change with the version of Python)."
    )


def _identity(corpus: "Corpus") -> dict[str, Any]:
    parts = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    return {
        name: {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()} for name, ids in parts.items()
    }


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with exit_with_message():
        train(parse(argv))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
