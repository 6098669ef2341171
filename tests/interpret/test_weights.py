"""States as weighted sums: weights, half-lives and spans equal loops in float64, and the change by one content."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from weights_oracle import (
    BATCH,
    FEATURES,
    KINDS,
    SIZE,
    TIME,
    constant,
    random_layer,
    reduced_by_loop,
    weights_by_loop,
)

import ranjax
from ranjax import weights


@pytest.mark.quick
def test_full_at_carried_and_reduced_agree_with_a_loop(x64):
    params, x, c0 = random_layer("recurrent")
    parts = weights.decompose(params, x, c0)
    expected, carry = weights_by_loop(parts.i, parts.f)
    np.testing.assert_allclose(weights.full(parts), expected, rtol=1e-12)
    np.testing.assert_allclose(weights.carried(parts), carry, rtol=1e-12)
    traced = jax.jit(weights.at)
    for t in (0, 5, TIME - 1):
        np.testing.assert_allclose(traced(parts, t), expected[:, t], rtol=1e-12)
    for reduce in weights.REDUCTIONS:
        np.testing.assert_allclose(
            jax.jit(weights.reduced, static_argnums=1)(parts, reduce),
            reduced_by_loop(expected, parts.u, reduce),
            rtol=1e-12,
        )


@pytest.mark.parametrize("projection", [None, 4])
def test_the_weighted_sum_is_accurate_over_2048_steps(x64, projection):
    inputs = random_layer("recurrent", projection=projection, time=2048)
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-6)):
        params, x, c0 = jax.tree.map(partial(jnp.asarray, dtype=dtype), inputs)
        parts = weights.decompose(params, x, c0)
        assert parts.c.dtype == dtype
        for t in (0, 1, 1000, 2047):
            w = weights.at(parts, t)
            found = jnp.sum(w * parts.u, axis=-2) + weights.carried(parts)[:, t] * parts.c0
            scale = jnp.sum(jnp.abs(w * parts.u), axis=-2) + 1  # what rounding is relative to
            np.testing.assert_allclose(found / scale, parts.c[:, t] / scale, rtol=0, atol=tolerance)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**20),
    source=st.integers(0, TIME - 1),
    time=st.integers(0, TIME - 1),
    start=st.integers(0, TIME - 1),
    length=st.integers(0, TIME),
)
def test_a_change_of_one_content_changes_a_state_by_its_weight(x64, kind, seed, source, time, start, length):
    """The oracle computes states and gates; with the gates constant, one content is increased by 1."""
    params, x, c0 = random_layer(*kind, seed=seed)
    masked = {"starts": np.arange(TIME) == np.full((BATCH, 1), start), "lengths": np.array([TIME, length, TIME])}
    states, _ = oracle.ran(params, x, c0, kind[1], **masked)
    i, f = oracle.gates(params, x, states, c0, kind[1], **masked)
    u = np.asarray(x) @ np.asarray(params["content"]["kernel"])
    assert np.abs(oracle.recurrence(f, i * u, c0) - states).max() < 1e-12
    moved = u.copy()
    moved[:, source] += 1
    change = (oracle.recurrence(f, i * moved, c0) - states)[:, time]
    starts, lengths = jnp.asarray(masked["starts"]), jnp.asarray(masked["lengths"])
    parts = weights.decompose(params, x, c0, activation=kind[1], segment_starts=starts, seq_lengths=lengths)
    np.testing.assert_allclose(change, weights.at(parts, time)[:, source], rtol=1e-9, atol=1e-11)


def test_norms_of_small_weights_do_not_underflow():
    """Squares of weights below 1e-19 underflow in float32; their norm does not."""
    i, f = jnp.full((120, 4), 0.5), jnp.full((120, 4), 0.4)
    parts = weights.Decomposition(i, f, i, i, i[0])
    expected = 0.5 * 0.4 ** np.arange(120.0)[::-1]
    there = expected > 1e-36
    np.testing.assert_allclose(weights.reduced(parts)[-1][there], 2 * expected[there], rtol=1e-5)
    values, _ = weights.top(parts, 120)
    np.testing.assert_allclose(values[-1][: there.sum()], 2 * expected[there][::-1], rtol=1e-5)
    small = weights.Decomposition(1e-20 * i, 0.9 + 0 * f, i, i, i[0])
    assert int(weights.spans(small)[0]) == int(weights.spans(small, "l1")[0]) == 7


@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_half_lives_and_spans_agree_with_a_loop(x64, most):
    params, x, c0 = random_layer("recurrent", time=50)
    params["gates"]["bias"] = params["gates"]["bias"].at[1].add(2.0)
    parts = weights.decompose(params, x, c0)
    w, _ = weights_by_loop(parts.i, parts.f)
    expected = np.full(parts.f.shape, most)
    shares = dict(zip(weights.REDUCTIONS, (0.5, 0.5, 0.1, 0.9)))
    words = {reduce: np.full(parts.f.shape[:-1], most) for reduce in shares}
    for j in range(50):
        for n in reversed(range(1, min(most, 50 - j))):
            expected[:, j][w[:, j + n, j] <= w[:, j, j] / 2] = n
            for reduce, found in words.items():
                numbers = reduced_by_loop(w, parts.u, reduce)
                found[:, j][numbers[:, j + n, j] <= numbers[:, j, j] * shares[reduce]] = n
    np.testing.assert_array_equal(weights.half_lives(parts, most), expected)
    for reduce, found in words.items():
        np.testing.assert_array_equal(weights.spans(parts, reduce, shares[reduce], most), found)
    assert most < 16 or len(np.unique(expected)) > 5


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_a_span_ends_at_exactly_the_share(reduce):
    assert weights.spans(constant(0.5, 0.5), reduce)[0] == 1


@pytest.mark.parametrize("rule", [weights.half_lives, weights.spans])
def test_a_horizon_beyond_the_sequence_adds_no_computation(rule):
    parts = constant(0.5, 0.5, steps=64)
    sizes = [str(jax.make_jaxpr(partial(rule, most=most))(parts)).count("\n") for most in (64, 2**31 - 1)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_gradients_flow_through_the_gates(x64, reduce):
    params, x, c0 = random_layer("recurrent", time=6)

    @jax.jit
    def number(params, x):
        parts = weights.decompose(params, x, c0)
        return jnp.sum(weights.reduced(parts, reduce)[:, -1] * jnp.arange(6.0)[None]) + jnp.sum(
            weights.at(parts, 3) ** 2
        )

    check_grads(number, (params, x), order=1, modes=["rev"], atol=1e-6)


@pytest.mark.parametrize("gates", ranjax.cell.GATES)
def test_a_second_call_outside_jit_compiles_nothing(gates, caplog):
    """A `lax` loop outside `jit` would compile at every call, and leak the program."""
    solvers = {"recurrent": ("auto", "fixed_point"), "diagonal": ("auto", "newton"), "input": ("auto", "chunked")}
    params, x, c0 = random_layer(gates, dtype=jnp.float32)
    layer = ranjax.RAN(ranjax.RANCell(FEATURES, gates))

    def use():
        parts = weights.decompose(params, x, c0)
        jax.grad(lambda x: jnp.sum(layer.apply({"params": {"cell": params}}, x)))(x)
        jax.grad(lambda u: jnp.sum(ranjax.linear_recurrence(parts.f, u)))(parts.u)
        for solver in solvers[gates]:
            ranjax.solve(params, x, gates=gates, solver=solver)
        weights.full(parts), weights.reduced(parts), weights.top(parts, 2)

    jax.clear_caches()
    compiled = []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            use()
        compiled.append(any("Compiling" in record.getMessage() for record in caplog.records))
    assert compiled == [True, False]


@pytest.mark.parametrize(
    ("gates", "solver"),
    [
        ("input", "auto"),
        ("diagonal", "auto"),
        ("diagonal", "newton"),
        ("recurrent", "auto"),
        ("recurrent", "fixed_point"),
    ],
)
def test_empty_sequences_and_batches_give_empty_results(gates, solver):
    for shape in ((0, 4, 3), (2, 0, 3)):
        params, _, _ = random_layer(gates, dtype=jnp.float32, features=3)
        parts = weights.decompose(params, jnp.zeros((*shape[:-1], SIZE)), solver=solver)
        assert weights.full(parts).shape == (*shape[:-1], shape[1], 3)
        assert weights.reduced(parts).shape == (*shape[:-1], shape[1])
        assert weights.top(parts, 2)[0].shape == (*shape[:-1], min(2, shape[1]))
        assert weights.half_lives(parts).shape == shape
        assert weights.spans(parts).shape == shape[:-1]


def test_full_returns_at_most_as_many_bytes_as_its_limit():
    assert weights.full(constant(0.5, 0.5), limit=4 * 4 * 3 * 4).shape == (4, 4, 3)
    parts = weights.Decomposition(*(jax.ShapeDtypeStruct((30_000, 1), jnp.float32),) * 4, None)
    with pytest.raises(ValueError, match="more than the `limit` of 1,073,741,824"):
        jax.eval_shape(weights.full, parts)
    parts = weights.decompose(*random_layer("recurrent", dtype=jnp.float32))
    with pytest.raises(ValueError, match=r"98,568 bytes, more than the `limit` of 1,000.*`at`"):
        weights.full(parts, limit=1000)


def test_arguments_out_of_range_raise():
    parts = weights.decompose(*random_layer("recurrent", dtype=jnp.float32))
    with pytest.raises(ValueError, match="`reduce` must be one of 'max', 'l1', 'l2', 'contribution'; got 'mean'"):
        weights.reduced(parts, "mean")
    with pytest.raises(ValueError, match=r"`most` must be below 2\*\*31; got 2147483648"):
        weights.half_lives(parts, 2**31)
    for step in (-1, TIME, 10**12, 1.5, [1, 2], None):
        with pytest.raises(ValueError, match="`step` must be"):
            weights.at(parts, step)
    with pytest.raises(ValueError, match="`most` must be a whole number, at least 1"):
        weights.half_lives(parts, 0)
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"`share` must be above 0 and below 1; got {share}"):
            weights.spans(parts, share=share)


@pytest.mark.parametrize("rule", [weights.half_lives, weights.spans, lambda parts: weights.top(parts, 2)])
def test_strict_promotion_of_dtypes(rule):
    f = jnp.full((10, 2), 0.9)
    parts = weights.Decomposition(i=f, f=f, u=f, c=f, c0=f[0])
    expected = rule(parts)
    with jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, rule(parts), expected)
