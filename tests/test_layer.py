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
from networks import ELEMENTWISE, VARIANTS, inputs, layer_and_variables, randomised, variants

from ranjax import RAN, FixedPoint, RANCell
from ranjax.cell import GATES
from ranjax.solvers import FUSED

CASES = [(options, "auto") for options in VARIANTS]
CASES += [
    (options, solver)
    for options in VARIANTS
    if options["gates"] in ELEMENTWISE and not options["projection"]
    for solver in ("sequential", "pallas")
]
CASES += [(options, "fixed_point") for options in VARIANTS if options["gates"] == "recurrent"][1:2]
CASES += [(options, FixedPoint(chunk=4)) for options in VARIANTS if options["gates"] == "recurrent"][2:3]
CASES += [(options, FixedPoint(chunk=4)) for options in VARIANTS if options["gates"] == "diagonal"][:1]
cases = pytest.mark.parametrize(
    ("options", "solver"), CASES, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v)
)
FLAGS = {"time_major": st.booleans(), "reverse": st.booleans(), "keep_order": st.booleans()}


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
def test_initial_parameters_equal_those_of_rnn(options):
    cell, x = RANCell(4, **options), inputs(2, 5, 3)
    ours, theirs = RAN(cell).init(jax.random.key(3), x), nn.RNN(cell).init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@cases
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
@cases
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


@cases
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


@variants
def test_token_by_token_equals_the_whole_sequence(options, x64):
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
def test_several_batch_axes_equal_one(gates, solver, flags):
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


def test_products_with_x_are_outside_the_loop():
    layer, variables = layer_and_variables({"gates": "recurrent"})
    text = str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(inputs(2, 9, 3)))
    shapes = re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    assert sorted(shapes) == ["2,2,4", "2,9,2,4", "2,9,4"]  # in the loop only the gates' product with h


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"initial_carry": np.zeros((2, 5), np.float32)}, ValueError, r"`initial_carry` must have .* \(2, 4\)"),
        ({"seq_lengths": np.array([1.0, 2.0])}, TypeError, "`seq_lengths` must be of dtype integer; got float"),
        ({"seq_lengths": np.array([1, 2, 3])}, ValueError, r"`seq_lengths` must have the shape \(2,\).*got \(3,\)"),
        ({"seq_lengths": np.array([7, 2])}, ValueError, r"`seq_lengths` must be from 0 to 6, .*; got \[7, 2\]"),
        ({"seq_lengths": np.array([1, -1])}, ValueError, r"`seq_lengths` must be from 0 to 6, .*; got \[1, -1\]"),
        ({"segment_starts": np.zeros((2, 6), complex)}, TypeError, "`segment_starts` must be of dtype bool; got compl"),
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


def test_cells_with_other_equations_are_refused():
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


def test_init_key_draws_the_initial_carry():
    cell, key = RANCell(4, carry_init=nn.initializers.normal()), jax.random.key(7)
    layer, x = RAN(cell, return_carry=True), jnp.zeros((2, 0, 3))
    carry, _ = layer.apply(layer.init(jax.random.key(0), x), x, init_key=key)
    np.testing.assert_array_equal(carry, cell.initialize_carry(key, (2, 3)))


def test_segments_begin_at_the_initial_state_of_the_cell_or_are_refused():
    x, starts = inputs(2, 6, 3), np.zeros((2, 6), bool)
    layer = RAN(RANCell(4, carry_init=nn.initializers.constant(2.0)))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"`segment_starts` begins every segment from zeros; got .*`carry_init`"):
        layer.apply(variables, x, segment_starts=starts)
    RAN(RANCell(4, carry_init=nn.initializers.zeros)).apply(variables, x, segment_starts=starts)


def test_remat_with_a_flag_of_a_call():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(RAN, static_argnums=6)(RANCell(4))(x, None, None, None, None, True)

    carry, h = Model().init_with_output(jax.random.key(0), inputs(2, 5, 3))[0]
    np.testing.assert_array_equal(jnp.tanh(carry), h[:, -1])


@pytest.mark.quick
@pytest.mark.parametrize("gates", GATES)
def test_strict_promotion_of_dtypes(gates):
    """As some users have it; also with products in bfloat16."""
    layer, variables = layer_and_variables({"gates": gates, "dtype": jnp.bfloat16})
    masks = {"seq_lengths": np.array([6, 4]), "segment_starts": np.arange(6)[None] == np.array([[3], [2]])}
    with jax.numpy_dtype_promotion("strict"):
        found = jax.grad(lambda v: jnp.sum(layer.apply(v, inputs(2, 6, 3), **masks)[1].astype(jnp.float32)))(variables)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["return_carry", "time_major", "reverse", "keep_order"])
@pytest.mark.parametrize("value", [False, True])
def test_arguments_of_a_call_replace_the_attributes(name, value):
    x, cell = inputs(3, 3, 3), RANCell(4)
    others = {"reverse": True} if name == "keep_order" else {}
    layer, other = (RAN(cell, **others | {name: v}) for v in (value, not value))
    variables = randomised(layer.init(jax.random.key(0), x))
    expected, found = layer.apply(variables, x), other.apply(variables, x, **{name: value})
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if name != "return_carry":
        assert not np.allclose(other.apply(variables, x), expected)


@pytest.mark.parametrize("gates", GATES)
def test_the_carry_is_float64_with_float64_inputs(gates, x64):
    layer, variables = layer_and_variables({"gates": gates})
    carry, h = layer.apply(variables, inputs(2, 5, 3, dtype=np.float64))
    assert carry.dtype == h.dtype == jnp.float64


def test_exports_with_symbolic_batch_and_time():
    """In a separate process: the shape checks of the tests do not support symbolic sizes."""
    program = (
        "import jax, jax.export, jax.numpy as jnp, numpy as np\n"
        "from ranjax import RAN, RANCell\n"
        "x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)\n"
        "of_any = jax.ShapeDtypeStruct((*jax.export.symbolic_shape('batch, time'), 3), jnp.float32)\n"
        "for method in ('recurrent auto', 'recurrent fixed_point', 'diagonal newton', 'input auto'):\n"
        "    gates, solver = method.split()\n"
        "    layer = RAN(RANCell(4, gates), solver)\n"
        "    variables = layer.init(jax.random.key(0), x)\n"
        "    exported = jax.export.export(jax.jit(layer.apply))(variables, of_any)\n"
        "    np.testing.assert_allclose(exported.call(variables, x), layer.apply(variables, x), rtol=0, atol=1e-6)\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
