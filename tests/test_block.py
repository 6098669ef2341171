"""The residual block: equal to the equations for every cell, with masks, segments and time over a mesh."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import mesh, needs_devices, spread
from networks import inputs, randomised

from ranjax import RAN, FixedPoint, RANCell, ResidualBlock
from ranjax.cell import GATES

FLAX = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "rnn": nn.SimpleCell}
CELLS = (*GATES, *FLAX)
SIZES = [{}, {"conv_width": 1}, {"conv_width": 2, "expansion": 0.5}, {"expansion": None}]
LENGTHS = np.array([0, 7, 9])
STARTS = np.random.default_rng(5).random((3, 9)) < 0.3


def block_and_variables(cell="input", dtype=jnp.float32, scale=0.5, features=4, **attributes):
    options = {"param_dtype": dtype}
    cell = FLAX[cell](features, **options) if cell in FLAX else RANCell(features, cell, **options)
    block = ResidualBlock(cell, return_carry=True, **attributes)
    return block, randomised(block.init(jax.random.key(0), jnp.zeros((2, 3, 5), dtype)), scale=scale)


def ran_step(block, variables):
    """One step of the oracle's RAN: `step(c, v) -> (c, h)`."""

    def step(c, v):
        states, outputs = oracle.ran(variables["params"]["cell"], v[:, None], c, block.cell.activation)
        return states[:, 0], outputs[:, 0]

    return step


def masked(**more):
    x = inputs(3, 9, 5, dtype=np.float64)
    x[np.arange(9) >= LENGTHS[:, None]] = np.nan
    return {"inputs": x, "seq_lengths": LENGTHS, "segment_starts": STARTS} | more


@pytest.mark.quick
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_equations_with_segments_and_padding(gates, sizes, x64):
    block, variables = block_and_variables(gates, jnp.float64, **sizes)
    carry = inputs(3, 4, dtype=np.float64), inputs(3, block.conv_width - 1, 5, seed=3, dtype=np.float64)
    arguments = masked(initial_carry=carry)
    z, c, history = oracle.residual_block(
        variables["params"], arguments["inputs"], ran_step(block, variables), *carry, STARTS, LENGTHS
    )
    found, outputs = block.apply(variables, **arguments)
    np.testing.assert_allclose(found[0], c, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found[1], history, rtol=1e-11, atol=1e-12)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(outputs[row, :n], z[row, :n], rtol=1e-11, atol=1e-12)
    assert jnp.all(jnp.isfinite(outputs))


@pytest.mark.parametrize("cell", FLAX)
@pytest.mark.parametrize("time_major", [False, True])
def test_other_cells_equal_the_equations(cell, time_major, x64):
    block, variables = block_and_variables(cell, jnp.float64, time_major=time_major)
    one = {"params": variables["params"]["cell"]}
    first, x = block.cell.initialize_carry(jax.random.key(0), (3, 5)), inputs(3, 9, 5, dtype=np.float64)
    flat, tree = jax.tree.flatten(jax.tree.map(lambda c: c.astype(jnp.float64), first))

    def step(flat, v):  # of the LSTM's two states side by side
        states = jax.tree.unflatten(tree, np.split(flat, tree.num_leaves, axis=-1))
        states, h = block.cell.apply(one, states, v)
        return np.concatenate(jax.tree.leaves(states), axis=-1), np.asarray(h)

    z, c, history = oracle.residual_block(
        variables["params"], x, step, np.concatenate(flat, axis=-1), np.zeros((3, 3, 5))
    )
    found, outputs = block.apply(variables, x.swapaxes(0, 1) if time_major else x)
    outputs = outputs.swapaxes(0, 1) if time_major else outputs
    np.testing.assert_allclose(np.concatenate(jax.tree.leaves(found[0]), axis=-1), c, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found[1], history, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(outputs, z, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_equal_the_whole_sequence(cell, steps, x64):
    block, variables = block_and_variables(cell, jnp.float64)
    x = inputs(2, 10, 5, dtype=np.float64)
    last, whole = block.apply(variables, x)
    advance, carry = jax.jit(lambda carry, x: block.apply(variables, x, carry)), None
    for t in range(0, 10, steps):
        carry, z = advance(carry, x[:, t : t + steps])
        np.testing.assert_allclose(z, whole[:, t : t + steps], rtol=1e-11, atol=1e-12)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), carry, last)
    if block.conv_width > 1:
        assert advance._cache_size() == 2  # once without a carry, once for all later calls


