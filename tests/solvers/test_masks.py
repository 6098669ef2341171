"""Segments and padding: independent segments, padding that has no effect, values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import ELEMENTWISE, inputs, layer_and_variables

from ranjax.cell import GATES
from ranjax.solvers.masks import Steps, filled


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_equal_sequences_of_their_own(gates, time_major, reverse):
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
    """Only the last segment depends on the initial state."""
    layer, variables = layer_and_variables({"gates": gates}, reverse=True, keep_order=True)
    x, c0, lengths = inputs(2, 10, 3), inputs(2, 4, seed=2), np.array([7, 10])
    starts = np.zeros((2, 10), bool)
    starts[:, [0, 4, 5]] = True
    masks = {"segment_starts": starts.T if time_major else starts, "seq_lengths": lengths, "initial_carry": c0}
    carry, h = layer.apply(variables, x.swapaxes(0, 1) if time_major else x, time_major=time_major, **masks)
    h = h.swapaxes(0, 1) if time_major else h
    for n, length in enumerate(lengths):
        for a, b in [(0, 4), (4, 5), (5, length)]:
            first = c0[n : n + 1] if b == length else None
            last, expected = layer.apply(variables, x[n : n + 1, a:b], initial_carry=first)
            np.testing.assert_allclose(h[n : n + 1, a:b], expected, rtol=1e-5, atol=1e-5)
            if a == 0:
                np.testing.assert_allclose(carry[n], last[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", ELEMENTWISE)
@pytest.mark.parametrize("solver", ["auto", "pallas"])
@pytest.mark.parametrize(("at", "other"), [(5, slice(20, 40)), (25, slice(0, 20))])
def test_nan_stays_in_its_segment(gates, solver, at, other):
    """In states and gradients."""
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
def test_a_segment_does_not_depend_on_infinity_and_nan_before_it(gates, solver):
    layer, variables = layer_and_variables({"gates": gates}, solver=solver)
    x, starts = inputs(1, 40, 3), np.arange(40)[None] == 20
    _, expected = layer.apply(variables, x[:, 20:])
    x[0, 5], x[0, 6] = np.inf, np.nan
    _, h = layer.apply(variables, x, segment_starts=starts)
    assert not np.isfinite(h[:, 6:20]).any()
    np.testing.assert_allclose(h[:, 20:], expected, rtol=1e-5, atol=1e-5)


def test_no_sequences_with_lengths():
    layer, variables = layer_and_variables({})
    _, h = layer.apply(variables, inputs(0, 5, 3), seq_lengths=np.zeros(0, np.int32))
    assert h.shape == (0, 5, 4)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_filled_steps_keep_the_state(batch):
    steps = Steps(jnp.ones((3, *batch, 4)), jnp.ones((3, *batch, 2, 4)))
    u, z = filled(steps, 5)
    assert (u.shape, z.shape) == ((5, *batch, 4), (5, *batch, 2, 4))
    np.testing.assert_array_equal(u[:3], 1)
    np.testing.assert_array_equal(z[:3], 1)
    np.testing.assert_array_equal(jax.nn.sigmoid(z[3:, ..., 0, :]), 0)
    np.testing.assert_array_equal(jax.nn.sigmoid(z[3:, ..., 1, :]), 1)
    assert filled(steps, 3) is steps


@pytest.mark.quick
@pytest.mark.parametrize("gates", GATES)
def test_masks_have_no_infinity(gates):
    """`JAX_DEBUG_INFS` points at infinities that are a mistake."""
    layer, variables = layer_and_variables({"gates": gates})
    masks = {"seq_lengths": np.array([6, 4]), "segment_starts": np.arange(6)[None] == np.array([[3], [2]])}
    with jax.debug_infs(True):
        jax.grad(lambda x: jnp.sum(layer.apply(variables, x, **masks)[1]))(inputs(2, 6, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_segment_starts_as_numbers(dtype):
    layer, variables = layer_and_variables({})
    x, starts = inputs(1, 6, 3), np.arange(6)[None] == 3
    expected = layer.apply(variables, x, segment_starts=starts)
    found = layer.apply(variables, x, segment_starts=starts.astype(dtype))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    traced = jax.jit(lambda starts: layer.apply(variables, x, segment_starts=starts))(starts.astype(dtype))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced, expected)
    with pytest.raises(ValueError, match="`segment_starts` must be bool, or the numbers 0 and 1; got others"):
        layer.apply(variables, x, segment_starts=2 * starts.astype(dtype))
