"""A whole run: its beginning, its training, its end, and the text that it was trained with."""

import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from ranjax.cli import Stop, Stopped, refusals, stopping
from ranjax.data import Corpus, columns, identity, load_corpus, load_split, windows_per_epoch
from ranjax.data.files import SPLITS
from ranjax.data.vocabulary import load_vocabulary, save_vocabulary
from ranjax.errors import UserError, check_path
from ranjax.saved import read_sealed, write_sealed
from ranjax.training.checkpoint import Checkpoints, Saver
from ranjax.training.config import Config, check, check_same, goes_on, load_config, normalised, save_config
from ranjax.training.cost import step_cost
from ranjax.training.environment import check_environment, save_environment
from ranjax.training.folder import absolute, is_empty
from ranjax.training.loop import Loop
from ranjax.training.loss import Constraint, unconstrained
from ranjax.training.mesh import described, make_mesh, put, put_text, shardings
from ranjax.training.metrics import agreed, finite, make_evaluator
from ranjax.training.model import Run, build_model
from ranjax.training.optimizer import evaluated, make_optimizer
from ranjax.training.processes import agree, alone, from_first, is_first, on_first, say, whole
from ranjax.training.profile import checked_profile_dir, profiled
from ranjax.training.report import Report, Silent
from ranjax.training.size import COPIES, check_memory, check_step, described_run
from ranjax.training.step import TrainState, initial_state, make_step
from ranjax.training.track import check_trackers
from ranjax.training.windows import Steps

UNFINISHED = ".ranjax-"  # begins the name of a run's directory until it is complete
SOON = 60.0  # seconds in which a program that begins a run has locked its directory
CHANGES = "(the embedded corpora change with the version of Python)"


def train(config: Config, *, constrain: Constraint = unconstrained, stop: Stop | None = None) -> dict[str, Any]:
    """Trains, validates after each epoch, tests the best state, and writes all of it to the run's directory.

    Args:
      config: the settings.
      constrain: a function of the parameters, what the model computes with in their place; the identity by default.
        What is saved is constrained. Resume with the same one: it is not saved.
      stop: where a caller listens for signals itself, its wish to stop. By default `cli.SIGNALS` are listened for.

    Returns:
      The content of `result.json`.

    Raises:
      UserError: for bad input, a directory that exists, a run that another program trains, five steps in a row that
        were not finite.
      SystemExit: after a signal, once the state is saved.
    """
    check(config)
    config = normalised(config)
    resume = bool(from_first(on_first(lambda: np.bool(goes_on(config)), np.False_)))
    try:
        return _train(replace(config, resume=resume), constrain, stop)
    except _BegunError:  # by another start of the same command, meanwhile
        if config.resume != "auto" or not alone():
            raise
        return _train(replace(config, resume=True), constrain, stop)


def _train(config: Config, constrain: Constraint, stop: Stop | None) -> dict[str, Any]:
    """Trains with settings that have been checked, and whose `resume` is true or false."""
    mesh = make_mesh(config)
    config = on_first(lambda: _checked(config), replace(config, track=(), profile_dir=None))
    corpus = _corpus(config)
    text = columns(corpus.train, config.batch_size, config.steps)
    windows = windows_per_epoch(text.shape[1], config.steps)
    model, optimizer = build_model(config, len(corpus.vocabulary)), make_optimizer(config, windows)
    state = initial_state(model, optimizer, config, constrain)
    with ExitStack() as held:
        stop = held.enter_context(stopping() if stop is None else nullcontext(stop))
        state = from_first(on_first(lambda: _begin(config, corpus, state, windows, held), state))
        state, text = put(state, shardings(mesh, state)), put_text(mesh, text)
        step = make_step(model, optimizer, config, windows, constrain, mesh)
        with _nothing_left(config):
            steps = Steps(step, state, text, config, windows)
            say(described_run(config, corpus), check_step(steps.longest), *described(mesh))
        if int(state.step):
            say(f"it goes on from step {int(state.step):,} of {windows * config.epochs:,}, the last that was saved")
        cost = step_cost(config, state.params, corpus.train, steps.longest, mesh.size)
        reporter, at = Report if is_first() else Silent, (int(state.step), int(state.epoch))
        report = held.enter_context(reporter(config.directory, config, windows, *at, mesh.size, cost))
        saver = held.enter_context(Saver(Checkpoints(config.directory)))
        evaluate = make_evaluator(model, config.streams, stop.check if alone() else lambda: None, mesh)
        traced = held.enter_context(profiled(steps, config.profile_dir))
        loop = Loop(saver, report, traced, text, windows, stop, evaluated(config))
        try:
            state = loop.epochs(state, config.epochs, lambda params: agreed(evaluate(whole(params), corpus.valid)))
            best = from_first(on_first(lambda: saver.checkpoints.load("best", state.params), whole(state.params)))
            return report.result(corpus, state, finite(evaluate(best, corpus.test)))
        except Stopped:
            saver.wait()
            report.interrupted()
            raise