@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell, x64):
    block, variables = block_and_variables(cell, jnp.float64)
    masks = {} if cell in FLAX else {"seq_lengths": np.array([5, 3]), "segment_starts": STARTS[:2, :5]}
    carry, _ = block.apply(variables, inputs(2, 2, 5, dtype=np.float64))

    @jax.jit
    def run(variables, x, carry):
        return block.apply(variables, x, carry, **masks)

    modes = ("fwd", "rev") if cell == "recurrent" else ("rev",)
    check_grads(run, (variables, inputs(2, 5, 5, dtype=np.float64), carry), order=1, modes=modes)


@pytest.mark.parametrize("gates", GATES)
def test_nan_in_the_padding_reaches_no_gradient(gates):
    block, variables = block_and_variables(gates)

    @jax.grad
    def gradient(variables, x):
        carry, z = block.apply(variables, x, seq_lengths=LENGTHS)
        return sum(jnp.sum(leaf**2) for leaf in (*carry, z))

    x = masked()["inputs"].astype(np.float32)
    clean = gradient(variables, np.nan_to_num(x))
    jax.tree.map(np.testing.assert_array_equal, gradient(variables, x), clean)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(clean))


@pytest.mark.parametrize("gates", GATES)
def test_a_segment_is_independent_of_what_is_before_it(gates):
    block, variables = block_and_variables(gates)
    x, starts = inputs(2, 9, 5), np.arange(9) == 4
    _, alone = block.apply(variables, x[:, 4:])
    carry = jnp.ones((2, 4)), jnp.ones((2, 3, 5))
    _, both = block.apply(variables, x, carry, segment_starts=np.tile(starts, (2, 1)))
    np.testing.assert_allclose(both[:, 4:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("cell", ["input", "lstm"])
def test_reverse_is_the_flipped_sequence(cell, time_major):
    x, time = inputs(2, 9, 5), 0 if time_major else 1
    x = x.swapaxes(0, 1) if time_major else x
    block, variables = block_and_variables(cell, time_major=time_major)
    expected_carry, expected = block.apply(variables, np.flip(x, time))
    for keep_order in (False, True):
        carry, z = block.copy(reverse=True, keep_order=keep_order).apply(variables, x)
        jax.tree.map(np.testing.assert_array_equal, carry, expected_carry)
        np.testing.assert_array_equal(z, np.flip(expected, time) if keep_order else expected)


def test_reverse_with_segments_and_padding():
    block, variables = block_and_variables(reverse=True, keep_order=True)
    x, starts = inputs(1, 9, 5), np.zeros((1, 9), bool)
    starts[0, 4] = True
    _, z = block.apply(variables, x, seq_lengths=np.array([7]), segment_starts=starts)
    for first, end in ((0, 4), (4, 7)):
        _, alone = block.apply(variables, x[:, first:end])
        np.testing.assert_allclose(z[:, first:end], alone, rtol=1e-6, atol=1e-6)


@needs_devices
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masks", [False, True])
def test_time_over_a_mesh_equals_one_device(gates, masks, x64):
    block, variables = block_and_variables(gates, jnp.float64)
    x, carry = inputs(2, 16, 5, dtype=np.float64), (inputs(2, 4, dtype=np.float64), inputs(2, 3, 5, dtype=np.float64))
    lengths, starts = np.array([9, 14]), np.random.default_rng(1).random((2, 16)) < 0.3
    expected, z = block.apply(variables, x, carry, *((lengths, starts) if masks else ()))
    over = block.copy(axis_name="time")

    def part(x, starts):
        return over.apply(variables, x, carry, *((lengths, starts) if masks else ()))

    run = spread(part, mesh(time=8), (P(None, "time"), P(None, "time")), ((P(), P()), P(None, "time")))
    found, outputs = run(x, starts)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-11), found, expected)
    valid = np.arange(16) < (lengths if masks else np.array([16, 16]))[:, None]
    np.testing.assert_allclose(outputs[valid], z[valid], rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("gates", GATES)
def test_any_batch_and_no_steps(gates, batch):
    block, variables = block_and_variables(gates)
    carry, z = block.apply(variables, inputs(*batch, 6, 5))
    assert [c.shape for c in carry] == [(*batch, 4), (*batch, 3, 5)]
    assert z.shape == (*batch, 6, 5)
    same, z = block.apply(variables, inputs(*batch, 0, 5), carry)
    assert z.shape == (*batch, 0, 5)
    jax.tree.map(np.testing.assert_array_equal, same, carry)


def test_the_cell_has_the_parameters_of_the_layer_without_a_block():
    x = inputs(2, 9, 5)
    cell = RANCell(4)
    ours, theirs = (layer(cell).init(jax.random.key(0), x)["params"]["cell"] for layer in (ResidualBlock, RAN))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)


