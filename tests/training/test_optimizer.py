"""Update rules and learning rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ranjax.training import optimizer
from ranjax.training.config import PRESETS, Config
from ranjax.training.model import build_model

pytestmark = pytest.mark.quick


def test_the_learning_rate_of_the_papers_halves_after_four_epochs():
    rate = optimizer.learning_rate(PRESETS["ptb-small"], per_epoch=10)
    assert [float(rate(10 * epoch + 5)) for epoch in range(7)] == [1, 1, 1, 1, 0.5, 0.25, 0.125]


def test_the_cosine_schedule_warms_up_for_at_most_half_of_all_steps():
    cosine = optimizer.learning_rate(Config(schedule="cosine", epochs=2, warmup=5, learning_rate=1.0), per_epoch=10)
    assert [float(cosine(n)) for n in (0, 5, 20)] == pytest.approx([0, 1, 0.01])
    short = optimizer.learning_rate(Config(schedule="cosine", epochs=2, warmup=1000, learning_rate=1.0), per_epoch=10)
    assert [float(short(n)) for n in (0, 5, 10, 20)] == pytest.approx([0, 0.5, 1, 0.01])
    none = optimizer.learning_rate(Config(schedule="cosine", epochs=2, warmup=0, learning_rate=1.0), per_epoch=10)
    assert [float(none(n)) for n in (0, 20)] == pytest.approx([1, 0.01])
    constant = optimizer.learning_rate(Config(schedule="constant", learning_rate=0.3), per_epoch=10)
    assert [float(constant(n)) for n in (0, 999)] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("decay", [0.5, 0.8, 1 / 1.15, 1 / 1.03])
@pytest.mark.parametrize("decay_after", [0, 1, 6, 14])
def test_the_learning_rate_decays_once_an_epoch_after_the_first_ones(decay, decay_after):
    """lr = peak * decay^max(k + 1 - decay_after, 0) in epoch k = 0, 1, ...; checked on both sides of every change."""
    per_epoch = 1327
    config = Config(schedule="decay", learning_rate=0.8, decay=decay, decay_after=decay_after)
    rate = jax.jit(optimizer.learning_rate(config, per_epoch))
    steps = np.concatenate([[0], *([k * per_epoch - 1, k * per_epoch] for k in range(1, 17))])
    expected = 0.8 * np.float64(decay) ** np.maximum(steps // per_epoch + 1 - decay_after, 0)
    np.testing.assert_allclose([float(rate(jnp.int32(n))) for n in steps], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["decay", "cosine"])
def test_the_update_with_strict_promotion_of_dtypes(pets, name, schedule):
    rule = optimizer.make_optimizer(dataclasses.replace(pets, optimizer=name, schedule=schedule), 10)
    params = {"weights": jnp.ones(3)}
    expected = rule.update(params, rule.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, rule.update(params, rule.init(params), params), expected)


OPTIONS = [{}, {"block": "residual", "gates": "input"}, {"cell": "lstm"}, {"gates": "diagonal"}]


def params_of(**options):
    model = build_model(Config(features=(8,), **options), 19)
    return model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), deterministic=True)["params"]


@pytest.mark.parametrize("options", OPTIONS)
def test_muon_is_for_the_matrices_of_layers(options):
    params = params_of(**options)

    def is_leaf(one):
        return one is None or isinstance(one, optax.contrib.MuonDimensionNumbers)

    found, leaves = (
        jax.tree.leaves(optimizer.matrices(params), is_leaf=is_leaf),
        jax.tree_util.tree_leaves_with_path(params),
    )
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for one, (path, leaf) in zip(found, leaves, strict=True)
        if one is not None
    }
    assert chosen
    assert all(name.startswith("stack_") and name.endswith("kernel") for name in chosen)
    assert all(len(shape) == (3 if "gates" in name else 2) for name, shape in chosen.items())


def test_an_update_of_muon_is_orthogonal_for_each_gate_and_as_large_as_adams():
    params = {
        "stack_0": {"gates": {"kernel": jnp.zeros((8, 2, 8))}},
        "embed": {"embedding": jnp.zeros((9, 8))},
    }
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    rule = optimizer.make_optimizer(Config(optimizer="muon", learning_rate=1.0, schedule="constant", clip=1e9), 10)
    update, _ = rule.update(gradient, rule.init(params), params)
    for gate in np.moveaxis(np.asarray(update["stack_0"]["gates"]["kernel"]), 1, 0):
        values = np.linalg.svd(gate, compute_uv=False)
        assert values.max() / values.min() < 3  # of a random matrix: above 10
        assert np.sqrt(np.mean(gate**2)) == pytest.approx(0.2, rel=0.3)
    adam = optax.adamw(1.0, weight_decay=0.0, nesterov=True)
    expected, _ = adam.update(gradient["embed"], adam.init(params["embed"]), params["embed"])
    np.testing.assert_allclose(update["embed"]["embedding"], expected["embedding"], rtol=1e-5, atol=1e-5)


def test_schedule_free_is_that_of_optax_and_evaluates_its_averages():
    config = Config(optimizer="schedule_free", schedule="constant", learning_rate=0.1, warmup=3, clip=1e9)
    rule, plain = optimizer.make_optimizer(config, 10), optax.contrib.schedule_free_adamw(0.1, 3)
    params = others = {"w": jnp.arange(3.0)}
    state, other = rule.init(params), plain.init(others)
    for n in range(5):
        gradient = {"w": jnp.sin(params["w"] + n)}
        update, state = rule.update(gradient, state, params)
        updates, other = plain.update(gradient, other, others)
        params, others = optax.apply_updates(params, update), optax.apply_updates(others, updates)
    np.testing.assert_allclose(params["w"], others["w"], rtol=1e-6)

    holder = dataclasses.make_dataclass("Holder", ["optimizer", "params"])
    jax.tree_util.register_dataclass(holder, ["optimizer", "params"], [])
    found = optimizer.evaluated(config)(holder(state, params))
    np.testing.assert_allclose(found["w"], optax.contrib.schedule_free_eval_params(other, others)["w"], rtol=1e-6)
    assert float(jnp.abs(found["w"] - params["w"]).max()) > 1e-3


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "schedule_free"])
def test_every_rule_decays_weights(name):
    options = {"optimizer": name, "schedule": "constant", "learning_rate": 0.1, "warmup": 0}
    params = params_of(gates="input")
    zero = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.0, 0.5):
        rule = optimizer.make_optimizer(Config(**options, weight_decay=decay), 10)
        update, _ = rule.update(zero, rule.init(params), params)
        moved = jax.tree.map(lambda u, p: float(jnp.abs(u).max() / jnp.maximum(jnp.abs(p).max(), 1e-9)), update, params)
        kernels = [moved["embed"]["embedding"], moved["stack_0"]["cell"]["content"]["kernel"]]
        assert all((value > 1e-3) == (decay > 0) for value in kernels), moved
