"""The layer: equal to `nn.RNN(cell)` and to the equations, with padding, segments and every option."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from test_cell import VARIANTS, inputs, randomised, variants

from ranjax import RAN, FixedPoint, RANCell, weights
from ranjax import solvers as gated
from ranjax.cell import GATES
from ranjax.solvers import FUSED
from ranjax.scan import SOLVERS
from ranjax.baselines import Stepwise

ELEMENTWISE = ("diagonal", "input")  # gates that a walk of their own serves
WAYS = [(options, "auto") for options in VARIANTS]
WAYS += [
    (options, solver)
    for options in VARIANTS
    if options["gates"] in ELEMENTWISE and not options["projection"]
    for solver in ("sequential", "pallas")
]
WAYS += [(options, "fixed_point") for options in VARIANTS if options["gates"] == "recurrent"][1:2]
WAYS += [(options, FixedPoint(window=4)) for options in VARIANTS if options["gates"] == "recurrent"][2:3]
WAYS += [(options, FixedPoint(window=4)) for options in VARIANTS if options["gates"] == "diagonal"][:1]
ways = pytest.mark.parametrize(
    ("options", "solver"), WAYS, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v)
)
FLAGS = {"time_major": st.booleans(), "reverse": st.booleans(), "keep_order": st.booleans()}


def layer_and_variables(options, dtype=jnp.float32, scale=0.7, **attributes):
    layer = RAN(RANCell(4, **options, param_dtype=dtype), return_carry=True, **attributes)
    return layer, randomised(layer.init(jax.random.key(0), jnp.zeros((2, 3, 3), dtype)), scale=scale)


@variants
@settings(max_examples=4)
@given(flags=st.fixed_dictionaries(FLAGS), padded=st.booleans(), seed=st.integers(0, 99))
def test_equals_rnn(options, flags, padded, seed):
    layer, variables = layer_and_variables(options)
    x, c0 = inputs(2, 9, 3, seed=seed), inputs(2, 4, seed=seed + 1)
    lengths = np.array([4, 9]) if padded else None
    expected_carry, expected = _run(nn.RNN(layer.cell, return_carry=True), variables, x, c0, lengths, **flags)
    carry, h = _run(layer, variables, x, c0, lengths, **flags)
    np.testing.assert_allclose(carry, expected_carry, rtol=1e-5, atol=1e-5)
    for row, n in enumerate([4, 9] if padded else [9, 9]):
        np.testing.assert_allclose(h[row, :n], expected[row, :n], rtol=1e-5, atol=1e-5)


def _run(layer, variables, x, c0, lengths, time_major, **flags):
    """In batch-major, whatever the layout it ran in."""
    x = np.swapaxes(x, 0, 1) if time_major else x
    carry, h = layer.apply(variables, x, initial_carry=c0, seq_lengths=lengths, time_major=time_major, **flags)
    return carry, np.swapaxes(h, 0, 1) if time_major else h


@pytest.mark.quick
@variants
def test_the_same_parameters_as_rnn(options):
    cell, x = RANCell(4, **options), inputs(2, 5, 3)
    ours, theirs = RAN(cell).init(jax.random.key(3), x), nn.RNN(cell).init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@ways
def test_equals_the_equations_with_segments_and_padding(options, solver, x64):
    layer, variables = layer_and_variables(options, jnp.float64, solver=solver)
    x, c0 = inputs(3, 12, 3, dtype=np.float64), inputs(3, 4, seed=2, dtype=np.float64)
    lengths = np.array([0, 7, 12])
    starts = np.random.default_rng(5).random((3, 12)) < 0.3
    x[np.arange(12) >= lengths[:, None]] = np.nan
    states, outputs = oracle.ran(variables["params"]["cell"], x, c0, options["activation"], starts, lengths)
    carry, h = layer.apply(variables, x, initial_carry=c0, seq_lengths=lengths, segment_starts=starts)
    np.testing.assert_allclose(carry, states[:, -1], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(h, outputs, rtol=1e-11, atol=1e-12)  # padded outputs repeat the last valid one


@pytest.mark.quick
@ways
def test_derivatives_with_segments_and_padding(options, solver, x64):
    layer, variables = layer_and_variables(options, jnp.float64, solver=solver)
    once = solver in FUSED and options["gates"] in ELEMENTWISE
    x, c0 = inputs(2, 5, 3, dtype=np.float64), inputs(2, 4, seed=2, dtype=np.float64)
    starts = np.array([[0, 0, 1, 0, 1], [1, 0, 0, 1, 0]], bool)

    @jax.jit
    def run(variables, x, c0):
        return layer.apply(variables, x, initial_carry=c0, seq_lengths=np.array([5, 3]), segment_starts=starts)

    check_grads(run, (variables, x, c0), order=1, modes=("rev",) if once else ("fwd", "rev"))


@pytest.mark.parametrize("wide", ["x", "parameters"])
def test_a_narrower_carry_has_the_gradients_of_rnn(wide, x64):
    x, cell = inputs(2, 5, 3), RANCell(4, param_dtype=jnp.float64 if wide == "parameters" else jnp.float32)
    x, c0 = x.astype(jnp.float64 if wide == "x" else jnp.float32), jnp.zeros((2, 4), jnp.float32)
    variables = RAN(cell).init(jax.random.key(0), x)
    found, expected = (
        jax.grad(lambda v, layer=layer: jnp.sum(layer.apply(v, x, initial_carry=c0) ** 2))(variables)
        for layer in (RAN(cell), nn.RNN(cell))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("gates", GATES)
def test_second_derivatives(gates, x64):
    layer, variables = layer_and_variables({"gates": gates}, jnp.float64, solver="sequential")
    x, c0 = inputs(1, 3, 3, dtype=np.float64), inputs(1, 4, seed=2, dtype=np.float64)
    run = jax.jit(lambda *a: layer.apply(a[0], a[1], initial_carry=a[2]))
    check_grads(run, (variables, x, c0), order=2, modes=("fwd", "rev"))


@ways
def test_nan_in_the_padding_reaches_no_gradient(options, solver):
    layer, variables = layer_and_variables(options, solver=solver)
    x, lengths = inputs(2, 6, 3), np.array([2, 6])
    x[0, 2:] = np.nan

    @jax.jit
    @jax.grad
    def gradient(arguments, x):
        carry, h = layer.apply(arguments[0], x, initial_carry=arguments[1], seq_lengths=lengths)
        return jnp.sum(carry**2) + jnp.sum(h**2)

    arguments = variables, jnp.ones((2, 4))
    clean = gradient(arguments, np.nan_to_num(x))
    jax.tree.map(np.testing.assert_array_equal, gradient(arguments, x), clean)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(clean))


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["auto", "pallas"])
@pytest.mark.parametrize(("at", "other"), [(5, slice(20, 40)), (25, slice(0, 20))])
def test_what_is_not_finite_stays_in_its_segment(gates, solver, at, other):
    """In the states and in the gradients."""
    layer, variables = layer_and_variables({"gates": gates}, solver=solver)
    x, starts = inputs(1, 40, 3), np.arange(40)[None] == 20

    @jax.jit
    def both(x):
        h, back = jax.vjp(lambda x: layer.apply(variables, x, segment_starts=starts)[1], x)
        return h, back(jnp.ones_like(h))[0]

    broken = x.copy()
    broken[0, at] = np.nan
    for found, expected in zip(both(broken), both(x)):
        assert np.isnan(found).any()
        np.testing.assert_allclose(found[:, other], expected[:, other], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gates", "solver"), [("input", "auto"), ("input", "pallas"), ("recurrent", "fixed_point")])
def test_a_segment_keeps_out_what_was_not_finite_before_it(gates, solver):
    layer, variables = layer_and_variables({"gates": gates}, solver=solver)
    x, starts = inputs(1, 40, 3), np.arange(40)[None] == 20
    _, expected = layer.apply(variables, x[:, 20:])
    x[0, 5], x[0, 6] = np.inf, np.nan
    _, h = layer.apply(variables, x, segment_starts=starts)
    assert not np.isfinite(h[:, 6:20]).any()
    np.testing.assert_allclose(h[:, 20:], expected, rtol=1e-5, atol=1e-5)


@variants
def test_token_by_token_equals_the_whole(options, x64):
    layer, variables = layer_and_variables(options, jnp.float64)
    x = inputs(2, 8, 3, dtype=np.float64)
    last, whole = layer.apply(variables, x)
    step = jax.jit(lambda c, x: layer.apply(variables, x[:, None], initial_carry=c))
    carry = jnp.zeros((2, 4), jnp.float64)
    for t in range(8):
        carry, h = step(carry, x[:, t])
        np.testing.assert_allclose(h[:, 0], whole[:, t], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(carry, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_are_runs_of_their_own(gates, time_major, reverse):
    layer, variables = layer_and_variables({"gates": gates}, reverse=reverse, keep_order=True)
    x = inputs(1, 10, 3)
    starts = np.zeros((1, 10), bool)
    starts[:, [0, 4, 5]] = True
    parts = [layer.apply(variables, x[:, a:b])[1] for a, b in [(0, 4), (4, 5), (5, 10)]]
    if time_major:
        _, h = layer.apply(variables, x.swapaxes(0, 1), segment_starts=starts.T, time_major=True)
        h = h.swapaxes(0, 1)
    else:
        _, h = layer.apply(variables, x, segment_starts=starts)
    np.testing.assert_allclose(h, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time_major", [False, True])
def test_segments_in_reverse_of_several_lengths(gates, time_major):
    """The last segment alone sees the first state."""
    layer, variables = layer_and_variables({"gates": gates}, reverse=True, keep_order=True)
    x, c0, lengths = inputs(2, 10, 3), inputs(2, 4, seed=2), np.array([7, 10])
    starts = np.zeros((2, 10), bool)
    starts[:, [0, 4, 5]] = True
    told = {"segment_starts": starts.T if time_major else starts, "seq_lengths": lengths, "initial_carry": c0}
    carry, h = layer.apply(variables, x.swapaxes(0, 1) if time_major else x, time_major=time_major, **told)
    h = h.swapaxes(0, 1) if time_major else h
    for n, length in enumerate(lengths):
        for a, b in [(0, 4), (4, 5), (5, length)]:
            first = c0[n : n + 1] if b == length else None
            last, expected = layer.apply(variables, x[n : n + 1, a:b], initial_carry=first)
            np.testing.assert_allclose(h[n : n + 1, a:b], expected, rtol=1e-5, atol=1e-5)
            if a == 0:
                np.testing.assert_allclose(carry[n], last[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_input_gates_with_every_solver(solver):
    x = inputs(2, 33, 3)
    layer, variables = layer_and_variables({"gates": "input"}, solver=solver)
    states, outputs = oracle.ran(variables["params"]["cell"], x, np.zeros((2, 4)), "tanh")
    carry, h = layer.apply(variables, x)
    np.testing.assert_allclose(h, outputs, atol=2e-6)
    np.testing.assert_allclose(carry, states[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", GATES)
def test_inside_bidirectional(gates):
    cell, x, lengths = RANCell(4, gates), inputs(2, 6, 3), np.array([3, 6])
    ours = nn.Bidirectional(RAN(cell), RAN(cell.copy()))
    theirs = nn.Bidirectional(nn.RNN(cell), nn.RNN(cell.copy()))
    variables = randomised(ours.init(jax.random.key(0), x))
    h, expected = (m.apply(variables, x, seq_lengths=lengths) for m in (ours, theirs))
    np.testing.assert_allclose(h[0, :3], expected[0, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_any_batch_and_no_steps(gates, batch):
    layer, variables = layer_and_variables({"gates": gates})
    carry, h = layer.apply(variables, inputs(*batch, 5, 3))
    assert (carry.shape, h.shape) == ((*batch, 4), (*batch, 5, 4))
    c0 = inputs(*batch, 4)
    carry, h = layer.apply(variables, inputs(*batch, 0, 3), initial_carry=c0)
    assert h.shape == (*batch, 0, 4)
    np.testing.assert_array_equal(carry, c0)
    gradient = jax.grad(lambda x: jnp.sum(layer.apply(variables, x)[0]))(jnp.zeros((*batch, 0, 3)))
    assert gradient.shape == (*batch, 0, 3)


@pytest.mark.parametrize(
    ("gates", "solver"),
    [("recurrent", "auto"), ("recurrent", "fixed_point"), *((g, s) for g in ELEMENTWISE for s in ("auto", "pallas"))],
)
@pytest.mark.parametrize("flags", [{}, {"reverse": True, "keep_order": True}], ids=str)
def test_several_axes_of_batch_are_as_one(gates, solver, flags):
    layer, variables = layer_and_variables({"gates": gates}, solver=solver)
    x, lengths = inputs(2, 3, 5, 3), np.array([[5, 2, 0], [1, 5, 4]])
    carry, h = layer.apply(variables, x, seq_lengths=lengths, **flags)
    expected_carry, expected = layer.apply(variables, x.reshape(6, 5, 3), seq_lengths=lengths.ravel(), **flags)
    np.testing.assert_allclose(carry.reshape(6, 4), expected_carry, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h.reshape(6, 5, 4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gates", "solver"), [("recurrent", "auto"), *((g, s) for g in ELEMENTWISE for s in ("auto", "sequential"))]
)
def test_bfloat16_products(gates, solver):
    layer, variables = layer_and_variables({"gates": gates}, scale=0.4, solver=solver)
    narrow = layer.copy(cell=layer.cell.copy(dtype=jnp.bfloat16))
    x = inputs(2, 50, 3)
    carry, h = narrow.apply(variables, x)
    wide, _ = layer.apply(variables, x)
    assert (carry.dtype, h.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(carry, wide, atol=16 * 2**-8 * float(jnp.max(jnp.abs(wide))))


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["auto", "pallas"])
def test_sigmoids_of_bfloat16_pre_activations_are_float32(gates, solver):
    """States to rounding in float32, gradients to one rounding in bfloat16, of the same narrow numbers."""
    rng = np.random.default_rng(0)
    z, u = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 12, 2, 4), (2, 12, 4)))
    weights = () if gates == "input" else tuple(jnp.asarray(rng.normal(size=(2, 4)), jnp.float32))
    c0 = jnp.zeros((2, 4))

    def total(z, u):
        c = gated._elementwise(c0, weights, (z, u), "tanh", solver)
        return jnp.sum(jnp.sin(c)), c

    def walked(z, u):
        c, states = c0, []
        for t in range(12):
            z_i, z_f = (z[:, t, n] + (weights[n][None] * jnp.tanh(c) if weights else 0) for n in range(2))
            c = jax.nn.sigmoid(z_i) * u[:, t] + jax.nn.sigmoid(z_f) * c
            states.append(c)
        states = jnp.stack(states, axis=1)
        return jnp.sum(jnp.sin(states)), states

    (_, got), found = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(z, u)
    wide = (a.astype(jnp.float32) for a in (z, u))
    (_, expected), gradients = jax.jit(jax.value_and_grad(walked, (0, 1), has_aux=True))(*wide)
    np.testing.assert_allclose(got, expected, rtol=0, atol=32 * 2**-23 * np.abs(expected).max())
    for a, b in zip(found, gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("gates", ELEMENTWISE)
def test_no_gate_is_stored_for_the_gradient(gates):
    """Kept for the backward pass: x, pre-activations, content and states, nothing else of their size."""
    layer, variables = layer_and_variables({"gates": gates, "activation": "identity"})
    _, pullback = jax.vjp(lambda v, x: layer.apply(v, x)[1], variables, inputs(2, 500, 3))
    words = sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.size >= 1000) / (2 * 500)
    assert words == 3 + 2 * 4 + 4 + 4


def test_products_with_x_are_outside_the_loop():
    layer, variables = layer_and_variables({"gates": "recurrent"})
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(inputs(2, 9, 3)))
    shapes = re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    assert sorted(shapes) == ["2,2,4", "2,9,2,4", "2,9,4"]  # in the loop only the gates' product with h


any_other_cell = pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])


@pytest.mark.quick
@any_other_cell
@pytest.mark.parametrize(("time", "given"), [(9, True), (9, False), (1, True), (17, False)])
def test_stepwise_equals_rnn(cell, time, given, x64):
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
def test_stepwise_with_float64_products_has_a_carry_as_wide(cell, x64):
    """flax's own have a carry of the parameters' dtype, which `nn.RNN` refuses or rounds to."""
    layer, exact = Stepwise(cell(4, dtype=jnp.float64)), Stepwise(cell(4, param_dtype=jnp.float64))
    x = inputs(9, 2, 3)
    variables = randomised(layer.init(jax.random.key(0), x))
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    expected = exact.apply(jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), variables), x.astype(np.float64))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13), layer.apply(variables, x), expected)


@any_other_cell
@pytest.mark.parametrize("shape", [(0, 2, 3), (9, 0, 3)])
def test_stepwise_without_steps_or_batch(cell, shape):
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
def test_stepwise_refuses_what_it_would_not_do(cell):
    with pytest.raises(ValueError, match=r"`cell` must have flax's own `(residual|activation_fn|gate_fn)`"):
        Stepwise(cell)


def test_stepwise_refuses_other_cells():
    with pytest.raises(TypeError, match=r"`cell` must be one of nn.OptimizedLSTMCell, .*; got a RANCell"):
        Stepwise(RANCell(4))


@any_other_cell
def test_stepwise_adds_to_no_weight_in_a_loop(cell):
    def weights_carried(layer):
        x = inputs(9, 2, 3)
        variables = layer.init(jax.random.key(0), x)
        text = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(layer.apply(v, x)[1])))(variables))
        return len(re.findall(r"f32\[[34],(?:4|12|16)\] = add_any", text))

    assert weights_carried(Stepwise(cell(4))) == 0
    assert weights_carried(nn.RNN(cell(4), time_major=True, return_carry=True)) > 0


@any_other_cell
def test_stepwise_with_bfloat16_products(cell):
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
def test_stepwise_multiplies_in_bfloat16_where_it_is_told_to(cell):
    layer, x = Stepwise(cell(4, dtype=jnp.bfloat16)), inputs(9, 2, 3)
    variables = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(x))
    assert set(re.findall(r"(\w+)\[[\d,]+\] = dot_general", text)) == {"bf16"}


@any_other_cell
def test_stepwise_has_the_products_with_x_outside_the_loop(cell):
    layer = Stepwise(cell(4))
    x = inputs(9, 2, 3)
    variables = layer.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(x))
    rows = re.findall(r"f32\[(\d+),\d+\] = dot_general", text)
    assert sorted(rows) == ["18", "2"]  # in the loop only the product with h


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"initial_carry": np.zeros((2, 5), np.float32)}, ValueError, r"`initial_carry` must have .* \(2, 4\)"),
        ({"seq_lengths": np.array([1.0, 2.0])}, TypeError, "`seq_lengths` must be of dtype integer; got float"),
        ({"seq_lengths": np.array([1, 2, 3])}, ValueError, r"`seq_lengths` must have the shape \(2,\).*got \(3,\)"),
        ({"seq_lengths": np.array([7, 2])}, ValueError, r"`seq_lengths` must be from 0 to 6, .*; got \[7, 2\]"),
        ({"seq_lengths": np.array([1, -1])}, ValueError, r"`seq_lengths` must be from 0 to 6, .*; got \[1, -1\]"),
        ({"segment_starts": np.zeros((2, 6))}, TypeError, "`segment_starts` must be of dtype bool; got float"),
        ({"inputs": 1j * inputs(2, 6, 3)}, TypeError, "`inputs` must be real; got complex64"),
        ({"inputs": inputs(3)}, ValueError, r"`inputs` must have the axes \(\*batch, time, in\); got the shape \(3,\)"),
        ({"segment_starts": np.zeros((6, 2), bool)}, ValueError, r"`segment_starts` must have the shape \(2, 6\)"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    layer, variables = layer_and_variables({})
    with pytest.raises(kind, match=message):
        layer.apply(variables, **{"inputs": inputs(2, 6, 3)} | arguments)


@pytest.mark.parametrize(("mine", "theirs"), [("recurrent", "input"), ("input", "recurrent"), ("diagonal", "input")])
def test_parameters_of_other_gates_are_refused(mine, theirs):
    x = inputs(2, 6, 3)
    variables = RAN(RANCell(4, theirs)).init(jax.random.key(0), x)
    for layer in (RAN(RANCell(4, mine)), nn.RNN(RANCell(4, mine))):
        with pytest.raises(ValueError, match=f"`gates` must be '{theirs}', which these .*; got '{mine}'"):
            layer.apply(variables, x)


class Doubled(RANCell):
    def __call__(self, carry, inputs):
        c, h = super().__call__(carry, inputs)
        return c, 2 * h


class Named(RANCell):
    pass


def test_cells_whose_equations_are_others_are_refused():
    for cell in (nn.LSTMCell(4), RANCell):
        with pytest.raises(TypeError, match=r"(?s)cell.*(LSTMCell|RANCell)"):
            RAN(cell)
    with pytest.raises(TypeError, match=r"`cell` must have the `__call__` of ranjax.RANCell.* that of Doubled"):
        RAN(Doubled(4))
    RAN(Named(4))


def test_bad_options():
    with pytest.raises(
        ValueError, match=r"`solver` must be one of 'auto', 'sequential', 'fixed_point'; .* read h_{t-1}"
    ):
        RAN(RANCell(4), solver="associative")
    with pytest.raises(
        ValueError, match=r"`solver` must be one of 'auto', 'sequential', 'pallas', 'newton'; .* read h_{t-1}"
    ):
        RAN(RANCell(4, gates="diagonal"), solver="chunked")
    with pytest.raises(ValueError, match=r"`solver` must be one of .*'associative'.* got 'magic'"):
        RAN(RANCell(4, gates="input"), solver="magic")


def test_a_key_is_what_the_first_carry_is_drawn_from():
    cell, key = RANCell(4, carry_init=nn.initializers.normal()), jax.random.key(7)
    layer, x = RAN(cell, return_carry=True), jnp.zeros((2, 0, 3))
    carry, _ = layer.apply(layer.init(jax.random.key(0), x), x, init_key=key)
    np.testing.assert_array_equal(carry, cell.initialize_carry(key, (2, 3)))


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["pallas", "auto", "sequential"])
def test_the_solver_that_is_asked_for_is_taken(gates, solver):
    layer, x = RAN(RANCell(4, gates), solver), jnp.ones((1, 9, 3))
    program = jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x)
    assert ("pallas_call" in str(program)) == (
        solver == "pallas" or (solver == "auto" and jax.default_backend() == "gpu")
    )


@pytest.mark.parametrize("name", ["return_carry", "time_major", "reverse", "keep_order"])
@pytest.mark.parametrize("value", [False, True])
def test_what_a_call_says_goes_before_the_attribute(name, value):
    x, cell = inputs(3, 3, 3), RANCell(4)
    others = {"reverse": True} if name == "keep_order" else {}
    told, other = (RAN(cell, **others | {name: v}) for v in (value, not value))
    variables = randomised(told.init(jax.random.key(0), x))
    expected, found = told.apply(variables, x), other.apply(variables, x, **{name: value})
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if name != "return_carry":
        assert not np.allclose(other.apply(variables, x), expected)


@pytest.mark.parametrize("gates", GATES)
def test_the_carry_is_as_wide_as_the_inputs(gates, x64):
    layer, variables = layer_and_variables({"gates": gates})
    carry, h = layer.apply(variables, inputs(2, 5, 3, dtype=np.float64))
    assert carry.dtype == h.dtype == jnp.float64


@pytest.mark.parametrize("solver", ["auto", "sequential", "associative", "chunked"])
def test_input_gates_are_wide_with_every_solver(solver):
    cell, x = RANCell(32, "input", dtype=jnp.bfloat16), inputs(2, 50, 8)
    variables = RAN(cell).init(jax.random.key(1), x)
    carry, _ = RAN(cell, solver, return_carry=True).apply(variables, x)
    made = weights.decompose(variables["params"]["cell"], x, dtype=jnp.bfloat16)
    np.testing.assert_allclose(carry, made.c[:, -1], rtol=0, atol=3e-6)


def test_no_sequences_with_lengths():
    layer, variables = layer_and_variables({})
    _, h = layer.apply(variables, inputs(0, 5, 3), seq_lengths=np.zeros(0, np.int32))
    assert h.shape == (0, 5, 4)


def test_a_layer_is_exported_for_any_batch_and_time():
    """In a process of its own: the types that the tests check know no symbolic sizes."""
    program = (
        "import jax, jax.export, jax.numpy as jnp, numpy as np\n"
        "from ranjax import RAN, RANCell\n"
        "x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)\n"
        "of_any = jax.ShapeDtypeStruct((*jax.export.symbolic_shape('batch, time'), 3), jnp.float32)\n"
        "for way in ('recurrent auto', 'recurrent fixed_point', 'diagonal newton', 'input auto'):\n"
        "    gates, solver = way.split()\n"
        "    layer = RAN(RANCell(4, gates), solver)\n"
        "    variables = layer.init(jax.random.key(0), x)\n"
        "    exported = jax.export.export(jax.jit(layer.apply))(variables, of_any)\n"
        "    np.testing.assert_allclose(exported.call(variables, x), layer.apply(variables, x), rtol=0, atol=1e-6)\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
