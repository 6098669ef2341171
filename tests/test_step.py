"""Steps of training against a plain loop: the carry, the windows, the clipping, the rule, the seeds."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ranjax import step, train
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import Config
from ranjax.data import load_corpus, windows_per_epoch


def begun(config, windows):
    """The model, the state before the first step, and the step."""
    model = step.build_model(config, len(load_corpus(config.dataset).vocabulary))
    optimizer = step.make_optimizer(config, windows)
    return model, step.initial_state(model, optimizer, config), step.make_step(model, optimizer, config, windows)


def rows_of_text(config, length):
    return jnp.asarray(load_corpus(config.dataset).train[: 4 * length].reshape(4, length))


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_training_is_that_of_a_plain_loop(rule, pets):
    """Two epochs of three windows: the carry, the windows, the clipping, the rule, its rate, the figure of training."""
    options = {"optimizer": rule, "schedule": "decay", "learning_rate": 0.05, "weight_decay": 0.3, "clip": 1.5}
    config = dataclasses.replace(pets, **options, decay=0.5, decay_after=1, warmup=0, epochs=2, dropout=0.0)
    ids, windows = rows_of_text(config, 24), windows_per_epoch(24, 7)
    model, state, advance = begun(config, windows)
    params, moments = jax.tree.map(jnp.copy, state.params), None

    def loss(params, carry, window):
        logits, carry = model.apply({"params": params}, window[:, :-1], carry, deterministic=True)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), window[:, 1:, None], axis=-1)
        return nats.sum() / 4, carry

    differentiate, clipped = jax.jit(jax.value_and_grad(loss, has_aux=True)), 0
    for epoch in range(2):
        rate, carry, total = 0.05 * 0.5**epoch, None, 0.0
        plain = optax.sgd(rate) if rule == "sgd" else optax.adamw(rate, weight_decay=0.3)
        moments = plain.init(params) if moments is None else moments
        for n in range(3):
            (value, carry), gradient = differentiate(params, carry, ids[:, 7 * n : 7 * n + 8])
            norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
            clipped += norm > 1.5
            scale = min(1, 1.5 / norm)
            gradient = jax.tree.map(partial(jnp.multiply, scale), gradient)
            updates, moments = plain.update(gradient, moments, params)
            params, total = optax.apply_updates(params, updates), total + 4 * float(value)
            state = advance(state, ids)
    assert clipped > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, params)
    assert float(state.loss / state.tokens) == pytest.approx(total / 84, rel=1e-5)


def test_weights_and_dropout_are_of_the_seed_and_each_step_has_its_own(pets):
    config = dataclasses.replace(pets, optimizer="sgd", learning_rate=1e-30, dropout=0.5)
    text, losses, embeddings = rows_of_text(config, 8), [], []
    for seed in (0, 1):
        _, state, advance = begun(dataclasses.replace(config, seed=seed), 1)
        embeddings.append(float(jnp.sum(state.params["embed"]["embedding"])))
        state = state._replace(params=begun(config, 1)[1].params)  # so that dropout alone differs
        for _ in range(3):
            state = advance(state, text)
            losses.append(float(state.loss))
    assert len(set(losses)) == 6
    assert embeddings[0] != embeddings[1]


def test_a_skipped_step_leaves_the_optimizer_as_it_was(pets):
    _, state, advance = begun(pets, 1)
    before = jax.tree.map(jnp.copy, state.optimizer)
    bad = state._replace(params=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.params))
    after = advance(bad._replace(carry=jax.tree.map(jnp.ones_like, bad.carry)), rows_of_text(pets, 8))
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, before)
    assert not any(map(np.any, jax.tree.leaves(after.carry)))  # the epoch begins with none, skipped or not


def test_all_settings_of_a_model_are_used():
    options = {"features": (5, 6), "layers": 2, "embedding": 6, "projection": 6, "tie": True, "dropout": 0.3}
    options |= {"gates": "input", "activation": "identity", "init_scale": 0.01, "solver": "sequential"}
    model = step.build_model(Config(**options), 19)
    assert {name: getattr(model, name) for name in options} == options


def test_the_rate_falls_after_an_epoch_of_the_text(pets, tmp_path):
    """To nothing here, so that the second epoch changes nothing."""
    ends = []
    options = {"optimizer": "sgd", "schedule": "decay", "decay": 1e-30, "decay_after": 1, "warmup": 0}
    for epochs in (1, 2):
        config = dataclasses.replace(pets, out=str(tmp_path / str(epochs)), epochs=epochs, **options, batch_size=40)
        train.train(config)
        ends.append(Checkpoints(config.directory).load("latest", begun(config, 1)[1]).params)
    jax.tree.map(np.testing.assert_array_equal, *ends)
