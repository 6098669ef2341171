"""Trains a language model: `python -m ranjax.train --dataset wikitext-2`."""

import json
import secrets
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranjax.training.config import ITERATING, Config, check, check_same, load_config, normalised, parse, save_config
from ranjax.data import identity
from ranjax.errors import UserError, exit_with_message, read_json, refusals
from ranjax.cli import restart_with_huge_pages
from ranjax.data.vocabulary import load_vocabulary, save_vocabulary

if TYPE_CHECKING:
    from ranjax.data import Corpus
    from ranjax.training.loop import Training
    from ranjax.training.step import TrainState


def train(config: Config) -> dict[str, Any]:
    """Trains, validates after each epoch, tests the best state, and writes all of it to the run's directory.

    Returns:
      What `result.json` holds.

    Raises:
      UserError: for bad input, a directory that exists, a run that another program trains, five steps in a row that
        were not finite.
      SystemExit: after an interrupt, once the state is saved.
    """
    return train_together([config])[0]


def train_together(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Trains runs that differ by their seeds side by side: one program makes the steps of all of them.

    Each is a run of its own in its own directory, as `train` would have made it but for rounding. Its seconds are those
    of all runs together, so that its `tokens_per_second` is its share. One that diverges ends them all.

    Args:
      configs: settings that differ in `seed`, `out` and `resume` alone. Runs that go on from different steps are
        trained one after another, and so are those of a solver that iterates, which side by side would walk too.

    Returns:
      What each `result.json` holds.

    Raises:
      UserError: as `train`; for settings that differ in more.
      SystemExit: after an interrupt, once the states are saved.
    """
    if not configs:
        return []
    for config in configs:
        check(config)
    configs = [normalised(config) for config in configs]
    _check_together(configs)
    import jax

    from ranjax.training.checkpoint import Checkpoints
    from ranjax.data import columns, load_corpus, windows_per_epoch
    from ranjax.evaluate import make_evaluator
    from ranjax.training.loop import Loop, Training, interrupts, together
    from ranjax.training.report import Report
    from ranjax.training.step import build_model, initial_state, make_optimizer, make_step

    first = configs[0]
    if len(configs) > 1 and first.solver in ITERATING:
        return [train(config) for config in configs]
    corpus = load_corpus(first.dataset, first.data_dir, first.tokenizer)
    text = columns(corpus.train, first.batch_size, first.steps)
    windows = windows_per_epoch(text.shape[1], first.steps)
    model = build_model(first, len(corpus.vocabulary))
    optimizer = make_optimizer(first, windows)
    with ExitStack() as held:
        states = [_begin(config, corpus, initial_state(model, optimizer, config), windows, held) for config in configs]
        if len({(int(state.step), int(state.epoch)) for state in states}) > 1:
            held.close()
            return [train(replace(config, resume=True)) for config in configs]

        at = int(states[0].step), int(states[0].epoch)
        reports = [Report(c.directory, c, windows, *at, len(configs), quiet=c is not first) for c in configs]
        runs = [Training(Checkpoints(report.directory), report) for report in reports]
        step = make_step(model, optimizer, first, windows, [config.seed for config in configs])
        loop, evaluate = Loop(runs, step, jax.device_put(text), windows), make_evaluator(model, first.streams)
        state = together(states)
        del states  # the loop holds all that training needs, once
        with runs[0].report, interrupts(runs) as stop:
            parts = loop.epochs(state, first.epochs, lambda params: evaluate(params, corpus.valid), stop)
            return [_result(run, corpus, part, evaluate) for run, part in zip(runs, parts, strict=True)]


def _check_together(configs: Sequence[Config]) -> None:
    """Raises a UserError for runs that cannot be trained side by side, or would overwrite another."""
    first = configs[0]
    if any(replace(config, seed=first.seed, out=first.out, resume=first.resume) != first for config in configs):
        raise UserError("runs side by side must have the same settings, but for --seed, --out and --resume.")
    if len({config.directory for config in configs}) < len(configs):
        raise UserError("runs side by side must have an --out each.")
    for config in configs:
        directory = config.directory
        if config.resume:
            check_same(config, load_config(directory))
        elif directory.exists():
            resume = f"Go on with it: --out {shlex.quote(str(directory))} --resume; or give"
            mend = resume if (directory / "config.json").exists() else "Give"
            raise UserError(f"--out {directory} exists and is left as it is. {mend} another --out.")


def _result(run: "Training", corpus: "Corpus", state: "TrainState", evaluate: Callable) -> dict[str, Any]:
    best = run.checkpoints.load("best", state.params)
    return run.report.result(corpus, state, evaluate(best, corpus.test))


def _begin(config: Config, corpus: "Corpus", state: "TrainState", windows: int, held: ExitStack) -> "TrainState":
    """Makes the run's directory with `state` in it, or takes the state of the run that is there to go on from.

    The run is then this program's alone until `held` is closed.
    """
    from ranjax.training.checkpoint import Checkpoints

    directory = config.directory
    if config.resume:
        _lock(directory, held)
        _check_text(directory, corpus)
        state = Checkpoints(directory).load("latest", state)
        if int(state.step) > config.epochs * windows:
            begun = -(-int(state.step) // windows)
            raise UserError(f"--epochs must be at least {begun}, which the run has begun; got {config.epochs}.")
        with refusals(directory / "config.json"):
            save_config(config, directory)
        return state
    # A kill leaves no run that is half there. In containers the number of a process is no name: many have the same.
    unfinished = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        unfinished.mkdir(parents=True)
        _save_text(unfinished, corpus)
        Checkpoints(unfinished).save("latest", 0, state)
        save_config(config, unfinished)
        unfinished.rename(directory)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"--out {directory} cannot be written: {why}. Give another --out.") from None
        raise
    _lock(directory, held)
    return state


def _lock(directory: Path, held: ExitStack) -> None:
    """Keeps others from the run; the system opens the lock of a program that was killed."""
    from filelock import FileLock, Timeout

    try:
        held.enter_context(FileLock(directory / ".lock", blocking=False))
    except Timeout:
        raise UserError(
            f"the run in {directory} is being trained by another program. Wait for its end, or stop it, and --resume."
        ) from None


def _save_text(directory: Path, corpus: "Corpus") -> None:
    """The vocabulary, and what identifies the text."""
    save_vocabulary(corpus.vocabulary, directory / "vocabulary.json")
    (directory / "text.json").write_text(json.dumps(_identity(corpus), indent=2) + "\n", "utf-8")


def _check_text(directory: Path, corpus: "Corpus") -> None:
    """A run goes on with the text and the vocabulary it began with."""
    if load_vocabulary(directory / "vocabulary.json") != corpus.vocabulary:
        changed = "the vocabulary of the data set"
    elif read_json(directory / "text.json") != _identity(corpus):
        changed = "the text of the data set"
    else:
        return
    raise UserError(
        f"{changed} is not the one the run in {directory} was trained with. Resume with the text it began with (the "
        "embedded corpora change with the version of Python)."
    )


def _identity(corpus: "Corpus") -> dict[str, Any]:
    return {"train": identity(corpus.train), "valid": identity(corpus.valid), "test": identity(corpus.test)}


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with exit_with_message():
        train(parse(argv))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
