"""Every state as the weighted sum of what its past offered: against loops in float64, and by moving one content."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import ranjax
from ranjax import memory, weights
from ranjax.interpret import strongest
from ranjax.interpret.attribution import decompositions
from ranjax.errors import UserError

KINDS = [(gates, activation) for gates in ranjax.cell.GATES for activation in ("tanh", "identity")]
BATCH, TIME, SIZE, FEATURES = 3, 37, 5, 6


def drawn(gates, activation="tanh", projection=None, time=TIME, seed=0, dtype=jnp.float64, features=FEATURES):
    """A cell's parameters, every leaf at random, inputs and a first state."""
    cell = ranjax.RANCell(features, gates, activation, projection, param_dtype=dtype)
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (BATCH, time, SIZE), dtype)
    c0 = jax.random.normal(keys[1], (BATCH, features), dtype)
    leaves, tree = jax.tree.flatten(jax.eval_shape(cell.init, keys[2], c0, x[:, 0])["params"])
    leaves = [
        0.6 * jax.random.normal(k, p.shape, dtype) for k, p in zip(jax.random.split(keys[3], len(leaves)), leaves)
    ]
    return jax.tree.unflatten(tree, leaves), x, c0


def weights_by_loop(i, f):
    """w^t_j and what is left of the carry, step by step."""
    i, f = np.asarray(i, np.float64), np.asarray(f, np.float64)
    time = i.shape[-2]
    w, carry = np.zeros((*i.shape[:-2], time, time, i.shape[-1])), np.ones_like(i)
    for t in range(time):
        if t:
            w[..., t, :, :] = f[..., t, None, :] * w[..., t - 1, :, :]
        w[..., t, t, :] = i[..., t, :]
        carry[..., t, :] = f[..., t, :] * (carry[..., t - 1, :] if t else 1)
    return w, carry


def reduced_by_loop(w, u, reduce):
    part = np.abs(w * np.asarray(u)[..., None, :, :]) if reduce == "contribution" else w
    return {"max": part.max(-1), "l2": np.sqrt((part**2).sum(-1))}.get(reduce, part.sum(-1))


def the_sum(made, w):
    return jnp.einsum("...tjf,...jf->...tf", w, made.u) + weights.carried(made) * made.c0[..., None, :]


@pytest.mark.quick
@pytest.mark.parametrize(("gates", "activation"), KINDS)
@pytest.mark.parametrize("masks", [False, True])
def test_the_weighted_sum_is_the_state_that_the_layer_returns(x64, gates, activation, masks):
    params, x, c0 = drawn(gates, activation)
    told = {}
    if masks:
        told = {"seq_lengths": jnp.array([TIME, 0, 20]), "segment_starts": jnp.zeros((BATCH, TIME), bool)}
        told["segment_starts"] = told["segment_starts"].at[0, 7].set(True).at[2, 0].set(True).at[2, 11].set(True)
        x = x.at[2, 20:].set(jnp.nan).at[1].set(jnp.nan)
    made = jax.jit(weights.decompose, static_argnames="activation")(params, x, c0, activation=activation, **told)
    layer = ranjax.RAN(ranjax.RANCell(FEATURES, gates, activation, param_dtype=jnp.float64), return_carry=True)
    carry, h = layer.apply({"params": {"cell": params}}, x, initial_carry=c0, **told)
    np.testing.assert_array_equal(made.c[:, -1], carry)
    starts, lengths = told.get("segment_starts"), told.get("seq_lengths")
    expected, _ = oracle.ran(params, x, c0, activation, starts, lengths)
    np.testing.assert_allclose(made.c, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ranjax.cell.output(params, made.c, activation), h, rtol=0, atol=1e-12)
    np.testing.assert_allclose(the_sum(made, weights.full(made)), made.c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", [None, 4])
def test_the_sum_holds_over_2048_steps(x64, projection):
    inputs = drawn("recurrent", projection=projection, time=2048)
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-6)):
        params, x, c0 = jax.tree.map(partial(jnp.asarray, dtype=dtype), inputs)
        made = weights.decompose(params, x, c0)
        assert made.c.dtype == dtype
        for t in (0, 1, 1000, 2047):
            w = weights.at(made, t)
            found = jnp.sum(w * made.u, axis=-2) + weights.carried(made)[:, t] * made.c0
            scale = jnp.sum(jnp.abs(w * made.u), axis=-2) + 1  # what rounding is relative to
            np.testing.assert_allclose(found / scale, made.c[:, t] / scale, rtol=0, atol=tolerance)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**20),
    source=st.integers(0, TIME - 1),
    time=st.integers(0, TIME - 1),
    start=st.integers(0, TIME - 1),
    length=st.integers(0, TIME),
)
def test_moving_one_content_moves_a_state_by_its_weight(x64, kind, seed, source, time, start, length):
    """The oracle's own states and gates, the gates as they were; one content is moved by 1."""
    params, x, c0 = drawn(*kind, seed=seed)
    told = {"starts": np.arange(TIME) == np.full((BATCH, 1), start), "lengths": np.array([TIME, length, TIME])}
    states, _ = oracle.ran(params, x, c0, kind[1], **told)
    i, f = oracle.gates(params, x, states, c0, kind[1], **told)
    u = np.asarray(x) @ np.asarray(params["content"]["kernel"])
    assert np.abs(oracle.recurrence(f, i * u, c0) - states).max() < 1e-12
    moved = u.copy()
    moved[:, source] += 1
    change = (oracle.recurrence(f, i * moved, c0) - states)[:, time]
    starts, lengths = jnp.asarray(told["starts"]), jnp.asarray(told["lengths"])
    made = weights.decompose(params, x, c0, activation=kind[1], segment_starts=starts, seq_lengths=lengths)
    np.testing.assert_allclose(change, weights.at(made, time)[:, source], rtol=1e-9, atol=1e-11)


