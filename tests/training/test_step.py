"""Steps of training against a plain loop: carry, windows, clipping, update rule, learning rate, seeds, constraints."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ranjax.data import load_corpus, windows_per_epoch
from ranjax.errors import UserError
from ranjax.lm import LanguageModel
from ranjax.training import step
from ranjax.training.config import Config
from ranjax.training.loss import mean_iterations
from ranjax.training.model import build_model
from ranjax.training.optimizer import make_optimizer


def initialised(config, windows, **options):
    """The model, the state before the first step, and the step."""
    model = build_model(config, len(load_corpus(config.dataset).vocabulary))
    optimizer = make_optimizer(config, windows)
    state = step.initial_state(model, optimizer, config, **options)
    return model, state, step.make_step(model, optimizer, config, windows, **options)


def rows_of_text(config, length):
    return jnp.asarray(load_corpus(config.dataset).train[: 4 * length].reshape(4, length))


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def with_nan_params(state):
    return state._replace(params=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.params))


def plain_loss(model, params, carry, window):
    logits, carry = model.apply({"params": params}, window[:, :-1], carry, deterministic=True)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), window[:, 1:, None], axis=-1)
    return nats.sum() / 4, carry


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_training_is_that_of_a_plain_loop(rule, pets):
    """Two epochs of three windows: carry, windows, clipping, update rule, its rate, the training loss."""
    options = {"optimizer": rule, "schedule": "decay", "learning_rate": 0.05, "weight_decay": 0.3, "clip": 1.5}
    config = dataclasses.replace(pets, **options, decay=0.5, decay_after=1, warmup=0, epochs=2, dropout=0.0)
    ids, windows = rows_of_text(config, 24), windows_per_epoch(24, 7)
    model, state, advance = initialised(config, windows)
    params, moments = jax.tree.map(jnp.copy, state.params), None

    differentiate, clipped = jax.jit(jax.value_and_grad(partial(plain_loss, model), has_aux=True)), 0
    for epoch in range(2):
        rate, carry, total = 0.05 * 0.5**epoch, None, 0.0
        decayed = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(rate))
        plain = decayed if rule == "sgd" else optax.adamw(rate, weight_decay=0.3)
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


def bounded(params):
    """Weights within +-0.03, and no bias of the output layer."""
    params = jax.tree.map(lambda p: jnp.clip(p, -0.03, 0.03), params)
    return params | {"bias": jnp.zeros_like(params["bias"])} if "bias" in params else params


def largest(params):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params))


def test_constrained_params_are_so_at_the_start_and_after_each_step(pets):
    config = dataclasses.replace(pets, optimizer="sgd", learning_rate=0.5, schedule="constant", dropout=0.0)
    ids = rows_of_text(config, 24)
    _, state, advance = initialised(config, 3, constrain=bounded)
    assert largest(state.params) == pytest.approx(0.03)
    for _ in range(3):
        before = jax.tree.map(np.array, state.params)
        state = advance(state, ids)
        assert largest(state.params) == pytest.approx(0.03)
        moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.params))
        assert max(moved) > 0


def test_the_model_computes_with_constrained_params_and_the_gradient_goes_through(pets):
    """One step of gradient descent on L(C(p)), then C: here C doubles every weight, which no clipping hides."""

    def doubled(params):
        return jax.tree.map(lambda p: 2 * p, params)

    options = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "dropout": 0.0, "clip": 1e9}
    config = dataclasses.replace(pets, **options)
    ids = rows_of_text(config, 8)
    model, state, advance = initialised(config, 1, constrain=doubled)
    unchanged = initialised(config, 1)[1].params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), state.params, unchanged)
    gradient = jax.grad(lambda p: plain_loss(model, doubled(p), None, ids)[0])(state.params)
    expected = jax.tree.map(lambda p, g: 2 * (p - 0.1 * g), state.params, gradient)
    after = advance(state, ids).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, expected)


def test_weights_and_dropout_follow_from_the_seed_and_differ_at_each_step(pets):
    config = dataclasses.replace(pets, optimizer="sgd", learning_rate=1e-30, dropout=0.5)
    text, losses, embeddings = rows_of_text(config, 8), [], []
    for seed in (0, 1):
        _, state, advance = initialised(dataclasses.replace(config, seed=seed), 1)
        embeddings.append(float(jnp.sum(state.params["embed"]["embedding"])))
        state = state._replace(params=initialised(config, 1)[1].params)  # so that dropout alone differs
        for _ in range(3):
            state = advance(state, text)
            losses.append(float(state.loss))
    assert len(set(losses)) == 6
    assert embeddings[0] != embeddings[1]


def test_steps_that_are_not_finite_are_skipped_and_counted(pets):
    config = dataclasses.replace(pets, optimizer="sgd", schedule="constant")
    _, state, advance = initialised(config, 100)
    ids = rows_of_text(config, 707)
    params = jax.tree.map(jnp.copy, state.params)
    bad = advance(with_nan_params(state), ids)
    assert (int(bad.bad), int(bad.bad_in_row), int(bad.step), int(bad.tokens), float(bad.loss)) == (1, 1, 1, 0, 0)
    good = advance(bad._replace(params=params), ids)
    assert (int(good.bad), int(good.bad_in_row), int(good.step)) == (1, 0, 2)
    assert all_finite((good.params, good.carry))
    stopped = advance(good._replace(bad_in_row=jnp.array(step.BAD_STEPS)), ids)
    assert int(stopped.bad_in_row) > step.BAD_STEPS  # it stays stopped until the host has read it


def test_a_skipped_step_leaves_the_optimizer_unchanged(pets):
    _, state, advance = initialised(pets, 1)
    before = jax.tree.map(jnp.copy, state.optimizer)
    bad = with_nan_params(state)
    after = advance(bad._replace(carry=jax.tree.map(jnp.ones_like, bad.carry)), rows_of_text(pets, 8))
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, before)
    assert not any(map(np.any, jax.tree.leaves(after.carry)))  # the carry at the start of an epoch is 0, skipped or not


def test_a_gradient_that_is_not_finite_is_skipped_where_the_loss_is_finite(pets, monkeypatch):
    monkeypatch.setattr(LanguageModel, "total_nats", lambda _, hidden, targets: jnp.sum(jnp.sqrt(0 * hidden)))
    _, state, advance = initialised(pets, 1)
    after = advance(state, rows_of_text(pets, 8))
    assert (int(after.bad), float(after.loss)) == (1, 0)
    assert all_finite(after.params)


def test_solver_iterations_are_averaged_over_layers_and_summed_over_steps(pets):
    config = dataclasses.replace(pets, solver="fixed_point", layers=2, dropout=0.0)
    model, state, advance = initialised(config, 3)
    ids = rows_of_text(config, 24)
    expected = 0.0
    for n in range(2):
        window, carry = ids[:, 7 * n : 7 * n + 8], jax.tree.map(jnp.copy, state.carry)
        _, sown = model.apply({"params": state.params}, window[:, :-1], carry, deterministic=True, mutable="solver")
        iterations = [float(layer["result"].iterations) for layer in sown["solver"].values()]
        assert len(iterations) == 2
        expected += np.mean(iterations)
        state = advance(state, ids)
        assert float(state.iterations) == pytest.approx(expected)
    assert mean_iterations({}) == 0


def test_all_settings_of_a_model_are_used():
    options = {"features": (5, 6), "layers": 2, "embedding": 6, "projection": 6, "tie": True, "dropout": 0.3}
    options |= {"gates": "input", "activation": "identity", "init_scale": 0.01, "solver": "sequential"}
    options |= {"block": "residual", "conv_width": 2, "expansion": None, "gate_init": "half-lives", "half_life": 9.0}
    options |= {"dropout_input": 0.1, "dropout_output": 0.4, "dropout_words": 0.05, "locked": True}
    model = build_model(Config(**options), 19)
    assert {name: getattr(model, name) for name in options} == options


def test_settings_that_no_model_has_are_refused_by_their_flags():
    for options, message in (
        ({"cell": "gru", "projection": 3}, "--projection"),
        ({"solver": "associative"}, "--solver must be one of .* got 'associative' with --gates recurrent"),
        ({"embedding": 3}, "--tie needs the embedding .* got --embedding 3"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(Config(**options), 19)


def test_the_dropout_of_a_seed_does_not_use_the_key_of_the_weights_of_another(pets, monkeypatch):
    keys, fold_in = [], jax.random.fold_in

    def recorded(key, data):
        if not isinstance(key, jax.core.Tracer):
            keys.append(jax.random.key_data(key))
        return fold_in(key, data)

    monkeypatch.setattr(jax.random, "fold_in", recorded)
    config = dataclasses.replace(pets, seed=3)
    _, state, advance = initialised(config, 1)
    del keys[:]
    advance(state, rows_of_text(config, 8))
    assert keys
    assert not any(np.array_equal(key, jax.random.key_data(jax.random.key(4))) for key in keys)


def test_training_with_strict_promotion_of_dtypes(pets):
    with jax.numpy_dtype_promotion("strict"):
        _, state, advance = initialised(pets, 1)
        assert int(advance(state, rows_of_text(pets, 8)).step) == 1


def test_training_has_no_infinity(pets):
    with jax.debug_infs(True):
        _, state, advance = initialised(pets, 1)
        advance(state, rows_of_text(pets, 8))
