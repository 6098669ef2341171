"""The cross-entropy of the output layer: chunked and adaptive, equal to the plain full softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ranjax import LanguageModel, output
from ranjax.output import AdaptiveSoftmax, default_cutoffs, nats, total_nats

CUTOFFS = [(5, 11), (1, 2, 22)]


def plain(x, w, b, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w.T + b[None], y)


def drawn(rows, features, vocabulary, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = (
        jax.random.normal(keys[0], (rows, features), dtype),
        jax.random.normal(keys[1], (vocabulary, features), dtype),
    )
    return x, w, jax.random.normal(keys[2], (vocabulary,), dtype), jax.random.randint(keys[3], (rows,), 0, vocabulary)


@pytest.fixture(params=[40, 10**6])
def held(request, monkeypatch):
    """Chunks of a few rows, which is no divisor of their number, and of all."""
    monkeypatch.setattr(output, "HELD", request.param)
    monkeypatch.setattr(output, "LEAST", 1)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (7, 1), (17, 23)])
@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_are_the_plain_softmax(x64, held, rows, vocabulary, axis):
    x, w, b, y = drawn(rows, 5, vocabulary)
    expected = jax.value_and_grad(lambda *a: 1.7 * jnp.sum(plain(*a, y)), (0, 1, 2))(x, w, b)
    turn = jnp.transpose if axis else jnp.asarray
    found = jax.jit(jax.value_and_grad(lambda *a: 1.7 * total_nats(*a, y, axis=axis), (0, 1, 2)))(x, turn(w), b)
    assert_near(found, (expected[0], (expected[1][0], turn(expected[1][1]), expected[1][2])))
    assert_near(nats(x, turn(w), b, y, axis=axis), plain(x, w, b, y))


@pytest.mark.parametrize("count", [0, 1, 8, 17])
def test_rows_beyond_the_count_take_no_part(x64, held, count):
    x, w, b, y = drawn(17, 5, 11)
    x = x.at[count:].set(jnp.nan)
    found = jax.jit(jax.value_and_grad(total_nats, (0, 1, 2)))(x, w, b, y, jnp.array(count))
    expected = jax.value_and_grad(lambda *a: jnp.sum(plain(*a, y[:count])), (0, 1, 2))(x[:count], w, b)
    padded = jnp.zeros_like(x).at[:count].set(expected[1][0])
    assert_near(found, (expected[0], (padded, *expected[1][1:])))


def assert_near(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, expected)


def test_large_logits_do_not_overflow():
    x, w, b, y = drawn(5, 3, 7, jnp.float32)
    value, gradient = jax.value_and_grad(total_nats, (0, 1, 2))(1e20 * x, w, b, y)
    assert all(bool(jnp.isfinite(g).all()) for g in (value, *gradient))


def test_products_are_narrow_and_sums_wide():
    x, w, b, y = drawn(50, 8, 30, jnp.float32)
    narrow = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), b
    value, gradient = jax.value_and_grad(total_nats, (0, 1, 2))(*narrow, y)
    assert (value.dtype, *(g.dtype for g in gradient)) == (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wide = jax.value_and_grad(total_nats, (0, 1, 2))(*(a.astype(jnp.float32) for a in narrow), y)
    np.testing.assert_allclose(value, wide[0], rtol=1e-4)
    np.testing.assert_allclose(gradient[1], wide[1][1], rtol=0, atol=0.05)


@pytest.mark.parametrize("vocabulary", [33_278, 300_000])
def test_no_loss_holds_all_logits(vocabulary):
    """Of 700 predictions: the gradient of the kernel, twice the chunk, and little more."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((700, 16), (vocabulary, 16), (vocabulary,))]
    compiled = (
        jax.jit(jax.grad(total_nats, (0, 1, 2))).lower(*shapes, jax.ShapeDtypeStruct((700,), jnp.int32)).compile()
    )
    chunk = 4 * max(output.HELD, output.LEAST * vocabulary)
    takes = compiled.memory_analysis().temp_size_in_bytes
    assert takes < 3 * chunk + 2 * 4 * vocabulary * 17 < 4 * 700 * vocabulary + 4 * vocabulary * 17


def layer_and_variables(cutoffs, dtype=None, features=8, vocabulary=23):
    layer = AdaptiveSoftmax(vocabulary, features, cutoffs, init_scale=1.0, dtype=dtype)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, features)))
    return layer, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), variables)