def _corpus(config: Config) -> Corpus:
    """The text, after checks that its vocabulary is for these settings and that all processes have it."""
    corpus = load_corpus(config.dataset, config.data_dir, config.tokenizer)
    shared = replace(config, data_dir=None, out=None, track=(), profile_dir=None)
    agree((shared, _identity(corpus), corpus.vocabulary))
    _check_words(config, corpus)
    check_memory(config, len(corpus.vocabulary), COPIES[config.optimizer] + (config.average != "never"))
    return corpus


@contextmanager
def _nothing_left(config: Config) -> Iterator[None]:
    """Removes the directory of a new run whose step cannot be compiled or takes too much memory."""
    try:
        yield
    except (UserError, RuntimeError, ValueError):  # the latter of JAX and XLA
        if not config.resume and is_first():
            shutil.rmtree(config.directory, ignore_errors=True)
        raise


def _check_words(config: Config, corpus: Corpus) -> None:
    """Raises a UserError for an adaptive softmax over ids that are not in the order of frequency."""
    kind = corpus.vocabulary.tokenizer
    if config.softmax == "adaptive" and kind != "word":
        raise UserError(
            "--softmax adaptive needs words, whose ids are in the order of frequency; the tokens of this text are of "
            f"the kind {kind}. Use --tokenizer word or --softmax full."
        )


def _checked(config: Config) -> Config:
    """The settings, after a check of all that is beside them: directories and packages."""
    _check_directory(config)
    check_trackers(config.track)
    return checked_profile_dir(config)


def _check_directory(config: Config) -> None:
    """Raises a UserError for a run that would go on with other settings, or overwrite something."""
    directory = config.directory
    if config.resume:
        check_same(config, load_config(directory))
    elif os.path.lexists(directory) and not is_empty(directory):
        raise _exists(directory)


class _BegunError(UserError):
    """The directory of a run that is to begin exists."""


def _exists(directory: Path) -> UserError:
    resume = f"Go on with it: --out {shlex.quote(str(directory))} --resume; or give"
    mend = resume if (directory / "config.json").exists() else "Give"
    return _BegunError(f"--out {directory} exists and is left unchanged. {mend} another --out.")


def _begin(config: Config, corpus: Corpus, state: TrainState, windows: int, held: ExitStack) -> TrainState:
    """Creates the run's directory with `state` in it, or returns the saved state of the run that goes on.

    The run is then this program's alone until `held` is closed.
    """
    directory = config.directory
    if not config.resume:
        _create(config, corpus, state, held)
        return state
    _lock(directory, held)
    _check_text(directory, corpus)
    check_environment(directory)
    state = Checkpoints(directory).load("latest", state)
    if int(state.step) > config.epochs * windows:
        begun = -(-int(state.step) // windows)
        raise UserError(f"--epochs must be at least {begun}, which the run has begun; got {config.epochs}.")
    with refusals(directory / "config.json"):
        save_config(config, directory)
    return state


def _create(config: Config, corpus: Corpus, state: TrainState, held: ExitStack) -> None:
    """Creates the run's directory, all of it or none: a kill leaves no run that is half complete."""
    directory = config.directory
    # In containers a process number is no name: many have the same.
    unfinished = directory.with_name(f"{UNFINISHED}{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
        with FileLock(unfinished / ".open"):
            _clean(directory.parent)
            _save_text(unfinished, corpus)
            save_environment(unfinished)
            Checkpoints(unfinished).save("latest", 0, state)
            _read_back(unfinished, state)
            save_config(config, unfinished)
        (unfinished / ".open").unlink(missing_ok=True)
        unfinished.rename(directory)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and os.path.lexists(directory):  # begun by another program meanwhile
            raise _exists(directory) from None
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"--out {directory} cannot be written: {why}. Give another --out.") from None
        raise
    _lock(directory, held)


def _read_back(directory: Path, state: TrainState) -> None:
    """Raises a UserError where a state does not come back as it was saved, so that no training is lost there."""
    loaded = Checkpoints(directory).load("latest", state)
    if not all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(state))):
        raise UserError(f"what is saved in {directory.parent} is not read as it was written. Give another --out.")


