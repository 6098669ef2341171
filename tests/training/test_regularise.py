"""Masks of dropout, seen through what a model computes, and penalties of activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax import LanguageModel
from ranjax.training.config import Config
from ranjax.training.loss import make_loss
from ranjax.training.regularise import drop_weights, penalty, reads_state

CELLS = [{}, {"gates": "diagonal"}, {"gates": "input"}, {"cell": "lstm"}, {"cell": "gru"}, {"cell": "rnn"}]
BLOCKS = [{}, {"block": "residual"}, {"cell": "lstm"}, {"gates": "input"}]  # in both orders of the axes
TOKENS = jnp.arange(14).reshape(2, 7) % 5


def model_and_variables(**options):
    model = LanguageModel(5, features=16, layers=1, **options)
    return model, model.init(jax.random.key(0), TOKENS, deterministic=True)


def outputs(model, variables, key=1, tokens=TOKENS):
    """What the output layer reads, before and after dropout, `(batch, time, features)`."""
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(key)}, "mutable": "outputs"}
    _, sown = model.apply(variables, tokens, **options)
    [pair] = sown["outputs"]["last"]
    return [np.asarray(jnp.swapaxes(h, 0, 1) if model.time_major else h) for h in pair]


@pytest.mark.parametrize("options", BLOCKS)
def test_a_locked_mask_is_the_same_at_every_step_of_a_sequence(options):
    for locked in (True, False):
        model, variables = model_and_variables(dropout_output=0.5, locked=locked, **options)
        masks = [outputs(model, variables, key)[1] == 0 for key in (1, 2)]
        assert 0.3 < masks[0].mean() < 0.7
        assert all((mask == mask[:, :1]).all() == locked for mask in masks)
        assert (masks[0] != masks[1]).any()
        assert (masks[0][0] != masks[0][1]).any()  # each sequence has its own
        hidden, _ = model.apply(variables, TOKENS, deterministic=True, method="hidden")
        assert (np.asarray(hidden) != 0).all()


@pytest.mark.parametrize("options", BLOCKS)
def test_rates_are_of_their_own_places(options):
    """With the other rates 0 the outputs before their dropout are those of evaluation."""
    model, variables = model_and_variables(dropout_output=0.5, **options)
    hidden, _ = model.apply(variables, TOKENS, deterministic=True, method="hidden")
    before, after = outputs(model, variables)
    np.testing.assert_allclose(before, hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[after != 0], 2 * before[after != 0], rtol=1e-6)
    for rates in ({"dropout_input": 0.5}, {"dropout_words": 0.5}):
        model, variables = model_and_variables(**rates, **options)
        before, after = outputs(model, variables)
        np.testing.assert_array_equal(before, after)
        assert np.abs(before - hidden).max() > 1e-3


def test_dropout_of_all_places_is_that_of_one_rate():
    """A rate that is given and one that is the default draw masks at the same places."""
    one, variables = model_and_variables(dropout=0.5)
    for name in ("dropout_input", "dropout_output"):
        without, _ = model_and_variables(dropout=0.5, **{name: 0.0})
        assert (outputs(one, variables)[1] == 0).mean() > 0.3
        assert ((outputs(without, variables)[1] == 0).mean() > 0.3) == (name == "dropout_input")


def test_a_dropped_word_has_no_embedding_wherever_it_stands():
    model, variables = model_and_variables(dropout_words=0.5, gates="input")
    tokens = jnp.arange(40).reshape(2, 20) % 5

    def embedded(key):
        words = jnp.ones((2, 20, 16))
        options = {"rngs": {"dropout": jax.random.key(key)}, "method": "_words_dropped"}
        return np.asarray(model.apply(variables, words, tokens, False, **options))

    dropped = [embedded(key)[..., 0] == 0 for key in range(8)]
    for mask in dropped:
        assert len({(int(word), bool(gone)) for word, gone in zip(tokens.ravel(), mask.ravel(), strict=True)}) == 5
    assert 0.2 < np.mean(dropped) < 0.8
    assert set(np.unique(embedded(0))) <= {0.0, 2.0}


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("options", CELLS)
def test_weights_on_h_alone_are_dropped(block, options):
    _, variables = model_and_variables(block=block, **options)
    params = jax.tree.map(lambda p: p + 1e-3, variables["params"])
    dropped = drop_weights(params, 0.5, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, before), after in zip(leaves, jax.tree.leaves(dropped), strict=True):
        gone = np.asarray(after == 0)
        assert gone.any() == reads_state(path)
        np.testing.assert_array_equal(after[~gone], (2 * before if reads_state(path) else before)[~gone])
    on_state = {"input": 0, "lstm": 4, "gru": 3}.get(options.get("gates", options.get("cell")), 1)
    assert sum(reads_state(path) for path, _ in leaves) == on_state


def test_one_mask_of_weights_is_that_of_a_window_and_another_that_of_the_next():
    """The loss of a window is that of the whole window with those weights: they are the same at every step."""
    model, variables = model_and_variables()
    loss = make_loss(model, Config(dropout=0.0, dropout_weights=0.5))
    window = jnp.arange(16).reshape(2, 8) % 5
    values = [float(loss(variables["params"], None, window, jax.random.key(n))[0]) for n in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_penalties_are_those_of_a_loop(x64):
    before, after = np.random.default_rng(0).normal(size=(2, 2, 7, 3))
    moved = sum(np.sum((before[:, t + 1] - before[:, t]) ** 2) for t in range(6)) / (2 * 6 * 3)
    expected = 7 * (2 * np.mean(after**2) + 3 * moved)
    for order in ((0, 1, 2), (1, 0, 2)):
        pair = tuple(jnp.asarray(h.transpose(order)) for h in (before, after))
        np.testing.assert_allclose(penalty(pair, 2, 3, order.index(1)), expected, rtol=1e-6)
    assert float(penalty((jnp.ones((2, 1, 3)),) * 2, 0, 3, 1)) == 0  # of one step nothing changes


@pytest.mark.parametrize("options", BLOCKS)
def test_the_loss_has_the_penalties_and_reports_the_cross_entropy(options):
    model, variables = model_and_variables(**options)
    window, key = jnp.arange(16).reshape(2, 8) % 5, jax.random.key(0)
    plain, (nats, _, _) = make_loss(model, Config(dropout=0.0))(variables["params"], None, window, key)
    config = Config(dropout=0.0, activation_penalty=2.0, change_penalty=1.0)
    found, (same, _, _) = make_loss(model, config)(variables["params"], None, window, key)
    hidden, _ = model.apply(variables, window[:, :-1], deterministic=True, method="hidden")
    np.testing.assert_allclose(found - plain, penalty((hidden, hidden), 2.0, 1.0, 1), rtol=1e-4)
    assert plain == nats
    np.testing.assert_allclose(same, nats, rtol=1e-6)
