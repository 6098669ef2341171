"""Averages of the parameters: when they begin, what they are of, what is evaluated and saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_same, blank_state, position, resumed, saved_state, settings, train_until

from ranjax.data import load_corpus
from ranjax.training.metrics import make_evaluator
from ranjax.training.model import build_model, load_run
from ranjax.training.optimizer import evaluated, make_optimizer
from ranjax.training.run import train
from ranjax.training.step import NOT_BEGUN, NOT_YET, initial_state, make_step, triggered

AVERAGING = {"average": "non-monotone", "patience": 1, "optimizer": "sgd", "schedule": "constant", "learning_rate": 0.9}
AVERAGING |= {"epochs": 6, "dropout": 0.0}


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_averaging_begins_where_the_authors_program_begins_it(patience):
    """There: once a loss is above the lowest of all but the last `patience`."""
    for seed in range(5):
        losses = np.float32(3 + np.random.default_rng(seed).normal(size=30) - np.linspace(0, 2, 30))
        state = blank_state()._replace(
            average={"w": jnp.zeros(1)}, recent=jnp.full(patience, NOT_YET), older=jnp.array(NOT_YET)
        )
        expected, logged = NOT_BEGUN, []
        for loss in losses:
            if len(logged) > patience and loss > min(logged[:-patience]) and expected == NOT_BEGUN:
                expected = 0
            logged.append(loss)
            state = triggered(state, float(loss))
            assert int(state.averaged) == expected
        assert expected == 0


def test_nothing_is_triggered_where_nothing_is_averaged():
    state = blank_state()
    assert triggered(state, 1.0) is state


def test_the_average_is_the_mean_of_the_parameters_of_all_steps_since(pets):
    config = dataclasses.replace(pets, **AVERAGING | {"learning_rate": 0.1})
    text = jnp.asarray(load_corpus(config.dataset).train[: 4 * 30].reshape(4, 30))
    model = build_model(config, len(load_corpus(config.dataset).vocabulary))
    optimizer = make_optimizer(config, 4)
    state, step = initial_state(model, optimizer, config), make_step(model, optimizer, config, 4)
    of = evaluated(config)
    for _ in range(2):
        state = step(state, text)
        assert int(state.averaged) == NOT_BEGUN
        assert_same(of(state), state.params)
    state, params = state._replace(averaged=jnp.array(0)), []
    assert_same(of(state), state.params)
    for _ in range(3):
        state = step(state, text)
        params.append(jax.tree.map(np.asarray, state.params))
    assert int(state.averaged) == 3
    mean = jax.tree.map(lambda *p: np.mean(p, axis=0), *params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), of(state), mean)
    raw = jax.tree.leaves(state.params)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(raw, jax.tree.leaves(of(state)), strict=True)) > 1e-3


@pytest.fixture(scope="module")
def averaged_run(pets_text, tmp_path_factory):
    config = settings(pets_text, tmp_path_factory.mktemp("runs") / "averaged", **AVERAGING)
    return config, train(config)


def test_the_averages_are_evaluated_and_saved_and_the_training_goes_on_from_the_raw_ones(averaged_run):
    config, result = averaged_run
    state = saved_state(config)
    assert int(state.averaged) > 0
    assert state.average.keys() == state.params.keys()
    valid = result["valid_perplexities"]
    run, corpus = load_run(config.directory), load_corpus(config.dataset)
    found = make_evaluator(run.model)(evaluated(config)(state), corpus.valid).perplexity
    assert found == pytest.approx(valid[-1], rel=1e-5)
    assert make_evaluator(run.model)(state.params, corpus.valid).perplexity != pytest.approx(valid[-1], rel=1e-5)
    best = make_evaluator(run.model)(run.params, corpus.valid).perplexity
    assert best == pytest.approx(min(valid), rel=1e-5)


@pytest.mark.parametrize("after", ["before the trigger", "after it"])
def test_a_stopped_run_resumes_bitwise_across_the_trigger(after, averaged_run, tmp_path, monkeypatch):
    straight = averaged_run[0]
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))

    def now(state):
        return int(state.averaged) > 3 if after == "after it" else int(state.step) > 3

    train_until(now, broken, monkeypatch)
    assert position(broken)[0] < position(straight)[0]
    assert (int(saved_state(broken).averaged) > 0) == (after == "after it")
    train(resumed(broken))
    assert_same(saved_state(broken), saved_state(straight))
    assert_same(load_run(broken.directory).params, load_run(straight.directory).params)


def test_schedule_free_evaluates_its_averages(pets_text, tmp_path):
    options = {"optimizer": "schedule_free", "schedule": "constant", "learning_rate": 0.02, "warmup": 5}
    config = settings(pets_text, tmp_path / "run", **options)
    result, run = train(config), load_run(config.directory)
    found = make_evaluator(run.model)(run.params, load_corpus(config.dataset).valid).perplexity
    assert found == pytest.approx(min(result["valid_perplexities"]), rel=1e-5)
    assert found < 10


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"accumulate": 2, "remat": 7}, {"precision": "bfloat16"}, {"optimizer": "muon"}])
def test_a_run_learns_by_every_setting(options, pets_text, tmp_path):
    """The text has 15 characters; a training without them reaches about 2."""
    config = settings(pets_text, tmp_path / "run", learning_rate=0.02, **options)
    assert train(config)["test_perplexity"] < 5
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(load_run(config.directory).params))


def test_bfloat16_is_of_the_products_alone(pets_text, tmp_path):
    """After equal steps within 1 % of float32."""
    found = []
    for precision in ("float32", "bfloat16"):
        config = settings(pets_text, tmp_path / precision, learning_rate=0.01, dropout=0.0, precision=precision)
        found.append(train(config)["test_perplexity"])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.01)