@pytest.mark.quick
def test_all_ways_to_the_weights_agree_with_the_loop(x64):
    params, x, c0 = drawn("recurrent")
    made = weights.decompose(params, x, c0)
    expected, carry = weights_by_loop(made.i, made.f)
    np.testing.assert_allclose(weights.full(made), expected, rtol=1e-12)
    np.testing.assert_allclose(weights.carried(made), carry, rtol=1e-12)
    traced = jax.jit(weights.at)
    for t in (0, 5, TIME - 1):
        np.testing.assert_allclose(traced(made, t), expected[:, t], rtol=1e-12)
    for reduce in weights.REDUCTIONS:
        np.testing.assert_allclose(
            jax.jit(weights.reduced, static_argnums=1)(made, reduce),
            reduced_by_loop(expected, made.u, reduce),
            rtol=1e-12,
        )


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
@pytest.mark.parametrize("open_gates", [0.0, 4.0])
def test_the_strongest_sources_are_those_of_the_whole_map(x64, patch, reduce, open_gates):
    patch(strongest, "BLOCK", 8)
    params, x, c0 = drawn("recurrent", time=61)
    params["gates"]["bias"] = params["gates"]["bias"].at[1].add(open_gates)  # of blocks few, or all, can be left out
    made = weights.decompose(params, x, c0, segment_starts=jnp.zeros((BATCH, 61), bool).at[1, 30].set(True))
    whole = reduced_by_loop(weights_by_loop(made.i, made.f)[0], made.u, reduce)
    for k in (1, 4, 70):
        values, steps = jax.jit(weights.top, static_argnums=(1, 2))(made, k, reduce)
        assert values.shape == steps.shape == (BATCH, 61, k)
        order = np.argsort(-whole, axis=-1, kind="stable")[..., :k]
        expected = np.take_along_axis(whole, order, -1)
        found = np.asarray(values)[..., : expected.shape[-1]]
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        there = expected > 0
        np.testing.assert_array_equal(np.asarray(steps)[..., : expected.shape[-1]][there], order[there])
        assert np.all(np.asarray(steps)[np.asarray(values) == 0] == -1)


def test_equal_sources_come_with_the_latest_first_and_none_is_made_up(patch):
    patch(strongest, "BLOCK", 4)
    ones = jnp.ones((10, 2))
    made = weights.Decomposition(ones / 2, ones, ones, ones, ones[0])
    values, steps = weights.top(made, 3, "max")
    np.testing.assert_array_equal(np.asarray(steps)[[0, 1, 9]], [[0, -1, -1], [1, 0, -1], [9, 8, 7]])
    np.testing.assert_array_equal(values[0], [0.5, 0, 0])


