"""Shares of words in a logit: they sum to it, are exact for linear networks, and match finite changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ranjax
from ranjax import attribution, weights
from ranjax.lm import BLOCKS, zero_state

TOKENS = jnp.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


def random_model(**options):
    """A model, its parameters with every leaf at random, and an initial state."""
    model = ranjax.LanguageModel(vocabulary=11, **{"features": 6} | options)
    init = partial(model.init, deterministic=True)
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0), TOKENS[None])["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.7 * jax.random.normal(k, p.shape, jnp.float64) for k, p in zip(keys, leaves)]
    params = jax.tree.unflatten(tree, leaves)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda c: c[0], zero_state(model, params, 1)))
    state = [jax.random.normal(jax.random.key(2 + n), c.shape, jnp.float64) for n, c in enumerate(leaves)]
    return model, params, jax.tree.unflatten(tree, state)


def batched(state):
    """The state of one text as that of a batch of one."""
    return jax.tree.map(lambda c: c[None], state)


@pytest.mark.quick
@pytest.mark.parametrize("options", [
    {}, {"layers": 1}, {"layers": 3, "gates": "diagonal"}, {"gates": "input", "tie": True},
    {"block": "residual"}, {"block": "residual", "gates": "input", "tie": True, "conv_width": 2, "layers": 3},
    {"block": "residual", "conv_width": 1, "expansion": None, "projection": 4, "embedding": 5},
    {"activation": "identity"}, {"projection": 4}, {"projection": 4, "activation": "identity", "features": (6, 5)},
])  # fmt: skip
def test_the_shares_sum_to_the_logit(x64, options):
    model, params, state = random_model(**options)
    logits, _ = model.apply({"params": params}, TOKENS[None], batched(state), deterministic=True)
    every = jax.vmap(lambda target: attribution.shares(model, params, TOKENS, target, 7, state))
    found = every(jnp.arange(11))
    assert found.words.shape == (11, 10)
    assert found.carry.shape == (11, len(model.sizes))
    total = found.words.sum(1) + found.carry.sum(1) + found.bias
    np.testing.assert_allclose(total, logits[0, 7], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.words[:, 8:], 0)
    assert float(jnp.min(jnp.abs(found.words[:, :8]))) > 0


@pytest.mark.parametrize("options", [{"tie": True}, {"tie": False, "block": "residual", "gates": "input"}])
def test_shares_of_an_adaptive_softmax_sum_to_scores_within_clusters(x64, options):
    model, params, state = random_model(softmax="adaptive", cutoffs=(4, 7), **options)
    log_p, _ = model.apply({"params": params}, TOKENS[None], batched(state), deterministic=True)
    found = jax.vmap(lambda target: attribution.shares(model, params, TOKENS, target, 7, state))(jnp.arange(11))
    total = found.words.sum(1) + found.carry.sum(1) + found.bias
    for cluster in (slice(0, 4), slice(4, 7), slice(7, 11)):
        np.testing.assert_allclose(np.diff(total[cluster]), np.diff(log_p[0, 7, cluster]), rtol=0, atol=1e-12)
    integrated = attribution.integrated_gradients(model, params, TOKENS, 9, 7, state, nodes=64)
    np.testing.assert_allclose(integrated.total, total[9], rtol=0, atol=1e-6)


def test_shares_of_one_identity_layer_are_weighted_contents(x64):
    model, params, state = random_model(layers=1, activation="identity")
    (parts,) = attribution.decompositions(model, params, TOKENS, state)
    found = attribution.shares(model, params, TOKENS, 4, 9, state)
    column = params["decode"]["kernel"][:, 4]
    expected = [np.dot(column, w * u) for w, u in zip(weights.at(parts, 9), parts.u)]
    np.testing.assert_allclose(found.words, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.carry[0], np.dot(column, weights.carried(parts)[9] * state[0]), rtol=1e-12)
    np.testing.assert_allclose(found.bias, params["decode"]["bias"][4], rtol=1e-12)


def test_a_share_with_identity_is_the_change_of_the_logit_without_the_word(x64):
    """Two layers with constant gates: the oracle sets one content to 0."""
    model, params, state = random_model(activation="identity")
    one, two = attribution.decompositions(model, params, TOKENS, state)
    found = attribution.shares(model, params, TOKENS, 4, 9, state)

    def logit(u, one_c0=one.c0, two_c0=two.c0):
        h = oracle.recurrence(one.f, one.i * u, one_c0)
        h = oracle.recurrence(two.f, two.i * (h @ params["stack_1"]["cell"]["content"]["kernel"]), two_c0)
        return h[9] @ params["decode"]["kernel"][:, 4]

    u = np.asarray(one.u)
    for j in range(10):
        without = u.copy()
        without[j] = 0
        np.testing.assert_allclose(found.words[j], logit(u) - logit(without), rtol=1e-10, atol=1e-12)
    lost = [logit(u) - logit(u, one_c0=0 * one.c0), logit(u) - logit(u, two_c0=0 * two.c0)]
    np.testing.assert_allclose(found.carry, lost, rtol=1e-10, atol=1e-12)


def held_network(model, params, x, state, factors=None):
    """Logits of a residual model with input gates, by loops, and its factors; those given are used in their place."""
    params, found, given = jax.tree.map(np.asarray, params), [], iter(factors or ())

    def factor(value):
        found.append(value)
        return next(given) if factors else value

    def norm(layer, h):
        return h * factor(1 / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-6)) * layer["scale"]

    for n, (c, history) in enumerate(jax.tree.map(np.asarray, state)):
        p, outputs, recent = params[f"stack_{n}"], [], list(history)
        for row in x:
            v = norm(p["norm"], row)
            gate = factor(oracle.silu(v @ p["gate"]["kernel"]))
            recent = [v, *recent][:4]
            v = v + sum(a * step for a, step in zip(p["conv"], recent, strict=True))
            cell = p["cell"]
            i, f = factor(oracle.sigmoid(np.einsum("n,ngf->gf", v, cell["gates"]["kernel"]) + cell["gates"]["bias"]))
            c = i * (v @ cell["content"]["kernel"]) + f * c
            row = row + (c * factor(np.tanh(c) / c) * gate) @ p["out"]["kernel"]
            m = norm(p["mlp_norm"], row)
            gate = factor(oracle.silu(m @ p["mlp_gate"]["kernel"]))
            outputs.append(row + ((m @ p["mlp_in"]["kernel"]) * gate) @ p["mlp_out"]["kernel"])
        x = np.stack(outputs)
    h = np.stack([norm(params["norm"], row) for row in x])
    return h @ params["decode"]["kernel"], found


def test_a_share_in_a_residual_model_is_the_change_of_the_logit_without_the_word(x64):
    """The factors as they were: of norms, gates, the tanh; the oracle sets one embedding, one state to 0."""
    model, params, state = random_model(block="residual", gates="input")
    x = 6**0.5 * np.asarray(params["embed"]["embedding"][TOKENS])
    logits, factors = held_network(model, params, x, state)
    found = attribution.shares(model, params, TOKENS, 4, 9, state)
    np.testing.assert_allclose(found.total, logits[9, 4] + params["decode"]["bias"][4], rtol=1e-10)

    def lost(x, state):
        return (logits - held_network(model, params, x, state, factors)[0])[9, 4]

    for j in range(10):
        without = x.copy()
        without[j] = 0
        np.testing.assert_allclose(found.words[j], lost(without, state), rtol=1e-9, atol=1e-11)
    for n in range(2):
        others = [jax.tree.map(lambda c, kept=m != n: kept * c, carry) for m, carry in enumerate(state)]
        np.testing.assert_allclose(found.carry[n], lost(x, others), rtol=1e-9, atol=1e-11)


def test_shares_of_one_tanh_layer_are_integrated_gradients_along_contents(x64):
    model, params, state = random_model(layers=1)
    (parts,) = attribution.decompositions(model, params, TOKENS, state)
    column = params["decode"]["kernel"][:, 4]

    def logit(u, c0):
        return jnp.dot(jnp.tanh(ranjax.linear_recurrence(parts.f, parts.i * u, c0))[9], column)

    nodes, quadrature = np.polynomial.legendre.leggauss(60)
    gradient = jax.jit(jax.grad(logit))
    gradients = [gradient((n + 1) / 2 * parts.u, (n + 1) / 2 * parts.c0) for n in nodes]
    mean = sum(p / 2 * g for p, g in zip(quadrature, gradients))
    found = attribution.shares(model, params, TOKENS, 4, 9, state)
    np.testing.assert_allclose(found.words, jnp.sum(mean * parts.u, axis=-1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gates": "diagonal", "layers": 1},
        {"gates": "input", "projection": 4, "tie": True, "embedding": 4},
        {"gates": "input", "block": "residual"},
    ],
)
def test_integrated_gradients_sum_to_the_logit(x64, options):
    model, params, state = random_model(**options)
    logits, _ = model.apply({"params": params}, TOKENS[None], batched(state), deterministic=True)
    found = attribution.integrated_gradients(model, params, TOKENS, 4, 7, state, nodes=64)
    assert abs(float(found.total - logits[0, 7, 4])) < 1e-6
    np.testing.assert_array_equal(found.words[8:], 0)
    assert found.carry.shape == (len(model.sizes),)


def test_integrated_gradients_equal_a_midpoint_rule(x64):
    """Against a midpoint rule over the model itself, with embeddings and initial states scaled."""
    model, params, state = random_model()

    def logit(scale, x):
        h = scale * x
        for n in range(2):
            layer = ranjax.RAN(ranjax.RANCell(6, param_dtype=jnp.float64))
            h = layer.apply({"params": {"cell": params[f"stack_{n}"]["cell"]}}, h, initial_carry=scale * state[n])
        return model.apply({"params": params}, h[9], method="logits")[4]

    x = params["embed"]["embedding"][TOKENS]
    scales = (jnp.arange(400) + 0.5) / 400
    gradients = jax.vmap(lambda a: jax.grad(logit, 1)(a, x) / a)(scales)
    found = attribution.integrated_gradients(model, params, TOKENS, 4, 9, state, nodes=64)
    np.testing.assert_allclose(found.words, jnp.sum(gradients.mean(0) * x, axis=-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_states_of_zero_have_finite_shares(block):
    model = ranjax.LanguageModel(vocabulary=11, features=6, block=block)
    params = model.init(jax.random.key(0), TOKENS[None], deterministic=True)["params"]
    params = params | {"embed": {"embedding": jnp.zeros((11, 6))}}
    found = attribution.shares(model, params, TOKENS, 4, 9)
    assert all(bool(jnp.all(jnp.isfinite(a))) for a in found)


def test_models_of_other_cells_raise():
    model = ranjax.LanguageModel(vocabulary=11, cell="lstm", features=6)
    with pytest.raises(
        ValueError, match=r"cell='ran'; got cell='lstm', whose states are not weighted sums of its inputs"
    ):
        attribution.decompositions(model, {}, TOKENS)
    with pytest.raises(ValueError, match="cell='ran'"):
        attribution.integrated_gradients(model, {}, TOKENS, 0, 0)


def test_residual_shares_in_float32_sum_to_the_logit():
    model = ranjax.LanguageModel(vocabulary=50, gates="input", block="residual", features=64, layers=3)
    tokens = jnp.arange(200) % 50
    params = model.init(jax.random.key(0), tokens[None], deterministic=True)["params"]
    logits, _ = model.apply({"params": params}, tokens[None], deterministic=True)
    for rule in (attribution.shares, attribution.integrated_gradients):
        assert abs(float(rule(model, params, tokens, 4, 199).total - logits[0, 199, 4])) < 1e-4


@pytest.mark.parametrize("tie", [True, False])
def test_vmap_over_targets_accepts_numpy_parameters(tie, x64):
    model, params, _ = random_model(tie=tie)
    for rule in (attribution.shares, partial(attribution.integrated_gradients, nodes=2)):
        every = jax.vmap(lambda target, rule=rule: rule(model, jax.device_get(params), TOKENS, target, 7).total)
        one = rule(model, params, TOKENS, 4, 7).total
        np.testing.assert_allclose(every(jnp.arange(11))[4], one, rtol=1e-12)


def test_arguments_that_do_not_fit_the_model_raise(x64):
    model, params, state = random_model()
    for ids in ((3, -1), (3, 11)):
        for rule in (attribution.shares, attribution.integrated_gradients):
            with pytest.raises(ValueError, match=rf"`tokens` must be ids from 0 to 10, .*got {min(ids)} to {max(ids)}"):
                rule(model, params, jnp.array(ids), 4, 1)
    for rule in (attribution.shares, attribution.integrated_gradients):
        with pytest.raises(ValueError, match="`state` must be one carry for each of 2 layers; got 1"):
            rule(model, params, TOKENS, 4, 9, state[:1])
        with pytest.raises(
            ValueError, match=r"`state\[0\]` must have the shape \(\d+,\).* got \(1, \d+\)\. Of a batch"
        ):
            rule(model, params, TOKENS, 4, 9, jax.tree.map(lambda c: c[None], state))
        for dtype in ("bfloat16", "int32"):
            narrow = tuple(jnp.asarray(c, dtype) for c in state)
            with pytest.raises(TypeError, match=rf"`state\[0\]` must be float32 or wider.* got {dtype}"):
                rule(model, params, TOKENS, 4, 9, narrow)
        with pytest.raises(ValueError, match=r"`params` must be those of the model, variables\['params'\]; got params"):
            rule(model, {"params": params}, TOKENS, 4, 9)
        other = ranjax.LanguageModel(vocabulary=11, cell="gru", features=6)
        with pytest.raises(ValueError, match=r"`params` must be those of the model, cell='ran'; got those of another"):
            rule(model, other.init(jax.random.key(0), TOKENS[None], deterministic=True)["params"], TOKENS, 4, 9)
        for name, value in (
            ("vocabulary", 50),
            ("layers", 3),
            ("tie", True),
            ("gates", "input"),
            ("projection", 6),
            ("block", "residual"),
        ):
            asked = "projected=True" if name == "projection" else f"{name}={value!r}"
            got = "got vocabulary=11, layers=2, tie=False, gates='recurrent', projected=False, block='plain'"
            with pytest.raises(ValueError, match=rf"must be those of the model, .*{asked}.*; {got}"):
                rule(model.clone(**{name: value}), params, TOKENS, 4, 9)
        with pytest.raises(ValueError, match="`tokens` must be ids, which are integers; got float"):
            rule(model, params, TOKENS + 0.5, 4, 9)
        for target in (-1, 11):
            with pytest.raises(ValueError, match="`target` must be from 0 to 10"):
                rule(model, params, TOKENS, target, 9)
        for step in (-1, 10):
            with pytest.raises(ValueError, match="`step` must be from 0 to 9"):
                rule(model, params, TOKENS, 4, step)
        for tokens in (TOKENS[None], TOKENS[:0]):
            with pytest.raises(ValueError, match="`tokens` must be the ids of one text"):
                rule(model, params, tokens, 4, 0)
    with pytest.raises(ValueError, match="`nodes` must be a whole number, at least 1; got 0"):
        attribution.integrated_gradients(model, params, TOKENS, 4, 9, nodes=0)


def test_shares_of_a_bfloat16_model_are_not_rounded():
    """Shares use the gates of the model; its logit is rounded to its dtype, their sum is not."""
    model = ranjax.LanguageModel(vocabulary=11, features=16, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), TOKENS[None], deterministic=True)["params"]
    logits, _ = model.apply({"params": params}, TOKENS[None], deterministic=True)
    found = attribution.shares(model, params, TOKENS, 4, 9)
    assert abs(float(found.total - logits[0, 9, 4])) < 0.01 * float(jnp.max(jnp.abs(logits)))
    _, state = model.apply({"params": params}, TOKENS[None], deterministic=True)
    parts, wide = (attribution.decompositions(m, params, TOKENS) for m in (model, model.clone(dtype=None)))
    for layer, other, carry in zip(parts, wide, state):
        near, far = (float(jnp.max(jnp.abs(of.c[-1] - carry[0]))) for of in (layer, other))
        assert near < 0.1 * far


def test_vmap_over_steps(x64):
    model, params, state = random_model()
    for rule in (attribution.shares, partial(attribution.integrated_gradients, nodes=2)):

        def words(step, rule=rule):
            return rule(model, params, TOKENS, 4, step, state).words

        found = jax.vmap(words)(jnp.array([0, 7]))
        np.testing.assert_allclose(found, [words(0), words(7)], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("block", BLOCKS)
def test_decompositions_of_a_batch_are_those_of_each_text(x64, block):
    model, params, state = random_model(block=block)
    texts, states = (TOKENS, TOKENS[::-1]), (state, jax.tree.map(jnp.negative, state))
    both = jax.tree.map(lambda *c: jnp.stack(c), *states)
    together = attribution.decompositions(model, params, jnp.stack(texts), both)
    _, last = model.apply({"params": params}, jnp.stack(texts), both, deterministic=True)
    for many, carry in zip(together, last):
        c = carry[0] if block == "residual" else carry
        np.testing.assert_allclose(many.c[:, -1], c, rtol=0, atol=1e-12)
    for n, (text, first) in enumerate(zip(texts, states)):
        for many, one in zip(together, attribution.decompositions(model, params, text, first)):
            np.testing.assert_allclose(many.c[n], one.c, rtol=0, atol=1e-12)


def test_a_traced_id_out_of_range_gives_nan():
    """As in the model; a concrete id out of range raises."""
    model, tokens = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), jnp.array([1, 9, 2])
    params = model.init(jax.random.key(0), 0 * tokens[None], deterministic=True)["params"]
    (parts,) = jax.jit(partial(attribution.decompositions, model))(params, tokens)
    np.testing.assert_array_equal(jnp.isnan(parts.c).any(-1), [False, True, True])


def test_memory_of_integrated_gradients_does_not_grow_with_the_nodes():
    model, ids = ranjax.LanguageModel(vocabulary=11, features=6), jnp.arange(50) % 11
    params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]

    def memory(nodes):
        shares = jax.jit(lambda params: attribution.integrated_gradients(model, params, ids, 7, 49, nodes=nodes))
        return shares.lower(params).compile().memory_analysis().temp_size_in_bytes

    gradients = 2000 * (50 + 2) * 6 * 4  # what is left of a node
    assert memory(2000) < memory(64) + 3 * gradients
