"""The loop over a text's windows: steps, validation, saving."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ranjax.cli import Stop
from ranjax.errors import DivergedError
from ranjax.training.checkpoint import Saver
from ranjax.training.metrics import Evaluation
from ranjax.training.processes import decided, is_first, whole
from ranjax.training.report import Report, Silent
from ranjax.training.step import BAD_STEPS, NOT_YET, TrainState, triggered

SAVE_SECONDS = 60.0


@dataclass
class Loop:
    """Dispatches steps, looks at them about once a second, saves now and then.

    Attributes:
      saver, report: of the run.
      step: of training, with the text and the step's number; it may donate the state.
      text: on the device, `(batch, length)`.
      windows: steps an epoch.
      evaluated: the parameters of a state that are validated and saved as the best.
      stop: the request to stop of Ctrl-C or SIGTERM, read after each burst of steps: the state is saved, then it ends
        the program.
    """

    saver: Saver
    report: Report | Silent
    step: Callable[[TrainState, Any, int], TrainState]
    text: Any
    windows: int
    stop: Stop
    evaluated: Callable[[TrainState], Any]

    def epochs(self, state: TrainState, number: int, validate: Callable[[Any], Evaluation]) -> TrainState:
        """Trains up to so many epochs, each validated and saved."""
        for _ in range(int(state.epoch), number):
            state = self.epoch(state)
            params = self.evaluated(state)
            state = self.validated(state, params, validate(params))
            self._heed(decided(0.0, self.stop.signal, False)[1])
        self.saver.wait()
        return state

    def epoch(self, state: TrainState) -> TrainState:
        """Trains to the end of the state's epoch and saves; a wish to stop saves too and ends the program."""
        at, end = int(state.step), (int(state.epoch) + 1) * self.windows
        burst, last = 1, time.monotonic()
        while at < end:
            began, compiling = time.monotonic(), not self.report.steps
            n = min(burst, end - at)
            for number in range(at, at + n):
                state = self.step(state, self.text, number)
            at += n
            self.check(state)  # waits for the burst
            due = at == end or time.monotonic() - last > SAVE_SECONDS
            elapsed, signal, due = decided(time.monotonic() - began, self.stop.signal, due)
            if not compiling:
                state = state._replace(seconds=state.seconds + elapsed, timed=state.timed + n)
                burst = max(1, min(2 * burst, round(burst / elapsed)))
            self.report.progress(state, n, elapsed)
            if signal is not None or due:
                self.save(state)
                last = time.monotonic()
            self._heed(signal)
        return state

    def _heed(self, signal: int | None) -> None:
        """Ends the program for a signal that any of the processes has."""
        if signal is not None:
            self.stop.ask(signal)
            self.stop.check()

    def check(self, state: TrainState) -> None:
        """Raises a DivergedError for a run that has diverged."""
        if int(state.bad_in_row) >= BAD_STEPS:
            last = int(state.step) - int(state.bad_in_row) + BAD_STEPS  # the others of the burst were skipped
            raise DivergedError(
                f"the loss or its gradient was not finite {BAD_STEPS} steps in a row, up to step {last}; "
                f"the last good checkpoint in {self.saver.checkpoints.run} is intact. Lower --learning-rate or --clip "
                "and start again, with another --out."
            )

    def validated(self, state: TrainState, params: Any, evaluation: Evaluation) -> TrainState:
        """Ends an epoch: keeps the state if it is the best so far, reports it, and saves it to go on from.

        It is reported before it is saved: after a kill between the two, the resumed run reports it again.
        """
        if not math.isfinite(evaluation.nats):
            kept = "no epoch before it was validated"
            if float(state.best) < NOT_YET:
                kept = f"the best state before it is kept in {self.saver.checkpoints.run}"
            raise DivergedError(
                f"the validation loss is {evaluation.nats}; {kept}. Lower --learning-rate or --clip and start again, "
                "with another --out."
            )
        if evaluation.nats < float(state.best):
            self._write("best", int(state.step), params)
            state = state._replace(best=state.best.at[()].set(evaluation.nats))
        state = triggered(state, evaluation.nats)._replace(epoch=state.epoch + 1)
        self.report.epoch(state, evaluation)
        self.save(state)
        return state

    def save(self, state: TrainState) -> None:
        """Saves the full state. An epoch's end is saved before and after its validation, hence the two numbers."""
        self._write("latest", int(state.step) + int(state.epoch), state)

    def _write(self, kind: str, number: int, tree: Any) -> None:
        tree = whole(tree)
        if is_first():
            self.saver.save(kind, number, tree)
