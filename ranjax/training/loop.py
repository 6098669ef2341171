"""The loop over a text's windows: of one run, or of several that differ by their seeds, side by side."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ranjax.errors import DivergedError, refusals
from ranjax.training.step import BAD_STEPS

if TYPE_CHECKING:
    from ranjax.training.checkpoint import Checkpoints
    from ranjax.evaluate import Evaluation
    from ranjax.training.report import Report
    from ranjax.training.step import TrainState

SAVE_SECONDS = 60.0


@dataclass
class Interrupt:
    """A wish to stop.

    Attributes:
      signal: the signal that came, if one did.
      saved: the step at which all that there is to save is saved, so that a signal may end the program at once.
    """

    signal: int | None = None
    saved: int | None = None


@dataclass
class Training:
    """A run being trained: where it is saved, what it tells."""

    checkpoints: "Checkpoints"
    report: "Report"

    def save(self, state: "TrainState") -> None:
        """The end of an epoch is saved before its validation and after it: the number grows with either."""
        self._write("latest", int(state.step) + int(state.epoch), state)

    def _write(self, kind: str, number: int, tree: Any) -> None:
        with refusals(self.checkpoints.directory):
            self.checkpoints.save(kind, number, tree)

    def check(self, state: "TrainState") -> None:
        """Raises a UserError for a run that has diverged."""
        if int(state.bad_in_row) >= BAD_STEPS:
            last = int(state.step) - int(state.bad_in_row) + BAD_STEPS  # the others of the burst were not looked at
            raise DivergedError(
                f"the loss or its gradient was not finite {BAD_STEPS} steps in a row, up to step {last}; "
                f"the last good checkpoint in {self.checkpoints.run} is intact. Lower --learning-rate or --clip and "
                "start again, with another --out."
            )

    def validated(self, state: "TrainState", evaluation: "Evaluation") -> "TrainState":
        """Ends an epoch: keeps the state if it is the best so far, tells of it, and saves it to go on from.

        Told first: what is told of a state that was not saved is told again when the run goes on.
        """
        if not math.isfinite(evaluation.nats):
            kept = "no epoch before it was validated"
            if math.isfinite(float(state.best)):
                kept = f"the best state before it is kept in {self.checkpoints.run}"
            raise DivergedError(
                f"the validation loss is {evaluation.nats}; {kept}. Lower --learning-rate or --clip and start again, "
                "with another --out."
            )
        if evaluation.nats < float(state.best):
            self._write("best", int(state.step), state.params)
            state = state._replace(best=state.best.at[()].set(evaluation.nats))
        state = state._replace(epoch=state.epoch + 1)
        self.report.epoch(state, evaluation)
        self.save(state)
        return state


@dataclass
class Loop:
    """Dispatches steps, looks at them about once a second, saves now and then.

    Attributes:
      runs: what is trained; if several, the state has an axis of them in front.
      step: of training, with the text; it may donate the state.
      text: on the device, `(batch, length)`.
      windows: steps an epoch.
    """

    runs: Sequence[Training]
    step: "Callable[[TrainState, Any], TrainState]"
    text: Any
    windows: int

    def epochs(
        self, state: "TrainState", number: int, validate: "Callable[[Any], Evaluation]", stop: Interrupt
    ) -> list["TrainState"]:
        """Trains up to so many epochs, each validated and saved; returns the state of each run."""
        for _ in range(int(self.counters(state)[0].epoch), number):
            state = self.epoch(state, stop)
            evaluations = [validate(part.params) for part in self.parts(state)]
            stop.saved = None  # a save that is cut short would leave threads that wait for its end
            rows = zip(self.runs, self.parts(state), evaluations, strict=True)
            state = together([run.validated(part, evaluation) for run, part, evaluation in rows])
        parts = self.parts(state)
        stop.saved = int(parts[0].step)
        if stop.signal is not None:  # it came while the last validated state was being saved
            leave(self.runs, stop.signal, stop.saved)
        return parts

    def epoch(self, state: "TrainState", stop: Interrupt) -> "TrainState":
        """Trains to the end of the state's epoch and saves; an interrupt saves too and leaves the program."""
        stop.saved = None
        first = self.counters(state)[0]
        at, end = int(first.step), (int(first.epoch) + 1) * self.windows
        burst, last = 1, time.monotonic()
        while at < end:
            began, compiling = time.monotonic(), not self.runs[0].report.steps
            n = min(burst, end - at)
            for _ in range(n):
                state = self.step(state, self.text)
            at += n
            for run, counted in zip(self.runs, self.counters(state), strict=True):  # waits for the burst
                run.check(counted)
            elapsed = time.monotonic() - began
            if not compiling:
                state = state._replace(seconds=state.seconds + elapsed, timed=state.timed + n)
                burst = max(1, min(2 * burst, round(burst / elapsed)))
            for run, counted in zip(self.runs, self.counters(state), strict=True):
                run.report.progress(counted, n, elapsed)
            if stop.signal is not None or at == end or time.monotonic() - last > SAVE_SECONDS:
                for run, part in zip(self.runs, self.parts(state), strict=True):
                    run.save(part)
                last = time.monotonic()
            if stop.signal is not None:
                leave(self.runs, stop.signal, at)
        stop.saved = at
        return state

    def parts(self, state: "TrainState") -> list["TrainState"]:
        """The state of each run."""
        import jax

        if len(self.runs) == 1:
            return [state]
        return [jax.tree.map(lambda a, n=n: a[n], state) for n in range(len(self.runs))]

    def counters(self, state: "TrainState") -> list["TrainState"]:
        """The state of each run without what is large."""
        return self.parts(state._replace(params=None, optimizer=None, carry=None))


def leave(runs: Sequence[Training], number: int, at: int) -> NoReturn:
    """Ends the program for a signal, all being saved at step `at`."""
    for run in runs:
        run.report.interrupted(at)
    raise SystemExit(128 + number)


def together(states: Sequence["TrainState"]) -> "TrainState":
    """The state of a loop over runs with these states."""
    import jax
    import jax.numpy as jnp

    return states[0] if len(states) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *states)


@contextmanager
def interrupts(runs: Sequence[Training]) -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one is not waited for.

    With all saved they end the program where it is, and where that is lost, as every exception is in a callback of the
    garbage collector (JAX has one), at the next step or on leaving.
    """
    asked = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # which has no signals
        yield asked
        return

    def ask(number, _):
        asked.signal = number
        signal.signal(number, previous[number])
        if asked.saved is not None:
            leave(runs, number, asked.saved)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
        if asked.signal is not None and asked.saved is not None:
            leave(runs, asked.signal, asked.saved)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