@pytest.mark.parametrize("cell", ["input", "recurrent", "lstm"])
def test_products_are_in_bfloat16_and_the_stream_in_float32(cell):
    block, variables = block_and_variables(cell, scale=0.3)
    narrow = block.copy(cell=block.cell.copy(dtype=jnp.bfloat16))
    x = inputs(2, 50, 5)
    carry, z = narrow.apply(variables, x)
    _, wide = block.apply(variables, x)
    assert {leaf.dtype for leaf in (*jax.tree.leaves(carry), z)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(z, wide, atol=16 * 2**-8 * float(jnp.max(jnp.abs(wide))))
    program = str(jax.make_jaxpr(lambda x: narrow.apply(variables, x))(x))
    assert "bf16[2,50,5]" in program
    kinds = {line.split(":")[1].split("[")[0] for line in program.splitlines() if "dot_general" in line}
    assert kinds == {"bf16"}


@pytest.mark.quick
def test_strict_promotion_of_dtypes():
    block, variables = block_and_variables()
    masks = {"seq_lengths": LENGTHS, "segment_starts": STARTS}
    with jax.numpy_dtype_promotion("strict"):
        for dtype in (None, jnp.bfloat16):
            one = block.copy(cell=block.cell.copy(dtype=dtype))
            found = jax.grad(lambda v, one=one: jnp.sum(one.apply(v, inputs(3, 9, 5), **masks)[1]))(variables)
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_dropout_is_on_what_is_added_to_the_stream():
    block, variables = block_and_variables(features=64, dropout=0.5)
    x = np.ones((1, 400, 5), np.float32)
    run = partial(block.copy(expansion=None).apply, variables, x)
    _, dropped = run(deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert 0.4 < float(jnp.mean(dropped == 1)) < 0.6  # nothing was added there
    _, exact = run(deterministic=True)
    np.testing.assert_array_equal(exact, block.copy(expansion=None, dropout=0.0).apply(variables, x)[1])
    assert not jnp.any(exact == 1)


def test_a_fixed_point_solver_solves_gates_on_h():
    block, variables = block_and_variables("recurrent")
    x = inputs(2, 20, 5)
    found, expected = (block.copy(solver=solver).apply(variables, x) for solver in (FixedPoint(chunk=8), "sequential"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    ("attributes", "kind", "message"),
    [
        ({"conv_width": 0}, ValueError, "`conv_width` must be a whole number, at least 1; got 0"),
        ({"expansion": 0.0}, ValueError, "`expansion` must be above 0 .*, or None; got 0.0"),
        ({"expansion": float("nan")}, ValueError, "`expansion` must be above 0 .*, or None; got nan"),
        ({"dropout": 1.0}, ValueError, r"`dropout` must be a rate in \[0, 1\); got 1.0"),
        ({"solver": "fixed_point"}, ValueError, "`solver` must be one of .*; got 'fixed_point' with gates='input'"),
        ({"reverse": True, "axis_name": "time"}, ValueError, "`reverse` needs all of the sequence"),
        ({"cell": nn.LSTMCell(4)}, TypeError, "`cell` must be a ranjax.RANCell or one of nn.Opt.*; got a LSTMCell"),
        ({"cell": nn.GRUCell(4), "solver": "sequential"}, ValueError, "`solver` is for a block of a ranjax.RANCell"),
        ({"cell": nn.GRUCell(4), "axis_name": "time"}, ValueError, "`axis_name` is for a block of a ranjax.RANCell"),
    ],
)
def test_bad_options(attributes, kind, message):
    with pytest.raises(kind, match=message):
        ResidualBlock(**{"cell": RANCell(4, "input")} | attributes)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"inputs": inputs(5)}, ValueError, r"`inputs` must have the axes \(\*batch, time, in\); got the shape \(5,\)"),
        ({"seq_lengths": np.array([10, 1])}, ValueError, "`seq_lengths` must be from 0 to 9"),
        ({"initial_carry": np.zeros((2, 4))}, TypeError, r"`initial_carry` must be the pair \(carry, history\)"),
        (
            {"initial_carry": (None, np.zeros((2, 2, 5), np.float32))},
            ValueError,
            r"`initial_carry\[1\]` must be the history.* \(2, 3, 5\); got \(2, 2, 5\)",
        ),
        (
            {"initial_carry": (np.zeros((2, 3), np.float32), None)},
            ValueError,
            r"`initial_carry` must have the shape \(\*batch, features\) = \(2, 4\)",
        ),
    ],
)
def test_bad_arguments(arguments, kind, message):
    block, variables = block_and_variables()
    with pytest.raises(kind, match=message):
        block.apply(variables, **{"inputs": inputs(2, 9, 5)} | arguments)