def _clean(parent: Path) -> None:
    """Removes what runs that were killed before their first step have left beside this one."""
    for path in parent.glob(f"{UNFINISHED}*"):
        with suppress(Timeout, OSError):
            if (path / ".open").exists():
                with FileLock(path / ".open", blocking=False):
                    shutil.rmtree(path)
            elif time.time() - path.stat().st_mtime > SOON:
                path.rmdir()  # not if there is anything in it


def _lock(directory: Path, held: ExitStack) -> None:
    """Keeps others from the run; the system opens the lock of a program that was killed."""
    try:
        held.enter_context(FileLock(directory / ".lock", blocking=False))
    except Timeout:
        raise UserError(
            f"the run in {directory} is being trained by another program. Wait for its end, or stop it, and --resume."
        ) from None
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written: {error.strerror or error}. A run is trained where it can be saved."
        ) from None


def _save_text(directory: Path, corpus: Corpus) -> None:
    """The vocabulary, and what identifies the text."""
    save_vocabulary(corpus.vocabulary, directory / "vocabulary.json")
    write_sealed(directory / "text.json", _identity(corpus))


def _check_text(directory: Path, corpus: Corpus) -> None:
    """A run goes on with the text and the vocabulary it began with."""
    if load_vocabulary(directory / "vocabulary.json") != corpus.vocabulary:
        changed = "the vocabulary of the data set"
    elif _read_text(directory) != _identity(corpus):
        changed = "the text of the data set"
    else:
        return
    raise UserError(
        f"{changed} is not the one the run in {directory} was trained with. Resume with the text it began with "
        f"{CHANGES}."
    )


def _read_text(directory: Path) -> dict[str, Any]:
    """What identifies each split of the text of a run."""
    return read_sealed(directory / "text.json", dict.fromkeys(SPLITS, lambda value: isinstance(value, dict)))


def _identity(corpus: Corpus) -> dict[str, Any]:
    return {"train": identity(corpus.train), "valid": identity(corpus.valid), "test": identity(corpus.test)}


def load_text(run: Run, directory: str | Path, split: str, data_dir: str | None = None) -> np.ndarray:
    """The ids of a split of the text that the run in this directory was trained with.

    Args:
      run: as `load_run` returns it.
      directory: of the run.
      split: `"train"`, `"valid"` or `"test"`.
      data_dir: the folder of the text, where that is not the run's own.

    Raises:
      UserError: if it is missing, or is another text by now.
      ValueError: for another `split`.
    """
    if data_dir is not None:
        check_path("data_dir", data_dir)
    dataset, data_dir = run.config.dataset, data_dir or run.config.data_dir
    ids = load_split(dataset, split, run.vocabulary, data_dir)
    if _read_text(absolute(directory))[split] != identity(ids):
        there = f"--split {split} --dataset {shlex.quote(dataset)}"
        there += f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
        raise UserError(
            f"the {split} split of {dataset} is not the one that the run in {directory} was trained with, and may "
            f"hold what it was trained on {CHANGES}. Restore it; or, to read "
            f"what is there: python -m ranjax.evaluate --checkpoint {shlex.quote(str(directory))} {there}"
        )
    return ids
