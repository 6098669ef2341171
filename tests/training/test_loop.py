"""The loop over a text's windows: bursts of steps, saving, validation, stopping."""

import math
import signal
import time
from operator import attrgetter
from pathlib import Path

import pytest
from small_runs import blank_state

from ranjax.cli import Stop, Stopped
from ranjax.errors import DivergedError
from ranjax.training import loop
from ranjax.training.loop import Loop
from ranjax.training.metrics import Evaluation
from ranjax.training.step import BAD_STEPS


class Run:
    """Records what the loop saves and reports; stands in for `Saver`, its `Checkpoints` and `Report`."""

    run = Path("run")

    def __init__(self):
        self.checkpoints = self
        self.steps, self.bursts, self.saved, self.events = 0, [], [], []

    def save(self, kind, number, tree):
        if kind == "latest":
            self.saved.append((int(tree.step), int(tree.epoch)))
        self.events.append(kind)

    def wait(self):
        pass

    def progress(self, state, steps, seconds):
        self.steps += steps
        self.bursts.append(steps)

    def epoch(self, state, evaluation):
        self.events.append("report")


def looped(windows, advance=lambda state: state._replace(step=state.step + 1), stop=None):
    """A loop and what it has saved and reported."""
    run = Run()
    params_of = attrgetter("params")
    return Loop(run, run, lambda state, *_: advance(state), None, windows, stop or Stop(), params_of), run


def test_bursts_of_fast_steps_double():
    training, run = looped(16)
    training.epoch(blank_state())
    assert run.bursts == [1, 1, 2, 4, 8]
    assert run.saved == [(16, 0)]


def test_compilation_is_not_timed():
    """That is the first step of a process."""

    def advance(state):
        time.sleep(0.0 if int(state.step) else 0.5)
        return state._replace(step=state.step + 1)

    state = looped(4, advance)[0].epoch(blank_state())
    assert int(state.timed) == 3
    assert float(state.seconds) < 0.5


def test_a_long_epoch_is_saved_on_its_way(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    training, run = looped(9)
    training.epoch(blank_state())
    assert run.saved == [(1, 0), (2, 0), (4, 0), (8, 0), (9, 0)]


def test_an_epoch_continues_where_the_state_stands():
    training, run = looped(10)
    state = training.epoch(blank_state(step=17, epoch=1))
    assert (int(state.step), run.bursts) == (20, [1, 1, 1])


@pytest.mark.parametrize("asked_at", [1, 3, 8])
def test_a_wish_to_stop_saves_after_the_current_burst(asked_at):
    stop = Stop()

    def advance(state):
        if int(state.step) + 1 == asked_at:
            stop.ask(signal.SIGTERM)
        return state._replace(step=state.step + 1)

    training, run = looped(8, advance, stop)
    with pytest.raises(Stopped) as ended:
        training.epochs(blank_state(), 2, pytest.fail)  # no validation
    assert ended.value.code == 128 + signal.SIGTERM
    assert run.saved == [(sum(run.bursts), 0)]
    assert asked_at <= sum(run.bursts) < 2 * asked_at + 1


def test_a_run_stops_once_its_minutes_are_over():
    training, run = looped(100, stop=Stop(minutes=0))
    with pytest.raises(Stopped, match="143"):
        training.epoch(blank_state())
    assert run.saved == [(1, 0)]


def test_a_wish_to_stop_during_validation_keeps_the_validated_state():
    training, run = looped(3)

    def validate(_):
        training.stop.ask(signal.SIGINT)
        return Evaluation(1.0, 10)

    with pytest.raises(Stopped, match="130"):
        training.epochs(blank_state(best=math.inf), 2, validate)
    assert run.saved == [(3, 0), (3, 1)]


def test_each_epoch_is_validated_reported_and_saved():
    losses = iter([2.0, 3.0, 1.0])
    training, run = looped(2)
    state = training.epochs(blank_state(best=math.inf), 3, lambda _: Evaluation(next(losses), 10))
    better, worse = ["latest", "best", "report", "latest"], ["latest", "report", "latest"]
    assert run.events == [*better, *worse, *better]
    assert (int(state.step), int(state.epoch), float(state.best)) == (6, 3, 1.0)
    assert training.epochs(state, 3, pytest.fail) is state  # nothing is left to train


def test_a_state_as_good_as_the_best_is_not_better():
    training, run = looped(2)
    training.validated(blank_state(best=1.0), {}, Evaluation(1.0, 10))
    assert "best" not in run.events


def test_five_steps_in_a_row_that_are_not_finite_end_the_run():
    def advance(state):
        return state._replace(step=state.step + 1, bad_in_row=state.bad_in_row + 1)

    training, run = looped(100, advance)
    last = 17 + BAD_STEPS  # though the burst goes on beyond it
    with pytest.raises(DivergedError, match=f"not finite 5 steps in a row, up to step {last}; .*Lower --learning-rate"):
        training.epoch(blank_state(step=17))
    assert run.saved == []


@pytest.mark.parametrize(
    ("best", "kept"), [(math.inf, "no epoch before it was validated"), (2.0, "the best state before it is kept in run")]
)
def test_a_validation_that_is_not_finite_ends_the_run(best, kept):
    training, run = looped(2)
    with pytest.raises(DivergedError, match=f"the validation loss is nan; {kept}"):
        training.validated(blank_state(best=best), {}, Evaluation(math.nan, 10))
    assert run.events == []
