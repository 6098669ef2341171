"""Windows of lengths that vary."""

import dataclasses

import numpy as np
import pytest
from small_runs import assert_same, metrics_rows, saved_state, settings, train_until, windows_of

from ranjax.training.run import train
from ranjax.training.windows import Steps, boundaries


def test_boundaries_are_moved_and_all_tokens_are_read_once():
    for seed in range(3):
        epochs = [boundaries(70, 50, 10, seed, epoch) for epoch in range(4)]
        for bounds in epochs:
            assert (bounds[0], bounds[-1], len(bounds)) == (0, 70 * 50, 51)
            lengths = np.diff(bounds)
            assert set(lengths) == {50, 60, 70, 80, 90}
            assert lengths.mean() == 70
        assert len({tuple(bounds) for bounds in epochs}) == 4
    assert (boundaries(70, 50, 10, 0, 0) != boundaries(70, 50, 10, 1, 0)).any()


class Recorded:
    """Stands in for a jitted step: records the windows."""

    def __init__(self):
        self.windows, self.compiled = [], []

    def lower(self, state, text, start, length):
        self.compiled.append(length)
        self.length = length
        return self

    def compile(self):
        length = self.length
        return lambda state, text, start=None: self.windows.append((start, length))


def test_every_length_is_compiled_once_and_the_longest_first(pets):
    step, config = Recorded(), dataclasses.replace(pets, steps=10, vary_steps=2)
    steps = Steps(step, None, None, config, 30)
    assert step.compiled == [14]
    for number in range(60):
        steps(None, None, number)
    assert sorted(step.compiled) == [6, 8, 10, 12, 14]
    starts, lengths = np.transpose(step.windows)
    for epoch in range(2):
        part = slice(30 * epoch, 30 * epoch + 30)
        np.testing.assert_array_equal(np.cumsum(lengths[part])[:-1], starts[part][1:])


@pytest.fixture(scope="module")
def straight(pets_text, tmp_path_factory):
    config = settings(pets_text, tmp_path_factory.mktemp("runs") / "straight", vary_steps=2, learning_rate=0.02)
    return config, train(config)


def test_a_run_with_them_learns_and_counts_all_tokens(straight):
    config, result = straight
    assert result["test_perplexity"] < 5
    ends = [row for row in metrics_rows(config) if "valid_perplexity" in row]
    assert [row["step"] for row in ends] == [windows_of(config), 2 * windows_of(config)]
    assert int(saved_state(config).tokens) == windows_of(config) * config.batch_size * config.steps


def test_a_stopped_run_with_them_resumes_bitwise(straight, tmp_path, monkeypatch):
    broken = dataclasses.replace(straight[0], out=str(tmp_path / "broken"))
    train_until(lambda state: int(state.step) > 20, broken, monkeypatch)
    train(dataclasses.replace(broken, resume=True))
    assert_same(saved_state(broken), saved_state(straight[0]))