def loop(params, cutoffs, x, word):
    """The log-probability of a word, by NumPy in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    cluster = sum(word >= cutoff for cutoff in cutoffs)
    z = p["head"] @ x + p["bias"]
    log_p = z - np.log(np.exp(z).sum())
    if cluster == 0:
        return log_p[word]
    z = p[f"embedding_{cluster}"] @ (p[f"projection_{cluster}"] @ x) + p[f"bias_{cluster}"]
    return log_p[cutoffs[0] + cluster - 1] + z[word - cutoffs[cluster - 1]] - np.log(np.exp(z).sum())


@pytest.mark.parametrize("cutoffs", CUTOFFS)
def test_probabilities_are_those_of_a_loop_and_sum_to_one(x64, cutoffs):
    layer, variables = layer_and_variables(cutoffs)
    rows = np.random.default_rng(0).normal(size=(3, 8))
    log_p = layer.apply(variables, rows)
    expected = [[loop(variables["params"], cutoffs, x, word) for word in range(23)] for x in rows]
    np.testing.assert_allclose(log_p, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_p), 1), 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cutoffs", CUTOFFS)
@pytest.mark.parametrize("words", [range(23), [0, 0, 0], [22] * 9, [2, 3, 4, 5, 2, 10, 11]])
def test_losses_and_gradients_are_those_of_all_probabilities(x64, held, cutoffs, words):
    """Texts without a frequent word, without a rare one, and of one word alone."""
    layer, variables = layer_and_variables(cutoffs)
    targets = jnp.array(words)
    rows = jax.random.normal(jax.random.key(1), (len(targets), 8))

    def expected(variables, rows):
        return -jnp.sum(layer.apply(variables, rows)[jnp.arange(len(targets)), targets])

    def found(variables, rows):
        return layer.apply(variables, rows, targets, method="total_nats")

    a, b = (jax.jit(jax.value_and_grad(f, (0, 1)))(variables, rows) for f in (found, expected))
    assert_near(a, b)
    np.testing.assert_allclose(jnp.sum(layer.apply(variables, rows, targets, method="nats")), b[0], atol=1e-12)


def test_a_cluster_that_a_text_does_not_use_has_no_gradient():
    layer, variables = layer_and_variables((5, 11))
    gradient = jax.grad(lambda v: layer.apply(v, jnp.ones((3, 8)), jnp.array([0, 4, 7]), method="total_nats"))(
        variables
    )
    assert not np.any(gradient["params"]["embedding_2"])
    assert np.any(gradient["params"]["embedding_1"])


@pytest.mark.parametrize("cutoffs", CUTOFFS)
def test_scores_and_embeddings_are_of_the_same_matrices(x64, cutoffs):
    layer, variables = layer_and_variables(cutoffs)
    params, x = variables["params"], np.random.default_rng(0).normal(size=8)
    for word in range(23):
        weights, bias = layer.apply(variables, jnp.array(word), method="score")
        np.testing.assert_array_equal(weights, layer.apply(variables, jnp.array([word]), method="embed")[0])
        cluster = sum(word >= cutoff for cutoff in cutoffs)
        if cluster:
            row = params[f"embedding_{cluster}"][word - cutoffs[cluster - 1]] @ params[f"projection_{cluster}"]
        else:
            row = params["head"][word]
        np.testing.assert_allclose(weights, row, rtol=0, atol=1e-12)
        log_p = loop(params, cutoffs, x, word) - loop(params, cutoffs, x, max(word - 1, 0))
        same = word and cluster == sum(word - 1 >= cutoff for cutoff in cutoffs)
        if same:  # within a cluster the difference of log-probabilities is that of scores
            other, of_other = layer.apply(variables, jnp.array(word - 1), method="score")
            np.testing.assert_allclose((weights - other) @ x + bias - of_other, log_p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cutoffs", [(), (0,), (5, 5), (7, 3), (23,), (30,), ("3",), (True,), 5, None, (2.5,)])
def test_cutoffs_that_do_not_rise_or_pass_the_vocabulary_are_refused(cutoffs):
    with pytest.raises(ValueError, match=r"`cutoffs` must be whole numbers .* the vocabulary of 23 tokens; got "):
        AdaptiveSoftmax(23, 8, cutoffs)


def test_cutoffs_by_default():
    assert default_cutoffs(10_000) == (2000,)
    assert default_cutoffs(33_278) == (2000, 10_000)
    assert default_cutoffs(267_735) == (10_000, 60_000)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", [{}, {"cell": "lstm"}, {"block": "residual", "gates": "input"}])
def test_a_model_evaluates_by_either_softmax_what_it_writes_by(tie, options):
    for softmax in ({}, {"softmax": "adaptive", "cutoffs": [4, 9]}):
        model = LanguageModel(23, features=8, tie=tie, **softmax, **options)
        tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 23)
        variables = model.init(jax.random.key(0), tokens, deterministic=True)
        logits, _ = model.apply(variables, tokens, deterministic=True)
        hidden, _ = model.apply(variables, tokens, deterministic=True, method="hidden")
        found = model.apply(variables, hidden, tokens, method="nats")
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        total = model.apply(variables, hidden, tokens, method="total_nats")
        np.testing.assert_allclose(total, jnp.sum(expected), rtol=1e-5)
        names = {"embed"} if softmax and not tie else set() if softmax else {"embed", "bias" if tie else "decode"}
        assert {"embed", "decode", "bias"} & variables["params"].keys() == names


def test_cutoffs_are_of_the_adaptive_softmax():
    with pytest.raises(ValueError, match=r"`cutoffs` is an option of softmax='adaptive'; got .* with softmax='full'"):
        LanguageModel(23, cutoffs=(3,))
    with pytest.raises(ValueError, match="`softmax` must be one of 'full', 'adaptive'; got 'fast'"):
        LanguageModel(23, softmax="fast")