def test_the_search_for_the_strongest_ends_where_nothing_more_can_come(patch):
    patch(strongest, "BLOCK", 4)
    looked = []
    pairs = strongest.measure_pairs

    def spying(reduce, p, w):
        if w.shape[0] > 1:
            jax.debug.callback(lambda: looked.append(1))
        return pairs(reduce, p, w)

    patch(strongest, "measure_pairs", spying)
    gates = jnp.full((64, 3), 0.5)
    jax.block_until_ready(weights.top(weights.Decomposition(gates, gates, gates, gates, gates[0]), 2))
    jax.effects_barrier()
    assert len(looked) == 15  # one block back from each but the first, of 120


@pytest.mark.parametrize("reduce", ["max", "l2", "contribution"])
def test_rounding_does_not_end_the_search_too_early(patch, reduce):
    """All weights in the last state nearly the same: a search that ends early finds what one that never ends does."""
    patch(strongest, "BLOCK", 4)
    rng = np.random.default_rng(0)
    f = 1 - 1e-3 * rng.uniform(size=(2048, 1))
    i = np.cumprod(f[::-1], axis=0)[-1] / np.append(np.cumprod(f[:0:-1], axis=0)[::-1], [[1.0]], axis=0)
    i, f = (jnp.asarray(a, jnp.float32) for a in (i, f))
    made = weights.Decomposition(i, f, jnp.ones_like(i), i, i[0])
    early = weights.top(made, 3, reduce)
    patch(strongest, "_margin", lambda *_: 1e30)
    jax.tree.map(np.testing.assert_array_equal, early, weights.top(made, 3, reduce))
    patch(strongest, "_margin", lambda *_: 0.0)
    without = weights.top(made, 3, reduce)[0]
    assert reduce != "contribution" or not np.array_equal(early[0], without)  # the margin is needed


def test_the_margin_grows_with_the_features_that_are_summed():
    eps = float(np.finfo(np.float32).eps)
    assert strongest._margin(1, 1000, "float32") > 1000 * eps
    assert strongest._margin(1000, 1, "float32") > 1000 * eps


def test_norms_of_small_weights_are_not_lost():
    """Squares of weights below 1e-19 are nothing in float32; their norm is."""
    i, f = jnp.full((120, 4), 0.5), jnp.full((120, 4), 0.4)
    made = weights.Decomposition(i, f, i, i, i[0])
    expected = 0.5 * 0.4 ** np.arange(120.0)[::-1]
    there = expected > 1e-36
    np.testing.assert_allclose(weights.reduced(made)[-1][there], 2 * expected[there], rtol=1e-5)
    values, _ = weights.top(made, 120)
    np.testing.assert_allclose(values[-1][: there.sum()], 2 * expected[there][::-1], rtol=1e-5)
    small = weights.Decomposition(1e-20 * i, 0.9 + 0 * f, i, i, i[0])
    assert int(weights.spans(small)[0]) == int(weights.spans(small, "l1")[0]) == 7
    norms = strongest.measure_pairs("l2", jnp.ones((1, 4)), jnp.full((1, 4), 1e-30))
    np.testing.assert_allclose(norms, 2e-30, rtol=1e-5)


@pytest.mark.parametrize(
    ("gates", "solver"), [("recurrent", "auto"), ("diagonal", "auto"), ("diagonal", "sequential"), ("input", "auto")]
)
@pytest.mark.parametrize("narrow", ["parameters", "products"])
def test_narrow_products_and_their_gates(gates, solver, narrow):
    """The gates are those of the layer's own walk: made anew in bfloat16 they would be off by a hundredth."""
    dtypes = {"param_dtype": jnp.bfloat16} if narrow == "parameters" else {"dtype": jnp.bfloat16}
    layer = ranjax.RAN(ranjax.RANCell(32, gates, **dtypes), solver, return_carry=True)
    x = jax.random.normal(jax.random.key(0), (2, 100, 8), jnp.bfloat16 if narrow == "parameters" else jnp.float32)
    params = layer.init(jax.random.key(1), x)["params"]
    carry, _ = layer.apply({"params": params}, x)
    made = weights.decompose(params["cell"], x, solver=solver, dtype=dtypes.get("dtype"))
    np.testing.assert_array_equal(made.c[:, -1], carry)
    np.testing.assert_allclose(the_sum(made, weights.full(made)), made.c, rtol=0, atol=3e-6)


