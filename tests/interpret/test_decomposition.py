"""Decompositions: states, gates and contents equal those of the layer and of a float64 loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from weights_oracle import BATCH, FEATURES, KINDS, TIME, random_layer, weighted_sum

import ranjax
from ranjax import weights
from ranjax.interpret import decomposition

pytestmark = pytest.mark.core


@pytest.mark.quick
@pytest.mark.parametrize(("gates", "activation"), KINDS)
@pytest.mark.parametrize("masks", [False, True])
def test_states_equal_the_layers_and_their_weighted_sums(x64, gates, activation, masks):
    params, x, c0 = random_layer(gates, activation)
    masked = {}
    if masks:
        masked = {"seq_lengths": jnp.array([TIME, 0, 20]), "segment_starts": jnp.zeros((BATCH, TIME), bool)}
        masked["segment_starts"] = masked["segment_starts"].at[0, 7].set(True).at[2, 0].set(True).at[2, 11].set(True)
        x = x.at[2, 20:].set(jnp.nan).at[1].set(jnp.nan)
    parts = jax.jit(weights.decompose, static_argnames="activation")(params, x, c0, activation=activation, **masked)
    layer = ranjax.RAN(ranjax.RANCell(FEATURES, gates, activation, param_dtype=jnp.float64), return_carry=True)
    carry, h = layer.apply({"params": {"cell": params}}, x, initial_carry=c0, **masked)
    np.testing.assert_allclose(parts.c[:, -1], carry, rtol=0, atol=1e-14)  # two programs, so not bitwise
    starts, lengths = masked.get("segment_starts"), masked.get("seq_lengths")
    expected, _ = oracle.ran(params, x, c0, activation, starts, lengths)
    np.testing.assert_allclose(parts.c, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ranjax.cell.output(params, parts.c, activation), h, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weighted_sum(parts, weights.full(parts)), parts.c, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("gates", "solver"), [("recurrent", "auto"), ("diagonal", "auto"), ("diagonal", "sequential"), ("input", "auto")]
)
@pytest.mark.parametrize("narrow", ["parameters", "products"])
def test_narrow_products_give_the_gates_that_the_layer_used(gates, solver, narrow):
    """Recomputed in bfloat16, the gates would deviate from the layer's by 1e-2."""
    dtypes = {"param_dtype": jnp.bfloat16} if narrow == "parameters" else {"dtype": jnp.bfloat16}
    layer = ranjax.RAN(ranjax.RANCell(32, gates, **dtypes), solver, return_carry=True)
    x = jax.random.normal(jax.random.key(0), (2, 100, 8), jnp.bfloat16 if narrow == "parameters" else jnp.float32)
    params = layer.init(jax.random.key(1), x)["params"]
    carry, _ = layer.apply({"params": params}, x)
    parts = weights.decompose(params["cell"], x, solver=solver, dtype=dtypes.get("dtype"))
    np.testing.assert_array_equal(parts.c[:, -1], carry)
    np.testing.assert_allclose(weighted_sum(parts, weights.full(parts)), parts.c, rtol=0, atol=3e-6)


def test_the_default_initial_state_has_the_dtype_of_the_sums(x64):
    params, x, _ = random_layer("recurrent", dtype=jnp.float32)
    for dtype in (jnp.float32, jnp.float64):
        assert weights.decompose(params, x.astype(dtype)).c.dtype == dtype


def test_states_and_gates_are_those_of_the_given_solver(x64):
    """A loose tolerance leaves states that differ from the sequential ones: the decomposition has the same."""
    params, x, c0 = random_layer("recurrent")
    solver = ranjax.FixedPoint(rtol=0.1)
    parts = weights.decompose(params, x, c0, solver=solver)
    np.testing.assert_allclose(parts.c, ranjax.solve(params, x, c0, gates="recurrent", solver=solver)[0], atol=1e-12)
    assert float(jnp.abs(parts.c - weights.decompose(params, x, c0).c).max()) > 1e-3
    parts, expected = (weights.decompose(params, x, c0, solver=s) for s in ("fixed_point", "sequential"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), parts, expected)


def test_parameters_with_partitioning_metadata_are_accepted():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer, x = ranjax.RAN(ranjax.RANCell(4, kernel_init=init)), jnp.ones((2, 5, 3))
    variables = layer.init(jax.random.key(0), x)
    params, h = variables["params"]["cell"], layer.apply(variables, x)
    for c in (weights.decompose(params, x).c, ranjax.solve(params, x, gates="recurrent")[0]):
        np.testing.assert_allclose(jnp.tanh(c), h, rtol=0, atol=1e-6)


def test_norms_of_pairs_do_not_underflow():
    norms = decomposition.measure_pairs("l2", jnp.ones((1, 4)), jnp.full((1, 4), 1e-30))
    np.testing.assert_allclose(norms, 2e-30, rtol=1e-5)


@pytest.mark.parametrize("use", [weights.decompose, partial(ranjax.solve, gates="recurrent")])
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (lambda params: {"params": params}, "params"),
        (lambda _: {"gates": 0}, "gates"),
        (lambda _: {"content": 0}, "content"),
        (lambda _: {"content": {}, "gates": {}}, "content, gates"),
        (lambda _: {}, "nothing"),
    ],
)
def test_parameters_that_are_not_a_cells_raise(use, bad, got):
    params, x, _ = random_layer("recurrent", dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"`params` must be those .*got {got}"):
        use(bad(params), x)


def test_inputs_and_options_that_do_not_fit_raise():
    params, x, c0 = random_layer("recurrent", dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"`solver` must be one of .* got 'magic'"):
        weights.decompose(params, x, solver="magic")
    with pytest.raises(ValueError, match="`activation`"):
        weights.decompose(params, x, activation="relu")
    for bad in (x[0, 0], x[..., :3]):
        with pytest.raises(ValueError, match=r"`x` must have the axes \(\*batch, time, in\)"):
            weights.decompose(params, bad)
    for use in (weights.decompose, partial(ranjax.solve, gates="recurrent")):
        with pytest.raises(TypeError, match="`x` must be real; got complex64"):
            use(params, 1j * x)
    with pytest.raises(ValueError, match=f"`seq_lengths` must be from 0 to {TIME}"):
        weights.decompose(params, x, seq_lengths=np.full(BATCH, TIME + 1))
    with pytest.raises(ValueError, match="`c0` must have the shape"):
        weights.decompose(params, x, c0[0])
    with pytest.raises(ValueError, match="`segment_starts` must have the shape"):
        weights.decompose(params, x, segment_starts=jnp.zeros(3, bool))
