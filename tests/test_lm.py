"""The language model."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from networks import randomised

from ranjax import LanguageModel
from ranjax.cell import GATES
from ranjax.lm import BLOCKS, CELLS, zero_state

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9))


def model_and_variables(**options):
    model = LanguageModel(11, **{"features": 6, "layers": 2} | options)
    return model, randomised(model.init(jax.random.key(0), TOKENS, deterministic=True), scale=0.5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_state_continues_a_text(cell, block):
    model, variables = model_and_variables(cell=cell, block=block)
    whole, last = model.apply(variables, TOKENS, deterministic=True)
    assert (whole.shape, whole.dtype) == ((2, 9, 11), jnp.float32)
    first, state = model.apply(variables, TOKENS[:, :4], deterministic=True)
    second, state = model.apply(variables, TOKENS[:, 4:], state, deterministic=True)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


def test_no_token_sees_what_follows():
    model, variables = model_and_variables()
    changed = TOKENS.copy()
    changed[:, 5:] = 0
    before, after = (model.apply(variables, tokens, deterministic=True)[0] for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert jnp.any(before[:, 5:] != after[:, 5:])


def test_hidden_stops_before_the_output_layer():
    model, variables = model_and_variables()
    hidden, _ = model.apply(variables, TOKENS, deterministic=True, method="hidden")
    logits, _ = model.apply(variables, TOKENS, deterministic=True)
    assert hidden.shape == (2, 9, 6)
    np.testing.assert_array_equal(model.apply(variables, hidden, method="logits"), logits)


def test_sizes_of_each_part():
    model, variables = model_and_variables(features=(4, 7), embedding=5, projection=3)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["embed"]["embedding"] == (11, 5)
    assert shapes["stack_0"]["cell"]["content"]["kernel"] == (5, 4)
    assert shapes["stack_1"]["cell"]["content"]["kernel"] == (3, 7)
    assert shapes["decode"]["kernel"] == (3, 11)
    assert [c.shape for c in model.apply(variables, TOKENS, deterministic=True)[1]] == [(2, 4), (2, 7)]


def test_tied_output_is_the_embedding():
    model, variables = model_and_variables(tie=True)
    params = variables["params"]
    assert set(params) == {"embed", "stack_0", "stack_1", "bias"}
    hidden, _ = model.apply(variables, TOKENS, deterministic=True, method="hidden")
    logits, _ = model.apply(variables, TOKENS, deterministic=True)
    embedding, bias = np.asarray(params["embed"]["embedding"]), np.asarray(params["bias"])
    np.testing.assert_allclose(logits, np.asarray(hidden) @ embedding.T + bias, atol=1e-5)


def test_a_residual_model_of_two_layers_is_a_loop(x64):
    options = {"gates": "input", "block": "residual", "embedding": 5}
    model, variables = model_and_variables(**options)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), variables["params"])
    h = 5**0.5 * np.asarray(params["embed"]["embedding"])[TOKENS]
    for name in ("stack_0", "stack_1"):

        def step(c, v, cell=params[name]["cell"]):
            states, outputs = oracle.ran(cell, v[:, None], c, "tanh")
            return states[:, 0], outputs[:, 0]

        h, _, _ = oracle.residual_block(params[name], h, step, np.zeros((2, 6)), np.zeros((2, 3, 5)))
    h = oracle.rms_norm(h, np.asarray(params["norm"]["scale"]))
    expected = h @ np.asarray(params["decode"]["kernel"]) + np.asarray(params["decode"]["bias"])
    logits, _ = model.apply({"params": params}, TOKENS, deterministic=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-11)


def test_sizes_of_a_residual_model():
    model, variables = model_and_variables(features=(4, 7), embedding=5, projection=3, block="residual", tie=True)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["embed"]["embedding"] == (11, 5)
    assert shapes["norm"]["scale"] == (5,)
    for name, size in (("stack_0", 4), ("stack_1", 7)):
        assert shapes[name]["cell"]["content"]["kernel"] == (5, size)
        assert shapes[name]["gate"]["kernel"] == (5, 3)
        assert shapes[name]["out"]["kernel"] == (3, 5)
        assert shapes[name]["mlp_out"]["kernel"] == (7, 5)
        assert shapes[name]["conv"] == (4, 5)
    state = zero_state(model, variables["params"], 2)
    assert jax.tree.map(jnp.shape, state) == (((2, 4), (2, 3, 5)), ((2, 7), (2, 3, 5)))
    other = (state[0], (state[1][0], state[1][1][:, :2]))
    with pytest.raises(ValueError, match=r"`state\[1\]` must have the shape .*\(2, 7\), \(2, 3, 5\).*got.*\(2, 2, 5\)"):
        model.apply(variables, TOKENS, other, deterministic=True)


@pytest.mark.parametrize("gates", GATES)
def test_gates_begin_with_their_half_lives(gates):
    options = {"gates": gates, "features": 9, "projection": None if gates == "diagonal" else 3, "half_life": 256.0}
    model = LanguageModel(11, gate_init="half-lives-variance", **options)
    params = model.init(jax.random.key(0), TOKENS, deterministic=True)["params"]
    i, f = jax.nn.sigmoid(params["stack_1"]["cell"]["gates"]["bias"])
    np.testing.assert_allclose(f ** (2.0 ** np.arange(9)), 0.5, rtol=1e-3)
    np.testing.assert_allclose(i**2 + f**2, 1, rtol=1e-5)
    if gates != "diagonal":
        assert not jnp.any(params["stack_1"]["cell"]["projection"]["bias"])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a CPU's program")
@pytest.mark.parametrize("tie", [False, True])
def test_the_gradient_of_the_output_layer_transposes_no_copy_of_the_logits(tie):
    """Such a copy, of the largest array of a training step, costs up to a sixth of its time."""
    model, variables = model_and_variables(tie=tie)

    @jax.jit
    @jax.grad
    def gradient(variables):
        return jnp.sum(
            optax.softmax_cross_entropy_with_integer_labels(
                model.apply(variables, TOKENS, deterministic=True)[0], jnp.asarray(TOKENS)
            )
        )

    program = gradient.lower(variables).compile().as_text()
    assert "f32[18,11]" in program  # the logits of 2 x 9 tokens
    assert "f32[11,18]" not in program


@pytest.mark.parametrize("cell", CELLS)
def test_loops_on_a_gpu_are_unrolled(cell, patch):
    model, variables = model_and_variables(cell=cell)
    tokens = np.tile(TOKENS, 2)  # 18 steps: two turns, and two steps more

    def differentiated():
        return jax.value_and_grad(lambda v: jnp.sum(model.apply(v, tokens, deterministic=True)[0] ** 2))

    expected = differentiated()(variables)
    patch(jax, "default_backend", lambda: "gpu")
    loops = re.findall(r"unroll=(\d+)", str(jax.make_jaxpr(differentiated())(variables)))
    assert set(loops) == {"8"}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), differentiated()(variables), expected)


def test_dropout_applies_only_in_training():
    model, variables = model_and_variables(dropout=0.5, features=200, layers=1)
    hidden, state = model.apply(
        variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(1)}, method="hidden"
    )
    assert 0.4 < float(jnp.mean(hidden == 0)) < 0.6
    assert not jnp.any(state[0] == 0)  # never on the recurrence
    exact, _ = model.apply(variables, TOKENS, deterministic=True, method="hidden")
    assert not jnp.any(exact == 0)


@pytest.mark.parametrize("cell", CELLS)
def test_init_scale_draws_uniform_weights(cell):
    model = LanguageModel(50, cell=cell, features=40, init_scale=0.05)
    params = model.init(jax.random.key(0), TOKENS, deterministic=True)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        bound = 0.0 if "bias" in jax.tree_util.keystr(path) else 0.05
        assert 0.9 * bound <= float(jnp.max(jnp.abs(leaf))) <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "xlstm"}, "`cell` must be one of .*'ran'.* got 'xlstm'"),
        ({"features": (1, 2, 3)}, "`features` must be one size, or one for each of 2 layers"),
        ({"tie": True, "embedding": 5}, "`tie` needs the embedding .* got embedding=5 and an output of 6"),
        ({"vocabulary": 0}, "`vocabulary` must be a whole number, at least 1; got 0"),
        ({"embedding": 0}, "`embedding` must be a whole number, at least 1, or None; got 0"),
        ({"features": ()}, "`features` must be one size, or one for each layer; got none"),
        ({"features": (3, 0)}, "`features` must be a whole number, at least 1; got 0"),
        ({"init_scale": 0.0}, "`init_scale` must be above 0; got 0.0"),
        ({"dropout": 1.0}, r"`dropout` must be a rate in \[0, 1\); got 1.0"),
        ({"cell": "gru", "projection": 3}, "`projection` is an option of cell='ran'"),
        ({"cell": "gru", "gate_init": "half-lives"}, "`gate_init` is an option of cell='ran'"),
        ({"gate_init": "ones"}, "`gate_init` must be one of 'zeros', 'half-lives', 'half-lives-variance'; got 'ones'"),
        ({"gate_init": "half-lives", "half_life": 0.5}, "`half_life` must be finite and at least 1, in steps; got 0.5"),
        ({"block": "highway"}, "`block` must be one of 'plain', 'residual'; got 'highway'"),
        ({"conv_width": 3}, "`conv_width` is an option of block='residual'; got 3 with block='plain'"),
        ({"expansion": None}, "`expansion` is an option of block='residual'; got None with block='plain'"),
        ({"block": "residual", "conv_width": 0}, "`conv_width` must be a whole number, at least 1; got 0"),
        ({"block": "residual", "expansion": 0.1}, "`expansion` must leave the MLP at least one unit; got 0.1 for 6"),
        ({"block": "residual", "expansion": -1.0}, "`expansion` must be above 0 .*; got -1.0"),
        ({"gates": "inputs"}, "`gates` must be one of 'recurrent', 'diagonal', 'input'; got 'inputs'"),
        ({"activation": "relu"}, "`activation` must be one of 'tanh', 'identity'; got 'relu'"),
        (
            {"gates": "input", "solver": "fixed_point"},
            "`solver` must be one of .*; got 'fixed_point' with gates='input'",
        ),
        (
            {"cell": "lstm", "solver": "fixed_point"},
            "`solver` is an option of cell='ran'; got 'fixed_point' with cell='lstm'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"vocabulary": 11, "features": 6, "layers": 2} | options)


def test_sizes_in_a_list_are_hashable():
    assert hash(LanguageModel(11, features=[4, 6])) == hash(LanguageModel(11, features=(4, 6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS[0],), r"`tokens` must have the axes \(batch, time\); got the shape \(9,\)"),
        ((TOKENS[None],), r"`tokens` must have the axes \(batch, time\); got the shape \(1, "),
        ((TOKENS, (np.zeros((2, 6), np.float32),)), "`state` must be one carry for each of 2 layers; got 1"),
        ((TOKENS, ()), "`state` must be one carry for each of 2 layers; got 0"),
        ((TOKENS * 1.0,), "`tokens` must be ids, which are integers; got float"),
        ((TOKENS * 0 - 1,), "`tokens` must be ids from 0 to 10, the model's; got -1 to -1"),
        ((TOKENS * 0 + 11,), "`tokens` must be ids from 0 to 10, the model's; got 11 to 11"),
        ((TOKENS[:1], (np.zeros((2, 6), np.float32),) * 2), r"`state\[0\]` must have the shape \(1, 6\), .* \(2, 6\)"),
    ],
)
def test_bad_arguments(arguments, message):
    model, variables = model_and_variables()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, *arguments, deterministic=True)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tie", [True, False])
def test_all_products_are_in_dtype(tie, block):
    model, variables = model_and_variables(dtype=jnp.bfloat16, tie=tie, block=block)
    program = str(jax.make_jaxpr(partial(model.apply, deterministic=True))(variables, TOKENS))
    products = re.findall(r":(\w+)\[[\d,]*\] = dot_general", program)
    assert set(products) == {"bf16"}
    assert model.apply(variables, TOKENS, deterministic=True)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    "options",
    [
        {"tie": False, "gates": "input"},
        {"tie": True, "gates": "diagonal"},
        {"tie": False, "projection": 4},
        {"tie": False, "cell": "lstm"},
    ],
    ids=str,
)
def test_gradients_of_biases_are_summed_in_float32_with_bfloat16_products(options):
    """Off by the rounding of what is summed, not by that of thousands of sums, one after the other."""
    tokens = np.random.default_rng(0).integers(0, 11, (8, 1000))
    exact = LanguageModel(11, features=16, layers=1, **options)
    variables = exact.init(jax.random.key(0), tokens[:, :1], deterministic=True)

    def bias_gradients(model):
        def loss(variables):
            logits, _ = model.apply(variables, tokens, deterministic=True)
            return jnp.mean(jnp.square(logits - 3))  # all of one sign: nothing cancels

        leaves = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(variables))
        return {jax.tree_util.keystr(path): g for path, g in leaves if "bias" in jax.tree_util.keystr(path)}

    found, expected = bias_gradients(exact.copy(dtype=jnp.bfloat16)), bias_gradients(exact)
    for name, g in expected.items():
        if np.any(g):
            off = np.abs(found[name] - g).max() / np.abs(g).max()
            assert off < 0.01, (name, off)


@pytest.mark.parametrize("cell", ["ran", "lstm", "gru", "rnn"])
def test_no_tokens_and_states_of_another_size(cell):
    model = LanguageModel(11, cell=cell, features=6)
    variables = model.init(jax.random.key(0), np.zeros((2, 0), np.int32), deterministic=True)
    logits, state = model.apply(variables, np.zeros((2, 0), np.int32), deterministic=True)
    assert logits.shape == (2, 0, 11)
    other = jax.tree.map(lambda c: c[:, :5], state)
    with pytest.raises(ValueError, match=r"`state\[1\]` must have the shape.*\(2, 6\).*got.*\(2, 5\)"):
        model.apply(variables, TOKENS[:2], (state[0], other[1]), deterministic=True)


def test_dropout_reaches_the_state_through_the_embedding():
    model = LanguageModel(11, features=20, layers=1, dropout=0.5)
    tokens = np.arange(8)[None]
    variables = model.init(jax.random.key(0), tokens, deterministic=True)
    _, dropped = model.apply(variables, tokens, deterministic=False, rngs={"dropout": jax.random.key(1)})
    _, exact = model.apply(variables, tokens, deterministic=True)
    assert jnp.any(jnp.abs(dropped[0] - exact[0]) > 1e-3)


def test_sizes_and_scale_of_the_embedding():
    assert LanguageModel(11, features=(4, 7)).embedding_size == 4
    assert LanguageModel(11, features=(4, 7), projection=3).embedding_size == 4
    assert LanguageModel(11, features=(4, 7), tie=True).embedding_size == 7
    assert LanguageModel(11, features=(4, 7), projection=3, tie=True).embedding_size == 3
    variables = LanguageModel(50, features=40).init(jax.random.key(0), TOKENS, deterministic=True)
    assert 0.09 < float(jnp.max(jnp.abs(variables["params"]["embed"]["embedding"]))) <= 0.1
    kernel = variables["params"]["decode"]["kernel"]
    assert float(jnp.std(kernel)) * 40**0.5 == pytest.approx(1, abs=0.1)  # LeCun's, not bounded by 0.1


def test_dropout_is_on_the_embedding_and_on_every_layer():
    model, dropped = LanguageModel(11, features=6, layers=3, dropout=0.5), []
    variables = model.init(jax.random.key(0), TOKENS, deterministic=True)

    def noted(method, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            dropped.append(args[0].shape)
        return method(*args, **kwargs)

    with nn.intercept_methods(noted):
        model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert len(dropped) == 1 + 3


@pytest.mark.parametrize("gates", ["recurrent", "input"])
def test_dropout_masks_differ_by_step_and_text(gates):
    model = LanguageModel(11, features=20, layers=1, dropout=0.5, gates=gates)
    variables = model.init(jax.random.key(0), TOKENS, deterministic=True)
    h, _ = model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(1)}, method="hidden")
    assert len({out.tobytes() for out in np.asarray(h == 0).reshape(-1, 20)}) == TOKENS.size


def test_fixed_point_equals_sequential_and_sows_its_results():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 30)))
    plain = LanguageModel(20, features=8, init_scale=0.5)
    variables = plain.init(jax.random.key(0), tokens, deterministic=True)
    assert set(variables) == {"params"}
    model = LanguageModel(20, features=8, init_scale=0.5, solver="fixed_point")
    expected, state = plain.apply(variables, tokens, deterministic=True)
    (logits, found), sown = model.apply(variables, tokens, deterministic=True, mutable="solver")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, state)
    results = [layer["result"] for layer in sown["solver"].values()]
    assert len(results) == 2
    assert all(bool(result.converged) and int(result.iterations) > 2 for result in results)


@pytest.mark.parametrize("tie", [True, False])
def test_parameters_and_logits_are_float32_where_jax_has_float64(tie, x64):
    model, variables = model_and_variables(tie=tie)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert model.apply(variables, TOKENS, deterministic=True)[0].dtype == jnp.float32


@pytest.mark.parametrize("cell", CELLS)
def test_the_table_of_flax_counts_operations(cell):
    table = LanguageModel(11, cell=cell, features=4).tabulate(
        jax.random.key(0),
        TOKENS,
        deterministic=True,
        compute_flops=True,
        compute_vjp_flops=True,
        console_kwargs={"width": 300},
    )
    assert "stack_1/cell" in table


@pytest.mark.parametrize("cell", CELLS)
def test_settings_read_from_a_file_make_the_same_model(cell):
    """Their texts are equal to the defaults, and other objects."""
    read = json.loads('{"solver": "auto", "gates": "recurrent", "activation": "tanh", "gate_init": "zeros"}')
    model, variables = model_and_variables(cell=cell, block="residual", **read)
    expected, _ = model_and_variables(cell=cell, block="residual")
    found, wanted = (m.apply(variables, TOKENS, deterministic=True)[0] for m in (model, expected))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("block", BLOCKS)
def test_strict_promotion_of_dtypes(block):
    """Without narrower products: flax's output layer adds a bias of another dtype to those."""
    model, variables = model_and_variables(block=block)
    with jax.numpy_dtype_promotion("strict"):
        logits, _ = model.apply(variables, TOKENS, deterministic=True)
    assert jnp.all(jnp.isfinite(logits))
