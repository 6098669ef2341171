"""The trials of `benchmarks/robustness.py` in a short form, and how it judges what a program answers."""

import json

import pytest
import robustness
import robustness_calls
import robustness_trials
from robustness_runs import Answer, Outcome, Place, not_refused

SEED = 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"), epochs=2)


def assert_held(outcomes, at_least):
    outcomes = list(outcomes)
    assert [outcome for outcome in outcomes if outcome.failure is not None] == []
    assert len(outcomes) >= at_least


def test_killed_trainings_are_resumed_to_the_same_end(place):
    assert_held(robustness_trials.kills(place, 2, SEED, jobs=1), 2)


def test_flipped_bits_change_no_answer(place):
    kinds = len(robustness_trials.FILES)
    assert_held(robustness_trials.flips(place, kinds, SEED, programs=0), kinds)


def test_refused_writes_end_in_one_line_and_lose_nothing(place):
    assert_held(robustness_trials.writes(place, 1, SEED), 1)


def test_wrong_calls_are_refused_in_one_line(place):
    assert_held(robustness.calls(place, "60", SEED), 60)


def test_the_table_of_wrong_calls_has_at_least_300(place):
    lines = list(robustness_calls.command_lines())
    assert len(lines) >= 300
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Answer(1, "", "error: --seed must be at least 0; got -1.\n"), None),
        (Answer(1, "", "warning: old.\nerror: --seed must be at least 0; got -1.\n"), None),
        (Answer(1, "", "╭─ Value error ─╮\n│ --seed: x     │\n╰───────────────╯\n"), None),
        (Answer(1, "", "error: wrong.\n"), "another refusal: --seed is not named"),
        (Answer(1, "", "error: --seed\nand more\n"), "not one line"),
        (Answer(1, "", "Traceback (most recent call last):\n--seed\n"), "traceback"),
        (Answer(0, "", ""), "accepted"),
        (Answer(2, "", "error: --seed\n"), "exit code 2"),
        (Answer(-6, "", "terminate called\n"), "killed by SIGABRT"),
        (Answer(None, "", ""), "no end"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_flag(answer, failure):
    assert not_refused(answer, "--seed") == failure


def test_outcomes_are_counted_with_the_first_example_of_each_failure(tmp_path):
    tally = robustness.Tally()
    for failure, example in ((None, ""), ("lost", "first"), ("lost", "second")):
        tally.add(Outcome("kills", "SIGKILL", failure, example))
    assert tally.counts == (3, 1)
    stamp = {"device": "2 CPU cores", "date": "2026-11-30", "versions": {"jax": "0.10.2"}, "seed": 0}
    printed = robustness.table(json.loads(json.dumps({**stamp, "rows": tally.rows})))
    assert "| kills | SIGKILL | 3 | 1 |" in printed
    assert "lost (2). First: `first`" in printed
