"""Ablations: what is taken out is out, before and after training, and the rest learns as if it had never been there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax import ablation, step, train
from ranjax.cell import gates_of_input, gates_of_state
from ranjax.training.config import Config
from ranjax.lm import zero_state

VOCABULARY, FEATURES = 11, 6
GATES = 2 * (2 * 2 * FEATURES * FEATURES + 2 * FEATURES)  # of two layers: kernels on x and h, biases


def trained(ablated, updates=3, **options):
    """The model, its parameters before and after some updates, and the text."""
    config = Config(
        features=(FEATURES,), layers=1, batch_size=3, optimizer="sgd", learning_rate=0.5, schedule="constant",
        ablation=ablated, dropout=0.0, clip=100.0, **{"steps": 5} | options,
    )  # fmt: skip
    text = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(3, 16)), jnp.int32)
    model = step.build_model(config, VOCABULARY)
    optimizer = step.make_optimizer(config, 1)
    before = step.initial_state(model, optimizer, config)
    update = step.make_step(model, optimizer, config, 15 // config.steps)
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
def test_what_is_taken_out_is_out(ablated, kind):
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


def test_a_gate_made_of_the_other_gives_it_its_gradient():
    """One update is that of a model whose free parameters are the forget gates' only."""

    def of_gates(change, params):
        return jax.tree_util.tree_map_with_path(lambda path, p: change(p) if "gates" in str(path) else p, params)

    model, before, _, text = trained("complement", tie=False, steps=15)
    after = trained("complement", tie=False, steps=15, updates=1)[2]
    loss, carry = step.make_loss(model, Config(dropout=0.0)), zero_state(model, before, 3)

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
    model = step.build_model(Config(features=(FEATURES,)), VOCABULARY)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, deterministic=True))["params"]
    everything = sum(p.size for p in jax.tree.leaves(params))
    assert ablation.learned(params, ablated) == everything - fewer


def test_unknown_ablation():
    with pytest.raises(ValueError, match=r"`ablation` must be one of 'input-gate'.*; got 'output-gate'"):
        ablation.constraint("output-gate")


def test_a_run_counts_the_parameters_that_are_learned(pets, tmp_path):
    ran, less = (
        train.train(dataclasses.replace(pets, out=str(tmp_path / str(without)), ablation=without))
        for without in (None, "gates")
    )
    assert ran["parameters"] - less["parameters"] == 4 * 8 * 8  # the gates' weights on x and on h
