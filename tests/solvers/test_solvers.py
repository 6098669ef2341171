"""`solve`: its arguments, which solvers fit which gates, dtypes, exports of the package."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from networks import problem

import ranjax
from ranjax import RAN, FixedPoint, RANCell

pytestmark = pytest.mark.core


def test_bad_arguments():
    params, x, _ = problem(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"`gates` must be 'recurrent', .*; got 'input'"):
        ranjax.solve(params, x, gates="input")
    with pytest.raises(
        ValueError, match=r"`params` must be those .*\['cell'\] of a layer, .*of a LanguageModel; got params"
    ):
        ranjax.solve({"params": params}, x, gates="recurrent")
    with pytest.raises(ValueError, match=r"`activation` must be one of 'tanh', 'identity'; got 'relu'"):
        ranjax.solve(params, x, gates="recurrent", activation="relu")
    with pytest.raises(ValueError, match=r"`c0` must have the shape .* = \(2, 8\); got \(3, 8\)"):
        ranjax.solve(params, x, jnp.zeros((3, 8)), gates="recurrent")
    for shape in ((5,), (2, 40, 6)):
        with pytest.raises(ValueError, match=rf"`x` must have the axes .* in = 5 .* got .*{re.escape(str(shape))}"):
            ranjax.solve(params, jnp.zeros(shape), gates="recurrent")


def test_iterations_are_refused_for_other_gates():
    for gates, solver in (("input", "fixed_point"), ("input", FixedPoint()), ("input", "newton")):
        with pytest.raises(ValueError, match=rf"got {re.escape(repr(solver))} with gates='input'"):
            RAN(RANCell(4, gates), solver)
    with pytest.raises(ValueError, match="'pallas', 'newton'; got 'fixed_point' with gates='diagonal'"):
        RAN(RANCell(4, "diagonal"), "fixed_point")
    with pytest.raises(ValueError, match="'sequential', 'fixed_point'; got 'newton' with gates='recurrent'"):
        RAN(RANCell(4), "newton")


@pytest.mark.parametrize("gates", ["recurrent", "diagonal", "input"])
@pytest.mark.parametrize("narrow", ["parameters", "inputs"])
def test_products_are_in_the_wider_dtype_of_parameters_and_inputs(x64, gates, narrow):
    """As in a layer: h_{t-1} is not rounded to a narrower dtype of the weights."""
    cell = RANCell(4, gates, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 30, 3), jnp.float64)
    params = cell.init(jax.random.key(0), jnp.zeros((2, 4), jnp.float64), x[:, 0])["params"]
    if narrow == "parameters":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    else:
        x = x.astype(jnp.bfloat16)
    expected, _ = oracle.ran(*jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x)), np.zeros((2, 4)), "tanh")
    np.testing.assert_allclose(ranjax.solve(params, x, gates=gates)[0], expected, rtol=0, atol=1e-12)
