"""What a step costs: its products as XLA counts them, its memory, the share of the peak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import metrics_rows, settings

from ranjax.training import cost
from ranjax.training.arrays import by_name
from ranjax.training.config import Config
from ranjax.training.cost import Cost, step_bytes, step_cost, step_flops
from ranjax.training.model import abstract_params, build_model
from ranjax.training.optimizer import make_optimizer
from ranjax.training.run import train
from ranjax.training.step import initial_state, make_step

SCANNED = {"gates": "input", "solver": "associative", "steps": 32, "batch_size": 8}
ONE = {"steps": 1, "batch_size": 256}  # a loop of one step, whose body is counted once


def compiled_step(config, vocabulary):
    """The step, its parameters, and the text that it is compiled for."""
    model, optimizer = build_model(config, vocabulary), make_optimizer(config, 3)
    text = np.random.default_rng(0).integers(0, vocabulary, (config.batch_size, 3 * config.steps + 1), np.int32)
    state = jax.eval_shape(lambda: initial_state(model, optimizer, config))
    compiled = make_step(model, optimizer, config, 3).lower(state, jnp.asarray(text), None, config.steps).compile()
    return compiled, state.params, text


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (SCANNED, 1.05),
        (SCANNED | {"tie": False, "features": (128, 256), "layers": 2}, 1.06),
        (SCANNED | {"block": "residual", "layers": 2}, 1.05),
        (ONE, 1.05),
        (ONE | {"gates": "diagonal"}, 1.05),
        (ONE | {"projection": 64, "tie": False}, 1.2),  # whose outputs are computed again in the backward pass
        (ONE | {"cell": "lstm"}, 1.05),
        (ONE | {"cell": "gru"}, 1.05),
        (ONE | {"cell": "rnn"}, 1.05),
    ],
)
def test_the_products_are_counted_as_xla_does_without_loops(options, most):
    """XLA counts elementwise operations, too. The state before a window has no gradient, so one product less is done
    with the weights on h: of many steps that is nothing, of a single one it is left out here."""
    given = {"features": (256,), "layers": 1, "dropout": 0.0, "optimizer": "sgd", "schedule": "constant"}
    config = Config(**given | options)
    compiled, params, text = compiled_step(config, 1000)
    counted = compiled.cost_analysis()["flops"]
    recurrent = [a for name, a in by_name(params).items() if reads_h(name, a)]
    expected = step_flops(config, params, text) - 2 * config.batch_size * sum(a.size for a in recurrent)
    assert 1 <= counted / expected < most


def reads_h(name, leaf):
    of = name.split(".")[-2:]
    return (of[-1] == "recurrent_kernel" and leaf.ndim == 3) or (
        of[0] in {"hi", "hf", "hg", "ho", "hr", "hz", "hn", "h"}
    )


def test_a_recurrence_of_many_steps_is_counted_as_often_as_it_runs():
    """Where XLA counts the body of its loop once."""
    config = Config(features=(64,), layers=1, tie=False)
    params = abstract_params(build_model(config, 10))
    one = step_flops(config, params, np.arange(10))
    assert one == 6 * 20 * 35 * (5 * 64 * 64 + 64 * 10)
    longer = Config(features=(64,), layers=1, tie=False, steps=70, accumulate=4, remat=7)
    assert step_flops(longer, params, np.arange(10)) == 2 * one


def test_clusters_of_rare_words_are_counted_for_their_share_of_the_text():
    text = np.array([[0, 1, 2, 3, 4, 5, 0, 1]])  # a quarter in each of the two clusters
    given = {"features": (16,), "layers": 1, "gates": "input", "softmax": "adaptive", "cutoffs": (2, 4)}
    for tie in (True, False):
        config = Config(**given, tie=tie)
        found = step_flops(config, abstract_params(build_model(config, 6)), text)
        clusters = (4 * 16 + 2 * 4) / 4 + (1 * 16 + 2 * 1) / 4 + tie * (4 * 16 + 1 * 16)
        assert found == 6 * 20 * 35 * (3 * 16 * 16 + 4 * 16 + clusters)


def test_the_memory_of_a_step_is_that_of_all_its_arrays():
    def step(state, text):
        return state + text.sum(), jnp.outer(text, text)

    numbers = jnp.zeros(1000)
    compiled = jax.jit(step, donate_argnums=0).lower(jnp.zeros(5000), numbers).compile()
    assert 4 * (5000 + 1000 + 1000**2) <= step_bytes(compiled) < 4.1 * (5000 + 1000 + 1000**2)


def test_the_share_of_the_peak_is_that_of_the_products():
    assert Cost(flops=50.0, bytes=7, peak=1000.0).row(4.0) == {"step_flops": 50.0, "step_bytes": 7, "mfu": 0.2}
    assert Cost(flops=50.0, bytes=7, peak=None).row(4.0) == {"step_flops": 50.0, "step_bytes": 7}


@pytest.mark.parametrize(("peak", "known"), [({"cpu": 1e12}, True), ({"TPU v4": 275e12}, False)])
def test_rows_with_a_speed_have_the_cost_of_a_step(peak, known, pets_text, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "PEAKS", peak)
    config = settings(pets_text, tmp_path / "run", epochs=1)
    train(config)
    first, validated = metrics_rows(config)
    params = abstract_params(build_model(config, 15))
    assert first["step_flops"] == step_flops(config, params, np.arange(15)) == 6 * 28 * (5 * 8 * 8 + 15 * 8)
    assert first["step_bytes"] > 4 * (5 * 8 * 8 + 15 * 9)
    assert "step_flops" not in validated
    if known:
        assert first["mfu"] == pytest.approx(first["step_flops"] * first["tokens_per_second"] / 28 / 1e12)
    else:
        assert "mfu" not in first


def test_peaks_are_known_by_the_names_of_jax():
    compiled, params, text = compiled_step(Config(features=(8,), layers=1, **SCANNED), 9)
    assert step_cost(Config(features=(8,), layers=1, **SCANNED), params, text, compiled).peak is None  # a CPU
    assert all(1e14 < peak < 1e16 for peak in cost.PEAKS.values())