@pytest.mark.parametrize("most", [1, 5, 16, 1000])
def test_half_lives_and_spans_against_a_loop(x64, most):
    params, x, c0 = drawn("recurrent", time=50)
    params["gates"]["bias"] = params["gates"]["bias"].at[1].add(2.0)
    made = weights.decompose(params, x, c0)
    w, _ = weights_by_loop(made.i, made.f)
    expected = np.full(made.f.shape, most)
    shares = dict(zip(weights.REDUCTIONS, (0.5, 0.5, 0.1, 0.9)))
    words = {reduce: np.full(made.f.shape[:-1], most) for reduce in shares}
    for j in range(50):
        for n in reversed(range(1, min(most, 50 - j))):
            expected[:, j][w[:, j + n, j] <= w[:, j, j] / 2] = n
            for reduce, found in words.items():
                numbers = reduced_by_loop(w, made.u, reduce)
                found[:, j][numbers[:, j + n, j] <= numbers[:, j, j] * shares[reduce]] = n
    np.testing.assert_array_equal(weights.half_lives(made, most), expected)
    for reduce, found in words.items():
        np.testing.assert_array_equal(weights.spans(made, reduce, shares[reduce], most), found)
    assert most < 16 or len(np.unique(expected)) > 5


def test_looking_further_than_the_sequence_costs_nothing():
    half = jnp.full((64, 3), 0.5)
    made = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
    for rule in (weights.half_lives, weights.spans):
        sizes = [str(jax.make_jaxpr(partial(rule, most=most))(made)).count("\n") for most in (64, 2**31 - 1)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_weights_are_differentiated_through_the_gates(x64, reduce):
    params, x, c0 = drawn("recurrent", time=6)

    @jax.jit
    def number(params, x):
        made = weights.decompose(params, x, c0)
        return jnp.sum(weights.reduced(made, reduce)[:, -1] * jnp.arange(6.0)[None]) + jnp.sum(weights.at(made, 3) ** 2)

    check_grads(number, (params, x), order=1, modes=["rev"], atol=1e-6)


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_the_strongest_have_derivatives_in_forward_mode(x64, patch, reduce):
    patch(strongest, "BLOCK", 4)
    made = weights.decompose(*drawn("recurrent", time=10))

    def values(i, f, u):
        return weights.top(made._replace(i=i, f=f, u=u), 2, reduce)[0]

    check_grads(values, (made.i, made.f, made.u), order=1, modes=["fwd"])


def test_a_hundred_thousand_steps_in_bounded_memory():
    """64 components; the blocks' own arrays are a constant number of the sequence's size."""
    time = 100_000
    key = jax.random.split(jax.random.key(0), 3)
    i, u = jax.random.uniform(key[0], (time, 64)), jax.random.normal(key[1], (time, 64))
    f = jax.nn.sigmoid(jax.random.normal(key[2], (time, 64)) + jnp.linspace(-2, 4, 64)[None])
    made = weights.Decomposition(i, f, u, u, u[0])
    compiled = jax.jit(weights.top, static_argnums=(1, 2)).lower(made, 5, "l2").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * f.nbytes
    values, steps = compiled(made)
    for t in (0, 3, 50_000, time - 1):
        row = jnp.linalg.norm(weights.at(made, t)[max(0, t - 5000) : t + 1], axis=-1)  # the rest is below 1e-30
        order = jnp.argsort(-row)[:5]
        np.testing.assert_allclose(values[t, : len(order)], row[order], rtol=1e-5)
        np.testing.assert_array_equal(steps[t, : len(order)], order + max(0, t - 5000))


@pytest.mark.parametrize("gates", ranjax.cell.GATES)
def test_outside_jit_nothing_is_compiled_twice(gates, caplog):
    """A loop would be, at every call, and what was made of it kept."""
    solvers = {"recurrent": ("auto", "fixed_point"), "diagonal": ("auto", "newton"), "input": ("auto", "chunked")}
    params, x, c0 = drawn(gates, dtype=jnp.float32)
    layer = ranjax.RAN(ranjax.RANCell(FEATURES, gates))

    def use():
        made = weights.decompose(params, x, c0)
        jax.grad(lambda x: jnp.sum(layer.apply({"params": {"cell": params}}, x)))(x)
        jax.grad(lambda u: jnp.sum(ranjax.linear_recurrence(made.f, u)))(made.u)
        for solver in solvers[gates]:
            ranjax.solve(params, x, gates=gates, solver=solver)
        weights.full(made), weights.reduced(made), weights.top(made, 2)

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
def test_no_steps_and_no_sequences(gates, solver):
    for shape in ((0, 4, 3), (2, 0, 3)):
        params, _, _ = drawn(gates, dtype=jnp.float32, features=3)
        made = weights.decompose(params, jnp.zeros((*shape[:-1], SIZE)), solver=solver)
        assert weights.full(made).shape == (*shape[:-1], shape[1], 3)
        assert weights.reduced(made).shape == (*shape[:-1], shape[1])
        assert weights.top(made, 2)[0].shape == (*shape[:-1], 2)
        assert weights.half_lives(made).shape == shape
        assert weights.spans(made).shape == shape[:-1]


def test_bad_arguments_say_how_to_mend_them():
    params, x, c0 = drawn("recurrent", dtype=jnp.float32)
    made = weights.decompose(params, x, c0)
    with pytest.raises(ValueError, match=r"98,568 bytes, more than the `limit` of 1,000.*`at`"):
        weights.full(made, limit=1000)
    with pytest.raises(ValueError, match="`reduce` must be one of 'max', 'l1', 'l2', 'contribution'; got 'mean'"):
        weights.reduced(made, "mean")
    with pytest.raises(ValueError, match="`reduce`"):
        weights.top(made, 2, "mean")
    for k in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"`k` must be a whole number, at least 1; got {k}"):
            weights.top(made, k)
    with pytest.raises(ValueError, match=r"`most` must be below 2\*\*31; got 2147483648"):
        weights.half_lives(made, 2**31)
    for step in (-1, TIME, 10**12, 1.5, [1, 2], None):
        with pytest.raises(ValueError, match="`step` must be"):
            weights.at(made, step)
    with pytest.raises(ValueError, match="`most` must be a whole number, at least 1"):
        weights.half_lives(made, 0)
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"`share` must be above 0 and below 1; got {share}"):
            weights.spans(made, share=share)
    for q in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="`q` must be above 0 and at most 1; got"):
            memory.Memory(np.ones((2, 3), int), np.ones(3, int)).quantile(q)
    with pytest.raises(ValueError, match=r"`solver` must be one of .* got 'magic'"):
        weights.decompose(params, x, solver="magic")
    with pytest.raises(ValueError, match="`activation`"):
        weights.decompose(params, x, activation="relu")
    for bad in (x[0, 0], x[..., :3]):
        with pytest.raises(ValueError, match=r"`x` must have the axes \(\*batch, time, in\)"):
            weights.decompose(params, bad)
    for bad, got in (
        ({"params": params}, "params"),
        ({"gates": 0}, "gates"),
        ({"content": 0}, "content"),
        ({"content": {}, "gates": {}}, "content, gates"),
        ({}, "nothing"),
    ):
        for use in (weights.decompose, partial(ranjax.solve, gates="recurrent")):
            with pytest.raises(ValueError, match=f"`params` must be those that a RANCell makes.*got {got}"):
                use(bad, x)
    for use in (weights.decompose, partial(ranjax.solve, gates="recurrent")):
        with pytest.raises(TypeError, match="`x` must be real; got complex64"):
            use(params, 1j * x)
    with pytest.raises(ValueError, match=f"`seq_lengths` must be from 0 to {TIME}"):
        weights.decompose(params, x, seq_lengths=np.full(BATCH, TIME + 1))
    with pytest.raises(ValueError, match="`c0` must have the shape"):
        weights.decompose(params, x, c0[0])
    with pytest.raises(ValueError, match="`segment_starts` must have the shape"):
        weights.decompose(params, x, segment_starts=jnp.zeros(3, bool))


