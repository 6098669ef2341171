"""Trains a language model: `python -m ranjax.train --dataset wikitext-2`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ranjax.config import Config, parse, save_config
from ranjax.errors import UserError, exit_with_message
from ranjax.vocabulary import Vocabulary, load_vocabulary, save_vocabulary

if TYPE_CHECKING:
    import optax
    from jax import Array

    from ranjax.checkpoint import Checkpoints
    from ranjax.evaluate import Evaluation
    from ranjax.lm import LanguageModel
    from ranjax.report import Report

SAVE_SECONDS = 60.0
BAD_STEPS = 5


class TrainState(NamedTuple):
    """All that a run needs to go on bitwise; keys follow from the seed and the step.

    Attributes:
      params, optimizer: of the model and of optax.
      carry: the cells' states after the last window.
      step: windows trained on since the beginning; with `epoch` the position in the text.
      epoch: epochs finished, their validation included.
      loss, tokens: summed cross-entropy of the epoch so far, nats, and of how many predictions.
      bad, bad_in_row: steps skipped for a loss or gradient that was not finite.
      best: lowest validation loss so far, nats per token.
      seconds, timed: spent training, compilation left out, and on how many steps.
    """

    params: Any
    optimizer: Any
    carry: Any
    step: "Array"
    epoch: "Array"
    loss: "Array"
    tokens: "Array"
    bad: "Array"
    bad_in_row: "Array"
    best: "Array"
    seconds: "Array"
    timed: "Array"


def build_model(config: Config, vocabulary: int) -> "LanguageModel":
    """The model that a configuration describes."""
    from ranjax.lm import LanguageModel

    features = config.features[0] if len(config.features) == 1 else config.features
    names = ("cell", "layers", "embedding", "projection", "gates", "activation", "solver", "dropout", "tie")
    try:
        options = {name: getattr(config, name) for name in (*names, "init_scale")}
        return LanguageModel(vocabulary, features=features, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def learning_rate(config: Config, per_epoch: int) -> Callable[[Any], Any]:
    """The learning rate at a step, for an epoch of so many steps."""
    import jax.numpy as jnp
    import optax

    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        total = config.epochs * per_epoch
        warmup = min(config.warmup, total // 2)
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total, peak / 100)
    return lambda step: peak * config.decay ** jnp.maximum(step // per_epoch + 1 - config.decay_after, 0)


def make_optimizer(config: Config, per_epoch: int) -> "optax.GradientTransformation":
    """Global-norm clipping, then the update rule at the scheduled rate."""
    import optax

    rate = learning_rate(config, per_epoch)
    rule = optax.sgd(rate) if config.optimizer == "sgd" else optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def initial_state(model: "LanguageModel", optimizer: "optax.GradientTransformation", config: Config) -> TrainState:
    """The state before the first step."""
    import jax
    import jax.numpy as jnp

    tokens = jnp.zeros((config.batch_size, config.steps), jnp.int32)
    variables = model.init(jax.random.key(config.seed), tokens, deterministic=True)
    _, carry = jax.eval_shape(partial(model.apply, deterministic=True), variables, tokens)
    carry = jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), carry)
    zero, count, params = jnp.zeros(()), jnp.zeros((), jnp.int32), variables["params"]
    state = TrainState(
        params=params, optimizer=optimizer.init(params), carry=carry, step=count, epoch=count, loss=zero,
        tokens=count, bad=count, bad_in_row=count, best=jnp.array(jnp.inf), seconds=zero, timed=count,
    )  # fmt: skip
    return jax.tree.map(jnp.copy, state)  # donated buffers must be distinct


def make_step(model: "LanguageModel", optimizer: "optax.GradientTransformation", config: Config, windows: int):
    """One update on the window that the state points at: `step(state, text) -> state`, jitted, state donated.

    `text` is `(batch, length)`. A loss or a gradient that is not finite leaves parameters, optimiser and carry
    as they were, and is counted.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from ranjax.lm import cross_entropy

    def loss_fn(params, carry, window, key):
        logits, carry = model.apply(
            {"params": params}, window[:, :-1], carry, deterministic=config.dropout == 0, rngs={"dropout": key}
        )
        loss = cross_entropy(logits, window[:, 1:])
        return jnp.mean(jnp.sum(loss, axis=1)), carry

    def step(state, text):
        position = state.step % windows
        window = jax.lax.dynamic_slice_in_dim(text, position * config.steps, config.steps + 1, axis=1)
        carry = jax.tree.map(lambda c: jnp.where(position == 0, 0, c), state.carry)
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        (loss, new_carry), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, carry, window, key)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        new = optax.apply_updates(state.params, updates), new_optimizer, new_carry
        running = state.bad_in_row < BAD_STEPS
        good = running & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (state.params, state.optimizer, carry))
        fresh = position == 0
        return state._replace(
            params=kept[0],
            optimizer=kept[1],
            carry=kept[2],
            step=state.step + 1,
            loss=jnp.where(fresh, 0, state.loss) + jnp.where(good, loss, 0) * config.batch_size,
            tokens=jnp.where(fresh, 0, state.tokens) + good * config.batch_size * config.steps,
            bad=state.bad + ~good,
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
        )

    return jax.jit(step, donate_argnums=0)


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

    corpus = load_corpus(config.dataset, config.data_dir, config.tokenizer)
    text = columns(corpus.train, config.batch_size, config.steps)
    windows = windows_per_epoch(text.shape[1], config.steps)
    model = build_model(config, len(corpus.vocabulary))
    optimizer = make_optimizer(config, windows)
    checkpoints = Checkpoints(directory)
    state = initial_state(model, optimizer, config)
    if config.resume:
        _check_vocabulary(directory, corpus.vocabulary)
        state = checkpoints.load("latest", state)
    else:
        directory.mkdir(parents=True)
        save_vocabulary(corpus.vocabulary, directory / "vocabulary.json")
    save_config(config, directory)

    report = Report(directory, config, windows, first_step=int(state.step))
    step = make_step(model, optimizer, config, windows)
    loop = Loop(config, step, jax.device_put(text), windows, checkpoints, report)
    evaluate = make_evaluator(model)
    with report, _interrupts() as stop:
        while int(state.epoch) < config.epochs:
            state = loop.epoch(state, stop)
            state = loop.validate(state, evaluate(state.params, corpus.valid))
    best = checkpoints.load("best", state.params)
    return report.result(corpus, state, evaluate(best, corpus.valid), evaluate(best, corpus.test))


