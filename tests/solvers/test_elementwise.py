"""Input and diagonal gates, fused: dtypes, what is stored for the gradient, which solver runs."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from networks import ELEMENTWISE, inputs, layer_and_variables

from ranjax import RAN, RANCell, solvers, weights
from ranjax.scan import SOLVERS
from ranjax.solvers.elementwise import _elementwise


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["auto", "pallas"])
def test_sigmoids_of_bfloat16_pre_activations_are_float32(gates, solver):
    """States to rounding in float32, gradients to one rounding in bfloat16, of the same narrow numbers."""
    rng = np.random.default_rng(0)
    z, u = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 12, 2, 4), (2, 12, 4)))
    weights = () if gates == "input" else tuple(jnp.asarray(rng.normal(size=(2, 4)), jnp.float32))
    c0 = jnp.zeros((2, 4))

    def total(z, u):
        c = _elementwise(c0, weights, (z, u), "tanh", solver)
        return jnp.sum(jnp.sin(c)), c

    def looped(z, u):
        c, states = c0, []
        for t in range(12):
            z_i, z_f = (z[:, t, n] + (weights[n][None] * jnp.tanh(c) if weights else 0) for n in range(2))
            c = jax.nn.sigmoid(z_i) * u[:, t] + jax.nn.sigmoid(z_f) * c
            states.append(c)
        states = jnp.stack(states, axis=1)
        return jnp.sum(jnp.sin(states)), states

    (_, got), found = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(z, u)
    wide = (a.astype(jnp.float32) for a in (z, u))
    (_, expected), gradients = jax.jit(jax.value_and_grad(looped, (0, 1), has_aux=True))(*wide)
    np.testing.assert_allclose(got, expected, rtol=0, atol=32 * 2**-23 * np.abs(expected).max())
    for a, b in zip(found, gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-5)


def words_stored(gates, **masks):
    """Numbers that a step of 4 features with inputs of 3 stores for the backward pass."""
    layer, variables = layer_and_variables({"gates": gates, "activation": "identity"})
    _, pullback = jax.vjp(lambda v, x: layer.apply(v, x, **masks)[1], variables, inputs(2, 500, 3))
    return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.size >= 1000 and leaf.dtype != bool) / (2 * 500)


@pytest.mark.parametrize("gates", ELEMENTWISE)
def test_no_gate_is_stored_for_the_gradient(gates, patch):
    """Stored for the backward pass: x, pre-activations, content and states, nothing else of their size."""
    patch(solvers, "STORED", 0)
    assert words_stored(gates) == 3 + 2 * 4 + 4 + 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choice for a CPU")
def test_few_gates_on_the_input_are_stored_where_there_are_no_masks():
    assert words_stored("diagonal") == 3 + 2 * 4 + 4 + 4
    assert words_stored("input") > words_stored("input", segment_starts=np.zeros((2, 500), bool))


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["pallas", "auto", "sequential"])
def test_the_selected_solver_runs(gates, solver):
    layer, x = RAN(RANCell(4, gates), solver), jnp.ones((1, 9, 3))
    program = jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x)
    assert ("pallas_call" in str(program)) == (
        solver == "pallas" or (solver == "auto" and jax.default_backend() == "gpu")
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_input_gates_with_every_solver(solver):
    x = inputs(2, 33, 3)
    layer, variables = layer_and_variables({"gates": "input"}, solver=solver)
    states, outputs = oracle.ran(variables["params"]["cell"], x, np.zeros((2, 4)), "tanh")
    carry, h = layer.apply(variables, x)
    np.testing.assert_allclose(h, outputs, atol=2e-6)
    np.testing.assert_allclose(carry, states[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["auto", "sequential", "associative", "chunked"])
def test_states_are_float32_with_bfloat16_products_and_every_solver(solver):
    cell, x = RANCell(32, "input", dtype=jnp.bfloat16), inputs(2, 50, 8)
    variables = RAN(cell).init(jax.random.key(1), x)
    carry, _ = RAN(cell, solver, return_carry=True).apply(variables, x)
    parts = weights.decompose(variables["params"]["cell"], x, dtype=jnp.bfloat16)
    np.testing.assert_allclose(carry, parts.c[:, -1], rtol=0, atol=3e-6)


TWICE = {
    "forward": lambda f, x: jax.jvp(f, (x,), (x,))[1],
    "linearized": lambda f, x: jax.linearize(f, x)[1](x),
    "forward over reverse": lambda f, x: jax.jvp(jax.grad(f), (x,), (x,))[1],
    "reverse over forward": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1])(x),
    "reverse over reverse": lambda f, x: jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(f)(x))))(x),
}


@pytest.mark.quick
@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("order", TWICE)
def test_forward_mode_and_second_derivatives_are_those_of_the_sequential_solver(gates, order, x64):
    layer, variables = layer_and_variables({"gates": gates}, dtype=jnp.float64)
    other, x = RAN(layer.cell, solver="sequential", return_carry=True), jnp.asarray(inputs(2, 7, 3), jnp.float64)
    masks = {"seq_lengths": np.array([7, 5]), "segment_starts": np.arange(7)[None] == np.array([[3], [2]])}

    def derivative(layer):
        def f(scale):
            scaled = jax.tree.map(lambda a: scale[0, 0, 0] * a, variables)
            return jnp.sum(jnp.sin(layer.apply(scaled, scale * x, **masks)[1]))

        return jax.jit(lambda x: TWICE[order](f, x))(1 + x / 9)

    np.testing.assert_allclose(derivative(layer), derivative(other), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gates", ELEMENTWISE)
def test_the_hessian_of_the_content_alone(gates, x64):
    """Where neither the gates nor the initial state are differentiated, and for each sequence of a batch."""
    layer, variables = layer_and_variables({"gates": gates}, dtype=jnp.float64)
    other, x = RAN(layer.cell, solver="sequential", return_carry=True), jnp.asarray(inputs(2, 5, 3), jnp.float64)

    def hessians(layer):
        def f(kernel, x):
            content = {"content": {"kernel": kernel}}
            params = {"cell": variables["params"]["cell"] | content}
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x)[1]))

        kernel = variables["params"]["cell"]["content"]["kernel"]
        return jax.jit(jax.vmap(jax.hessian(f), (None, 0)))(kernel, x)

    np.testing.assert_allclose(hessians(layer), hessians(other), rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a CPU's program")
@pytest.mark.parametrize("gates", ELEMENTWISE)
def test_a_gradient_runs_one_loop_forward_and_one_in_reverse(gates):
    """What only second derivatives read is in no compiled gradient."""
    layer, variables = layer_and_variables({"gates": gates})
    gradient = jax.grad(lambda v, x: jnp.sum(layer.apply(v, x)[1]), (0, 1))
    program = jax.jit(gradient).lower(variables, inputs(2, 500, 3)).compile().as_text()
    assert program.count(" while(") == 2
