"""Ablations: what is removed stays removed in training, and the rest learns as if it had never existed; the study."""

import dataclasses
import doctest
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import ablation
from harness.table import Table

from ranjax.cell import gates_of_input, gates_of_state
from ranjax.cli import Stop, Stopped
from ranjax.lm import zero_state
from ranjax.training import step
from ranjax.training.config import Config
from ranjax.training.loss import make_loss
from ranjax.training.model import build_model, load_run
from ranjax.training.optimizer import make_optimizer

VOCABULARY, FEATURES = 11, 6
GATES = 2 * (2 * 2 * FEATURES * FEATURES + 2 * FEATURES)  # of two layers: kernels on x and h, biases


def trained(ablated, updates=3, **options):
    """The model, its parameters before and after some updates, and the text."""
    config = Config(
        features=(FEATURES,), layers=1, batch_size=3, optimizer="sgd", learning_rate=0.5, schedule="constant",
        dropout=0.0, clip=100.0, **{"steps": 5} | options,
    )  # fmt: skip
    text = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(3, 16)), jnp.int32)
    model = build_model(config, VOCABULARY)
    optimizer, constrain = make_optimizer(config, 1), ablation.constraint(ablated)
    before = step.initial_state(model, optimizer, config, constrain)
    update = step.make_step(model, optimizer, config, 15 // config.steps, constrain)
    after = jax.tree.map(jnp.copy, before)  # updates take the state they are given
    for _ in range(updates):
        after = update(after, text)
    assert int(after.bad) == 0
    return model, before.params, after.params, text


@pytest.mark.parametrize(
    ("ablated", "kind"),
    [
        *((ablated, "recurrent") for ablated in ablation.ABLATIONS),
        ("forget-gate", "diagonal"),
        ("complement", "diagonal"),
        ("gates", "input"),
    ],
)
def test_what_is_removed_stays_removed(ablated, kind):
    rng = np.random.default_rng(1)
    _, before, after, _ = trained(ablated, gates=kind)
    assert np.abs(before["embed"]["embedding"] - after["embed"]["embedding"]).max() > 1e-3
    for params in (before, after):
        cell = params["stack_0"]["cell"]
        x, c = jnp.asarray(rng.standard_normal((2, 20, FEATURES), np.float32))
        z = gates_of_input(cell, x) + (gates_of_state(cell, c, "tanh") if kind != "input" else 0)
        i, f = np.moveaxis(np.asarray(jax.nn.sigmoid(z)), -2, 0)
        constant = {"input-gate": [i], "forget-gate": [f], "gates": [i, f]}.get(ablated, [])
        for gate in (i, f):
            assert (np.ptp(gate, axis=0).max() == 0) == any(gate is g for g in constant)
        if params is after or ablated == "complement":
            assert np.allclose(i + f, 1, atol=1e-6) == (ablated == "complement")
        assert np.allclose(x @ cell["content"]["kernel"], x, atol=1e-6) == (ablated == "content")


def test_a_gate_that_is_a_function_of_the_other_gives_it_its_gradient():
    """One update is that of a model whose free parameters are the forget gates' only."""

    def of_gates(change, params):
        return jax.tree_util.tree_map_with_path(lambda path, p: change(p) if "gates" in str(path) else p, params)

    model, before, _, text = trained("complement", tie=False, steps=15)
    after = trained("complement", tie=False, steps=15, updates=1)[2]
    loss, carry = make_loss(model, Config(dropout=0.0)), zero_state(model, before, 3)

    def of_free(free):
        whole = of_gates(lambda p: jnp.stack([-p, p], axis=-2), free)
        return loss(whole, carry, text, jax.random.key(0))[0]

    free = of_gates(lambda p: p[..., 1, :], before)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, free, jax.jit(jax.grad(of_free))(free))
    got = of_gates(lambda p: p[..., 1, :], after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize(
    ("ablated", "fewer"),
    [
        (None, 0),
        ("input-gate", 2 * 2 * FEATURES * FEATURES),
        ("gates", 2 * 4 * FEATURES * FEATURES),
        ("complement", GATES // 2),
        ("content", 2 * FEATURES * FEATURES),
    ],
)
def test_parameters_that_are_learned_are_counted(ablated, fewer):
    model = build_model(Config(features=(FEATURES,)), VOCABULARY)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, deterministic=True))["params"]
    everything = sum(p.size for p in jax.tree.leaves(params))
    assert ablation.learned(params, ablated) == everything - fewer


def test_unknown_ablation():
    with pytest.raises(ValueError, match=r"`ablation` must be one of 'input-gate'.*; got 'output-gate'"):
        ablation.constraint("output-gate")


def test_examples():
    failed, attempted = doctest.testmod(ablation)
    assert (failed, attempted > 0) == (0, True)


@pytest.fixture
def study(script, pets, monkeypatch):
    """The study on a text of seconds, with one ablation."""
    module = script("ablation")
    monkeypatch.setattr(module, "CONFIG", dataclasses.replace(pets, layers=1))
    return module


def test_a_row_counts_the_parameters_that_are_learned(study, tmp_path):
    table = Table(tmp_path, tmp_path / "runs")
    ran, less = (study.row(table, name, 0) for name in ("RAN", "constant gates"))
    assert ran["parameters"] - less["parameters"] == 4 * 8 * 8  # the gates' weights on x and on h
    assert "ablation" not in ran
    assert less["ablation"] == "gates"
    assert study.row(Table(tmp_path, tmp_path / "runs"), "constant gates", 0) == less


class Soon(Stop):
    """Asks a training to stop after a few steps."""

    reads = 0

    @property
    def signal(self):
        self.reads += 1
        return signal.SIGTERM if self.reads > 4 else None


def test_an_ablated_run_goes_on_as_it_began(study, tmp_path):
    """The constraint is not among the settings of a run: the study gives it again."""
    with pytest.raises(Stopped):
        study.row(Table(tmp_path, tmp_path / "runs", stop=Soon()), "input gate 1 - f", 0)
    assert not list(tmp_path.glob("results.jsonl"))
    (run,) = (tmp_path / "runs").iterdir()
    assert study.row(Table(tmp_path, tmp_path / "runs"), "input gate 1 - f", 0)["test_perplexity"] > 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    kernel = load_run(run).params["stack_0"]["cell"]["gates"]["recurrent_kernel"]
    np.testing.assert_array_equal(kernel[:, 0], -kernel[:, 1])


def test_every_variant_is_a_model(script):
    study = script("ablation")
    for name, variant in study.VARIANTS.items():
        build_model(Config(**variant.settings), 50)
        assert (name == study.BASE) == (variant == study.Variant())
        ablation.constraint(variant.ablation)


def test_the_picture_shows_the_rows_that_exist(script, tmp_path):
    study = script("ablation")
    rows = [{"variant": name, "test_perplexity": 80.0 + n, "parameters": 10} for n, name in enumerate(study.VARIANTS)]
    rows.append({"variant": "LSTM", "test_perplexity": None, "parameters": None})  # it diverged
    study.draw(rows[3:], tmp_path / "some.png")  # the study has just begun
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