@dataclass
class Loop:
    """The loop over an epoch's windows: dispatches steps, looks at them about once a second, saves now and then."""

    config: Config
    step: Callable[[TrainState, Any], TrainState]
    text: Any
    windows: int
    checkpoints: "Checkpoints"
    report: "Report"

    def epoch(self, state: TrainState, stop: "Interrupt") -> TrainState:
        """Trains to the end of the state's epoch; an interrupt saves the state and leaves the program."""
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
            if stop.signal is not None or time.monotonic() - saved > SAVE_SECONDS:
                self.checkpoints.save("latest", at, state)
                saved = time.monotonic()
            if stop.signal is not None:
                self.report.interrupted(at)
                raise SystemExit(128 + stop.signal)
        return state

    def validate(self, state: TrainState, evaluation: "Evaluation") -> TrainState:
        """Ends an epoch: keeps the state if it is the best so far, and saves it to go on from."""
        if evaluation.nats < float(state.best):
            self.checkpoints.save("best", int(state.step), state.params)
            state = state._replace(best=state.best.at[()].set(evaluation.nats))
        state = state._replace(epoch=state.epoch + 1)
        self.checkpoints.save("latest", int(state.step), state)
        self.report.epoch(state, evaluation)
        return state

    def _check(self, state: TrainState) -> None:
        if int(state.bad_in_row) >= BAD_STEPS:
            raise UserError(
                f"the loss or its gradient was not finite {BAD_STEPS} steps in a row, up to step {int(state.step)}; "
                "the last good checkpoint is intact. Lower --learning-rate or --clip and start again, with another "
                "--out."
            )


@dataclass
class Interrupt:
    """The signal that asked the run to stop, if one did."""

    signal: int | None = None


@contextmanager
def _interrupts() -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one is not waited for."""
    asked = Interrupt()

    def ask(number, _):
        asked.signal = number
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_vocabulary(directory: Path, vocabulary: Vocabulary) -> None:
    if load_vocabulary(directory / "vocabulary.json") != vocabulary:
        raise UserError(
            f"the vocabulary of the data set is not the one the run in {directory} was trained with. Resume with the "
            "text it began with (the embedded corpora change with the version of Python)."
        )


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with exit_with_message():
        train(parse(argv))


if __name__ == "__main__":
    main()
