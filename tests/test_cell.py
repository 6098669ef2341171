"""The cell: the contract of Flax's cells, and the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from networks import inputs, randomised, variants

import ranjax
from ranjax import RAN, RANCell

pytestmark = [pytest.mark.quick, pytest.mark.core]
any_cell = pytest.mark.parametrize("cell", [nn.LSTMCell(4), nn.GRUCell(4), RANCell(4)], ids=lambda c: type(c).__name__)


@any_cell
def test_contract_of_a_step(cell):
    x = inputs(2, 3, 6)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    variables = cell.init(jax.random.key(0), carry, x)
    after, h = cell.apply(variables, carry, x)
    assert h.shape == (2, 3, 4)
    assert cell.num_feature_axes == 1
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    assert jax.tree.map(lambda c: (c.shape, c.dtype), after) == jax.tree.map(lambda c: (c.shape, c.dtype), carry)
    again = cell.init(jax.random.key(0), carry, x)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), variables, again))


@any_cell
def test_contract_inside_rnn(cell):
    x = inputs(2, 5, 3)
    layer = nn.RNN(cell, return_carry=True)
    variables = randomised(layer.init(jax.random.key(0), x))
    carry, h = layer.apply(variables, x)
    by_hand = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    bound = {"params": variables["params"]["cell"]}
    for t in range(5):
        by_hand, out = cell.apply(bound, by_hand, x[:, t])
        np.testing.assert_allclose(h[:, t], out, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carry, by_hand)


@any_cell
def test_contract_inside_bidirectional(cell):
    x = inputs(2, 5, 3)
    layer = nn.Bidirectional(nn.RNN(cell), nn.RNN(cell.copy()))
    variables = randomised(layer.init(jax.random.key(0), x))
    h = layer.apply(variables, x)
    assert h.shape == (2, 5, 8)
    reverse = nn.RNN(cell).apply({"params": variables["params"]["backward_rnn"]}, x[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(h[..., 4:], reverse, rtol=1e-5, atol=1e-6)


@any_cell
def test_contract_of_initialisers(cell):
    init = nn.initializers.constant(0.25)
    cell = cell.copy(kernel_init=init, recurrent_kernel_init=init, bias_init=nn.initializers.constant(0.5))
    cell = cell.copy(carry_init=nn.initializers.constant(2.0), param_dtype=jnp.float32)
    x = inputs(2, 3)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    assert all(jnp.all(c == 2.0) for c in jax.tree.leaves(carry))
    for path, leaf in jax.tree_util.tree_leaves_with_path(cell.init(jax.random.key(0), carry, x)):
        assert jnp.all(leaf == (0.5 if "bias" in jax.tree_util.keystr(path) else 0.25))


@variants
def test_equals_the_equations(options, x64):
    cell = RANCell(4, **options, param_dtype=jnp.float64)
    x, c0 = inputs(2, 7, 3, dtype=np.float64), inputs(2, 4, seed=2, dtype=np.float64)
    variables = randomised(cell.init(jax.random.key(0), c0, x[:, 0]))
    states, outputs = oracle.ran(variables["params"], x, c0, options["activation"])
    c = c0
    for t in range(7):
        c, h = cell.apply(variables, c, x[:, t])
        np.testing.assert_allclose(c, states[:, t], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(h, outputs[:, t], rtol=1e-12, atol=1e-13)


@variants
def test_shapes_of_the_parameters(options):
    cell = RANCell(4, **options)
    x = inputs(2, 3)
    params = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), x.shape), x)["params"]
    out = options["projection"] or 4
    gates = {"kernel": (3, 2, 4), "bias": (2, 4)}
    if options["gates"] != "input":
        gates["recurrent_kernel"] = (2, 4) if options["gates"] == "diagonal" else (out, 2, 4)
    expected = {"content": {"kernel": (3, 4)}, "gates": gates}
    if options["projection"]:
        expected["projection"] = {"kernel": (4, out), "bias": (out,)}
    assert jax.tree.map(jnp.shape, params) == expected
    assert jnp.all(params["gates"]["bias"] == 0)


def test_each_gate_is_initialised_separately():
    cell = RANCell(64)
    params = cell.init(jax.random.key(0), jnp.zeros((1, 64)), jnp.ones((1, 64)))["params"]["gates"]
    for gate in (0, 1):
        block = params["recurrent_kernel"][:, gate]
        np.testing.assert_allclose(block @ block.T, np.eye(64), atol=1e-5)  # each block orthogonal by itself
        assert abs(float(jnp.std(params["kernel"][:, gate])) * 8 - 1) < 0.1  # LeCun's fan-in is 64, not 128
    assert not jnp.any(params["kernel"][:, 0] == params["kernel"][:, 1])


def test_diagonal_weights_are_uniform():
    cell = RANCell(400, gates="diagonal")
    weights = cell.init(jax.random.key(0), jnp.zeros((1, 400)), jnp.ones((1, 3)))["params"]["gates"]["recurrent_kernel"]
    assert 0.045 < float(jnp.max(jnp.abs(weights))) <= 0.05
    assert abs(float(jnp.std(weights)) - 0.05 / 3**0.5) < 0.003


def test_partitioning_names_the_axis_of_the_gates():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "features"))
    cell = RANCell(4, kernel_init=init)
    variables = cell.init(jax.random.key(0), jnp.zeros((1, 4)), jnp.ones((1, 3)))
    assert variables["params"]["gates"]["kernel"].names == ("in", None, "features")


@pytest.mark.parametrize("param_dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("x_dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_carry_keeps_its_dtype(param_dtype, x_dtype, dtype, x64):
    cell = RANCell(4, param_dtype=param_dtype, dtype=dtype)
    x = jnp.asarray(inputs(2, 5, 3), x_dtype)
    carry = cell.initialize_carry(jax.random.key(0), (2, 3))
    assert carry.dtype == ("float64" if param_dtype == "float64" else "float32")
    variables = cell.init(jax.random.key(0), carry, x[:, 0])
    for wide in (carry.dtype, jnp.float64):
        after, h = cell.apply(variables, carry.astype(wide), x[:, 0])
        assert after.dtype == wide
        assert h.dtype == (dtype or jnp.result_type(x_dtype, param_dtype))
    for layer in (nn.RNN(cell, return_carry=True), RAN(cell, return_carry=True)):
        last, h = layer.apply({"params": {"cell": variables["params"]}}, x)
        assert last.dtype in (jnp.float32, jnp.float64)
        assert layer.apply({"params": {"cell": variables["params"]}}, x, initial_carry=last)[0].dtype == last.dtype
        assert h.dtype == (dtype or jnp.result_type(x_dtype, param_dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "both"}, "`gates` must be one of 'recurrent', 'diagonal', 'input'; got 'both'"),
        ({"activation": "relu"}, "`activation` must be one of 'tanh', 'identity'; got 'relu'"),
        ({"gates": "diagonal", "projection": 3}, "`projection` cannot go with gates='diagonal'"),
        ({"features": 0}, "`features` must be a whole number, at least 1; got 0"),
        ({"projection": 0}, "`projection` must be a whole number, at least 1, or None; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RANCell(**{"features": 4} | options)


@pytest.mark.parametrize(
    ("carry", "kind", "message"),
    [
        (np.zeros((2, 5), np.float32), ValueError, r"`carry` must .* got \(2, 5\)\. `jnp\.zeros\(\(2, 4\)\)` is"),
        (jnp.zeros((2, 4), jnp.bfloat16), TypeError, "`carry` must be float32 or wider.*got bfloat16"),
        (np.zeros((2, 4), np.int32), TypeError, "`carry` must be float32 or wider.*got int32"),
        (0.0, TypeError, r"`carry` must be the one array c, of shape \(2, 4\); got a float"),
    ],
)
def test_bad_carry(carry, kind, message):
    with pytest.raises(kind, match=message):
        RANCell(4).init(jax.random.key(0), carry, inputs(2, 3))


def test_complex_inputs_are_refused():
    with pytest.raises(TypeError, match="`inputs` must be real; got complex64"):
        RANCell(4).init(jax.random.key(0), np.zeros((2, 4), np.float32), 1j * inputs(2, 3))


def test_inputs_of_another_size_are_refused():
    cell, c = RANCell(4), np.zeros((2, 4), np.float32)
    variables = cell.init(jax.random.key(0), c, inputs(2, 3))
    with pytest.raises(ValueError, match=r"`inputs` must have 3 features, .*; got the shape \(2, 5\)"):
        cell.apply(variables, c, inputs(2, 5))
    with pytest.raises(ValueError, match=r"`inputs` must have the axes \(\*batch, in\); got the shape \(\)"):
        cell.apply(variables, c, np.float32(1))
    with pytest.raises(ValueError, match="`activation` must be one of 'tanh', 'identity'; got 'relu'"):
        ranjax.cell.step(variables["params"], jnp.asarray(c), jnp.asarray(inputs(2, 3)), "relu")


@pytest.mark.parametrize("options", [{"gates": "input"}, {"gates": "recurrent", "projection": 3}], ids=str)
def test_biases_are_not_rounded_with_bfloat16_products(options):
    """1.0039 is 1 in bfloat16. The products are 0 here."""
    cell, x, c = RANCell(3, dtype=jnp.bfloat16, **options), jnp.ones((1, 2)), jnp.full((1, 3), 0.5)
    zeros = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), c, x))
    variables = jax.tree_util.tree_map_with_path(lambda path, a: a + 1.0039 * (path[-1].key == "bias"), zeros)
    params, rows = cell.apply(variables, x, method="parameters")
    assert params["gates"]["kernel"].dtype == rows.dtype == jnp.bfloat16
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert path[-1].key != "bias" or jnp.all(leaf == jnp.float32(1.0039))
    products = jnp.full((1, 2, 3), 1 + 2**-7, jnp.bfloat16)
    summed = ranjax.cell.plus_bias(products, params["gates"]["bias"])
    np.testing.assert_array_equal(summed, jnp.full((1, 2, 3), 1 + 2**-7 + 1.0039).astype(jnp.bfloat16))


def test_orthogonal_weights_are_those_of_one_decomposition_for_each_gate():
    """One batched QR decomposition draws what two did."""
    arguments = jax.random.key(3), jnp.zeros((1, 5)), jnp.ones((1, 2))
    cell, each = (RANCell(5, recurrent_kernel_init=init) for init in (None, lambda *a: ranjax.cell._orthogonal(*a)))
    jax.tree.map(np.testing.assert_array_equal, cell.init(*arguments), each.init(*arguments))
    if jax.default_backend() == "cpu":
        counts = [
            jax.jit(one.init).lower(*arguments).compile().as_text().count("lapack_sgeqrf") for one in (cell, each)
        ]
        assert 2 * counts[0] == counts[1]
