"""Half-lives and spans over a corpus equal those of one decomposition of the whole text."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ranjax
from ranjax import memory, weights
from ranjax.errors import UserError
from ranjax.interpret.attribution import decompositions
from ranjax.lm import BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_windows_with_a_carried_state_equal_the_whole_text_at_once(x64, block):
    """Half-lives and spans counted window by window are those of the whole text."""
    model = ranjax.LanguageModel(vocabulary=9, features=(5, 4), block=block)
    ids = np.random.default_rng(0).integers(0, 9, 90).astype(np.int32)
    params = jax.jit(partial(model.init, deterministic=True))(jax.random.key(0), ids[None])["params"]
    params = jax.tree.map(lambda p: 3 * p.astype(jnp.float64), params)
    found = memory.memory(model, params, ids, most=8, window=20)
    for layer, parts in zip(found, decompositions(model, params, ids), strict=True):
        lives = np.asarray(weights.half_lives(parts, 8))[:80]
        np.testing.assert_array_equal(layer.spans, weights.spans(parts, share=0.1, most=8)[:80])
        np.testing.assert_array_equal(layer.half_lives, [np.bincount(n - 1, minlength=8) for n in lives.T])
        np.testing.assert_array_equal(layer.quantile(0.5), np.quantile(lives, 0.5, axis=0, method="inverted_cdf"))
        np.testing.assert_array_equal(layer.quantile(1.0), lives.max(axis=0))


def test_reduce_and_share_are_those_of_spans_for_a_text_of_minimal_length():
    model, ids = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), np.arange(28) % 9
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
    params = jax.tree.map(lambda p: 20 * p, params)
    (parts,) = decompositions(model, params, ids)
    for options in ({"reduce": "contribution"}, {"share": 0.6}):
        (layer,) = memory.memory(model, params, ids, most=8, window=20, **options)
        expected = weights.spans(parts, **{"share": 0.1} | options, most=8)[:20]
        np.testing.assert_array_equal(layer.spans, expected)
        assert not np.array_equal(expected, weights.spans(parts, share=0.1, most=8)[:20])


@pytest.mark.parametrize("q", [0, -0.5, 1.5])
def test_a_quantile_out_of_range_raises(q):
    with pytest.raises(ValueError, match="`q` must be above 0 and at most 1; got"):
        memory.Memory(np.ones((2, 3), int), np.ones(3, int)).quantile(q)


def test_ids_and_sizes_that_do_not_fit_raise():
    model, ids = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), np.arange(90) % 9
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
    with pytest.raises(ValueError, match="`window` must be a whole number, at least 1; got 0"):
        memory.memory(model, params, ids, most=8, window=0)
    with pytest.raises(ValueError, match=r"`most` must be a whole number, at least 1; got 2\.5"):
        memory.memory(model, params, ids, most=2.5, window=20)
    with pytest.raises(ValueError, match=r"`ids` must be the ids of one text, \(tokens,\); got the shape \(1, 90\)"):
        memory.memory(model, params, ids[None], most=8, window=20)
    with pytest.raises(ValueError, match="`ids` must be whole numbers from 0 to 8, the model's; got"):
        memory.memory(model, params, ids + 1, most=8, window=20)
    with pytest.raises(UserError, match="at least 28 tokens, a window of 20 and the 8 after it; got 27"):
        memory.memory(model, params, ids[:27], most=8, window=20)
