"""The strongest sources equal those of the whole map, by a search that ends early and in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from weights_oracle import BATCH, constant, random_layer, reduced_by_loop, weights_by_loop

from ranjax import weights
from ranjax.interpret import strongest


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
@pytest.mark.parametrize("open_gates", [0.0, 4.0])
def test_top_equals_the_sorted_map_of_all_pairs(x64, patch, reduce, open_gates):
    patch(strongest, "BLOCK", 8)
    params, x, c0 = random_layer("recurrent", time=61)
    params["gates"]["bias"] = (
        params["gates"]["bias"].at[1].add(open_gates)
    )  # at 0 the search ends early, at 4 it visits all blocks
    parts = weights.decompose(params, x, c0, segment_starts=jnp.zeros((BATCH, 61), bool).at[1, 30].set(True))
    whole = reduced_by_loop(weights_by_loop(parts.i, parts.f)[0], parts.u, reduce)
    for k in (1, 4, 70):
        values, steps = jax.jit(weights.top, static_argnums=(1, 2))(parts, k, reduce)
        assert values.shape == steps.shape == (BATCH, 61, min(k, 61))
        order = np.argsort(-whole, axis=-1, kind="stable")[..., :k]
        expected = np.take_along_axis(whole, order, -1)
        found = np.asarray(values)[..., : expected.shape[-1]]
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        there = expected > 0
        np.testing.assert_array_equal(np.asarray(steps)[..., : expected.shape[-1]][there], order[there])
        assert np.all(np.asarray(steps)[np.asarray(values) == 0] == -1)


def test_ties_put_the_later_step_first_and_missing_sources_are_minus_one(patch):
    patch(strongest, "BLOCK", 4)
    values, steps = weights.top(constant(0.5, 1.0, steps=10), 3, "max")
    np.testing.assert_array_equal(np.asarray(steps)[[0, 1, 9]], [[0, -1, -1], [1, 0, -1], [9, 8, 7]])
    np.testing.assert_array_equal(values[0], [0.5, 0, 0])


def test_the_search_ends_when_the_bound_is_reached(patch):
    patch(strongest, "BLOCK", 4)
    searched = []
    pairs = strongest.measure_pairs

    def spying(reduce, p, w):
        if w.shape[0] > 1:
            jax.debug.callback(lambda: searched.append(1))
        return pairs(reduce, p, w)

    patch(strongest, "measure_pairs", spying)
    jax.block_until_ready(weights.top(constant(0.5, 0.5, steps=64), 2))
    jax.effects_barrier()
    assert len(searched) == 15  # of 120 pairs of blocks: each block but the first, with the one before


@pytest.mark.parametrize("reduce", ["max", "l2", "contribution"])
def test_rounding_does_not_end_the_search_too_early(patch, reduce):
    """All weights in the last state are nearly equal: a search with the margin finds what an exhaustive one finds."""
    patch(strongest, "BLOCK", 4)
    rng = np.random.default_rng(0)
    f = 1 - 1e-3 * rng.uniform(size=(2048, 1))
    i = np.cumprod(f[::-1], axis=0)[-1] / np.append(np.cumprod(f[:0:-1], axis=0)[::-1], [[1.0]], axis=0)
    i, f = (jnp.asarray(a, jnp.float32) for a in (i, f))
    parts = weights.Decomposition(i, f, jnp.ones_like(i), i, i[0])
    early = weights.top(parts, 3, reduce)
    patch(strongest, "_margin", lambda *_: 1e30)
    jax.tree.map(np.testing.assert_array_equal, early, weights.top(parts, 3, reduce))
    patch(strongest, "_margin", lambda *_: 0.0)
    without = weights.top(parts, 3, reduce)[0]
    assert reduce != "contribution" or not np.array_equal(early[0], without)  # the margin is needed


def test_the_margin_covers_the_rounding_of_sums_over_features_and_blocks():
    eps = float(np.finfo(np.float32).eps)
    assert strongest._margin(1, 1000, "float32") > 1000 * eps
    assert strongest._margin(1000, 1, "float32") > 1000 * eps


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_top_has_derivatives_in_forward_mode(x64, patch, reduce):
    patch(strongest, "BLOCK", 4)
    parts = weights.decompose(*random_layer("recurrent", time=10))

    def values(i, f, u):
        return weights.top(parts._replace(i=i, f=f, u=u), 2, reduce)[0]

    check_grads(values, (parts.i, parts.f, parts.u), order=1, modes=["fwd"])


def test_memory_is_linear_in_a_hundred_thousand_steps():
    """64 components; temporary arrays take a constant multiple of the memory of the sequence."""
    time = 100_000
    key = jax.random.split(jax.random.key(0), 3)
    i, u = jax.random.uniform(key[0], (time, 64)), jax.random.normal(key[1], (time, 64))
    f = jax.nn.sigmoid(jax.random.normal(key[2], (time, 64)) + jnp.linspace(-2, 4, 64)[None])
    parts = weights.Decomposition(i, f, u, u, u[0])
    compiled = jax.jit(weights.top, static_argnums=(1, 2)).lower(parts, 5, "l2").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * f.nbytes
    values, steps = compiled(parts)
    for t in (0, 3, 50_000, time - 1):
        row = jnp.linalg.norm(weights.at(parts, t)[max(0, t - 5000) : t + 1], axis=-1)  # the rest is below 1e-30
        order = jnp.argsort(-row)[:5]
        np.testing.assert_allclose(values[t, : len(order)], row[order], rtol=1e-5)
        np.testing.assert_array_equal(steps[t, : len(order)], order + max(0, t - 5000))


def test_arguments_of_top_out_of_range_raise():
    parts = weights.decompose(*random_layer("recurrent", dtype=jnp.float32))
    with pytest.raises(ValueError, match="`reduce`"):
        weights.top(parts, 2, "mean")
    for k in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"`k` must be a whole number, at least 1; got {k}"):
            weights.top(parts, k)


def test_more_sources_than_steps_are_as_many_as_there_are():
    parts = constant(0.5, 0.5, steps=3)
    jax.tree.map(np.testing.assert_array_equal, weights.top(parts, 10**9), weights.top(parts, 3))
