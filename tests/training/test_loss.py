"""The loss of a window in parts: of the batch, and of the steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax.lm import zero_state
from ranjax.training.config import Config
from ranjax.training.loss import in_parts, make_loss
from ranjax.training.model import build_model

MODELS = [
    {},
    {"cell": "lstm"},
    {"gates": "input", "block": "residual"},
    {"gates": "input", "block": "residual", "conv_width": 1},
    {"block": "residual", "cell": "gru"},
    {"gates": "diagonal", "softmax": "adaptive", "cutoffs": (4,)},
]


def differentiated(config, parts=1, key=0):
    model = build_model(config, 11)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    window = jax.random.randint(jax.random.key(1), (6, 13), 0, 11)
    carry = jax.tree.map(lambda c: jax.random.normal(jax.random.key(2), c.shape), zero_state(model, params, 6))
    differentiate = in_parts(jax.value_and_grad(make_loss(model, config), has_aux=True), parts)
    return jax.jit(differentiate)(params, carry, window, jax.random.key(key))


def assert_near(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if a.dtype == jnp.float32 else 1e-10),
        found,
        expected,
    )


@pytest.mark.parametrize("options", MODELS)
def test_parts_of_the_batch_and_of_the_window_are_the_whole(x64, options):
    config = Config(features=(8,), dropout=0.0, batch_size=6, steps=12, **options)
    whole = differentiated(config)
    assert_near(differentiated(config, parts=3), whole)
    assert_near(differentiated(dataclasses.replace(config, remat=4)), whole)
    assert_near(differentiated(dataclasses.replace(config, remat=3), parts=2), whole)


def test_locked_masks_are_the_same_in_all_parts_of_a_window(x64):
    options = {"dropout": 0.4, "dropout_words": 0.3, "dropout_weights": 0.3, "locked": True}
    config = Config(features=(8,), batch_size=6, steps=12, **options)
    assert_near(differentiated(dataclasses.replace(config, remat=4)), differentiated(config))


def test_parts_of_a_batch_have_masks_of_their_own(x64):
    config = Config(features=(8,), batch_size=6, steps=12, dropout=0.5)
    (whole, _), _ = differentiated(config)
    (parted, _), _ = differentiated(config, 2)
    assert whole != parted


def temporary(config, parts=1):
    model = build_model(config, 11)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True))[
        "params"
    ]
    carry = zero_state(model, params, config.batch_size)
    window = jax.ShapeDtypeStruct((config.batch_size, config.steps + 1), jnp.int32)
    differentiate = in_parts(jax.value_and_grad(make_loss(model, config), has_aux=True), parts)
    lowered = jax.jit(differentiate).lower(params, carry, window, jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("options", [{"gates": "input", "block": "residual"}, {"cell": "lstm"}])
def test_parts_take_less_memory(options):
    config = Config(features=(32,), layers=3, dropout=0.0, batch_size=8, steps=256, **options)
    whole = temporary(config)
    assert temporary(config, parts=8) < 0.4 * whole
    assert temporary(dataclasses.replace(config, remat=16)) < 0.4 * whole