def test_the_memory_over_a_text_is_that_of_its_parts(x64):
    """Windows with the state carried on count what one reading of the whole text does."""
    model = ranjax.LanguageModel(vocabulary=9, features=(5, 4))
    ids = np.random.default_rng(0).integers(0, 9, 90).astype(np.int32)
    params = jax.jit(partial(model.init, deterministic=True))(jax.random.key(0), ids[None])["params"]
    params = jax.tree.map(lambda p: 3 * p.astype(jnp.float64), params)
    found = memory.memory(model, params, ids, most=8, window=20)
    for layer, made in zip(found, decompositions(model, params, ids)):
        lives = np.asarray(weights.half_lives(made, 8))[:80]
        np.testing.assert_array_equal(layer.spans, weights.spans(made, share=0.1, most=8)[:80])
        np.testing.assert_array_equal(layer.half_lives, [np.bincount(n - 1, minlength=8) for n in lives.T])
        np.testing.assert_array_equal(layer.quantile(0.5), np.quantile(lives, 0.5, axis=0, method="inverted_cdf"))
        np.testing.assert_array_equal(layer.quantile(1.0), lives.max(axis=0))
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


@pytest.mark.parametrize("reduce", weights.REDUCTIONS)
def test_exactly_the_share_is_no_more_than_it(reduce):
    half = jnp.full((4, 3), 0.5)
    made = weights.Decomposition(i=half, f=half, u=half, c=half, c0=half[0])
    assert weights.spans(made, reduce)[0] == 1


