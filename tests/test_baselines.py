"""`Stepwise` equals `nn.RNN` for the LSTM, the GRU and the Elman network, with its gradients."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from networks import inputs, randomised

from ranjax import RANCell
from ranjax.baselines import Stepwise

any_other_cell = pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])


@pytest.mark.quick
@any_other_cell
@pytest.mark.parametrize(("time", "given"), [(9, True), (9, False), (1, True), (17, False)])
def test_equals_rnn(cell, time, given, x64):
    cell = cell(4, param_dtype=jnp.float64)
    ours, theirs = Stepwise(cell), nn.RNN(cell, time_major=True, return_carry=True)
    x = inputs(time, 2, 3, dtype=np.float64)
    variables = theirs.init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(3), x), variables)
    variables, carry = randomised(variables), cell.initialize_carry(jax.random.key(0), x.shape[1:])
    arguments = variables, x, randomised(carry, seed=5)

    def loss(layer, variables, x, carry):
        last, h = layer.apply(variables, x, initial_carry=carry if given else None)
        return sum(jnp.sum(jnp.sin(a + k)) for k, a in enumerate(jax.tree.leaves((last, h)))), (last, h)

    got, expected = (jax.value_and_grad(partial(loss, a), (0, 1, 2), has_aux=True)(*arguments) for a in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), got, expected)


@any_other_cell
def test_float64_products_have_a_float64_carry(cell, x64):
    """In `nn.RNN` the carry has the dtype of the parameters."""
    layer, exact = Stepwise(cell(4, dtype=jnp.float64)), Stepwise(cell(4, param_dtype=jnp.float64))
    x = inputs(9, 2, 3)
    variables = randomised(layer.init(jax.random.key(0), x))
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    expected = exact.apply(jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), variables), x.astype(np.float64))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), layer.apply(variables, x), expected)


@any_other_cell
@pytest.mark.parametrize("shape", [(0, 2, 3), (9, 0, 3)])
def test_no_steps_or_no_batch(cell, shape):
    layer = Stepwise(cell(4))
    variables, x = layer.init(jax.random.key(0), inputs(9, 2, 3)), inputs(*shape)
    found, (carry, h) = (
        jax.value_and_grad(lambda v: jnp.sum(layer.apply(v, x)[1]))(variables),
        layer.apply(variables, x),
    )
    assert h.shape == (*shape[:2], 4)
    assert {c.shape for c in jax.tree.leaves(carry)} == {(shape[1], 4)}
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "cell",
    [nn.SimpleCell(4, residual=True), nn.GRUCell(4, activation_fn=nn.relu), nn.OptimizedLSTMCell(4, gate_fn=nn.relu)],
)
def test_other_activations_and_residuals_are_refused(cell):
    with pytest.raises(ValueError, match=r"`cell` must have flax's own `(residual|activation_fn|gate_fn)`"):
        Stepwise(cell)


def test_other_cells_are_refused():
    with pytest.raises(TypeError, match=r"`cell` must be one of nn.OptimizedLSTMCell, .*; got a RANCell"):
        Stepwise(RANCell(4))


@any_other_cell
def test_no_loop_accumulates_gradients_of_weights(cell):
    def weights_carried(layer):
        x = inputs(9, 2, 3)
        variables = layer.init(jax.random.key(0), x)
        text = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(layer.apply(v, x)[1])))(variables))
        return len(re.findall(r"f32\[[34],(?:4|12|16)\] = add_any", text))

    assert weights_carried(Stepwise(cell(4))) == 0
    assert weights_carried(nn.RNN(cell(4), time_major=True, return_carry=True)) > 0


@any_other_cell
def test_bfloat16_products_are_close_to_float32(cell):
    x = inputs(9, 2, 3)
    exact, layer = Stepwise(cell(4)), Stepwise(cell(4, dtype=jnp.bfloat16))
    variables = randomised(layer.init(jax.random.key(0), x), scale=0.5)

    def outputs(layer):
        return jax.value_and_grad(lambda v: (lambda out: (jnp.sum(out[1]), out))(layer.apply(v, x)), has_aux=True)

    ((_, out), gradient), ((_, expected), exact) = outputs(layer)(variables), outputs(exact)(variables)
    assert {a.dtype for a in jax.tree.leaves((out, gradient))} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves((out, gradient)), jax.tree.leaves((expected, exact)), strict=True):
        assert 0 < np.abs(a - b).max() < 0.03 * max(1, np.abs(b).max())


@any_other_cell
def test_all_products_are_in_dtype(cell):
    layer, x = Stepwise(cell(4, dtype=jnp.bfloat16)), inputs(9, 2, 3)
    variables = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(x))
    assert set(re.findall(r"(\w+)\[[\d,]+\] = dot_general", text)) == {"bf16"}


@any_other_cell
def test_products_with_x_are_outside_the_loop(cell):
    layer = Stepwise(cell(4))
    x = inputs(9, 2, 3)
    variables = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(x))
    rows = re.findall(r"f32\[([\d,]+),\d+\] = dot_general", text)
    assert sorted(rows) == ["2", "9,2"]  # in the loop only the product with h