def test_masks_are_refused_with_other_cells():
    block, variables = block_and_variables("lstm")
    for name, value in (("seq_lengths", LENGTHS), ("segment_starts", STARTS)):
        with pytest.raises(ValueError, match=f"`{name}` is for a block of a ranjax.RANCell; got it with a Optimized"):
            block.apply(variables, inputs(3, 9, 5), **{name: value})


def test_an_expansion_that_leaves_no_unit_is_refused():
    with pytest.raises(ValueError, match=r"`expansion` must leave the MLP at least one unit; got 0\.1 for 5 features"):
        block_and_variables(expansion=0.1)


def test_exports_with_symbolic_batch_and_time():
    """In a separate process: the shape checks of the tests do not support symbolic sizes."""
    program = (
        "import jax, jax.export, jax.numpy as jnp, numpy as np, flax.linen as nn\n"
        "from ranjax import ResidualBlock, RANCell\n"
        "x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)\n"
        "of_any = jax.ShapeDtypeStruct((*jax.export.symbolic_shape('batch, time'), 3), jnp.float32)\n"
        "for cell in (RANCell(4, 'input'), RANCell(4), nn.GRUCell(4)):\n"
        "    block = ResidualBlock(cell)\n"
        "    variables = block.init(jax.random.key(0), x)\n"
        "    exported = jax.export.export(jax.jit(block.apply))(variables, of_any)\n"
        "    np.testing.assert_allclose(exported.call(variables, x), block.apply(variables, x), rtol=0, atol=1e-6)\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