def test_the_limit_of_all_weights():
    half = jnp.full((4, 3), 0.5)
    assert weights.full(weights.Decomposition(half, half, half, half, half[0]), limit=4 * 4 * 3 * 4).shape == (4, 4, 3)
    made = weights.Decomposition(*(jax.ShapeDtypeStruct((30_000, 1), jnp.float32),) * 4, None)
    with pytest.raises(ValueError, match="more than the `limit` of 1,073,741,824"):
        jax.eval_shape(weights.full, made)


def test_memory_takes_the_measure_and_the_share_and_a_text_that_is_just_long_enough():
    model, ids = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), np.arange(28) % 9
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
    params = jax.tree.map(lambda p: 20 * p, params)
    (made,) = decompositions(model, params, ids)
    for options in ({"reduce": "contribution"}, {"share": 0.6}):
        (layer,) = memory.memory(model, params, ids, most=8, window=20, **options)
        expected = weights.spans(made, **{"share": 0.1} | options, most=8)[:20]
        np.testing.assert_array_equal(layer.spans, expected)
        assert not np.array_equal(expected, weights.spans(made, share=0.1, most=8)[:20])


def test_the_default_state_has_the_dtype_of_the_sums(x64):
    params, x, _ = drawn("recurrent", dtype=jnp.float32)
    for dtype in (jnp.float32, jnp.float64):
        assert weights.decompose(params, x.astype(dtype)).c.dtype == dtype


def test_states_and_gates_are_those_of_the_solver(x64):
    params, x, c0 = drawn("recurrent")
    solver = ranjax.FixedPoint(max_iterations=2, on_failure="ignore")
    made = weights.decompose(params, x, c0, solver=solver)
    np.testing.assert_allclose(made.c, ranjax.solve(params, x, c0, gates="recurrent", solver=solver)[0], atol=1e-12)
    assert float(jnp.abs(made.c - weights.decompose(params, x, c0).c).max()) > 1e-3
    made, expected = (weights.decompose(params, x, c0, solver=s) for s in ("fixed_point", "sequential"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), made, expected)


def test_parameters_in_boxes_are_taken_out():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer, x = ranjax.RAN(ranjax.RANCell(4, kernel_init=init)), jnp.ones((2, 5, 3))
    variables = layer.init(jax.random.key(0), x)
    params, h = variables["params"]["cell"], layer.apply(variables, x)
    for c in (weights.decompose(params, x).c, ranjax.solve(params, x, gates="recurrent")[0]):
        np.testing.assert_allclose(jnp.tanh(c), h, rtol=0, atol=1e-6)
