"""Cells, layers and problems that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ranjax
from ranjax import RAN, RANCell
from ranjax.cell import ACTIVATIONS, GATES, content, gates_of_input, gates_of_state
from ranjax.solvers import adjoint
from ranjax.solvers.masks import Steps

VARIANTS = [
    {"gates": gates, "activation": activation, "projection": projection}
    for gates in GATES
    for activation in ACTIVATIONS
    for projection in (None, 5)
    if not (gates == "diagonal" and projection)
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
ELEMENTWISE = ("diagonal", "input")  # gates whose steps are elementwise
FEATURES = 8


def randomised(variables, seed=0, scale=1.0):
    """Every leaf redrawn, biases included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype), variables)


def inputs(*shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def layer_and_variables(options, dtype=jnp.float32, scale=0.7, **attributes):
    layer = RAN(RANCell(4, **options, param_dtype=dtype), return_carry=True, **attributes)
    return layer, randomised(layer.init(jax.random.key(0), jnp.zeros((2, 3, 3), dtype)), scale=scale)


def problem(time=40, batch=2, scale=1.0, dtype=jnp.float64, **options):
    """Parameters, inputs and an initial state; `scale` multiplies the weights on h."""
    cell = RANCell(FEATURES, param_dtype=dtype, **options)
    rng = np.random.default_rng(time)
    x = jnp.asarray(rng.normal(size=(batch, time, 5)), dtype)
    c0 = jnp.asarray(rng.normal(size=(batch, FEATURES)), dtype)
    params = cell.init(jax.random.key(0), c0, jnp.zeros((batch, 5), dtype))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jnp.asarray(rng.normal(size=p.shape), dtype), params)
    params["gates"]["recurrent_kernel"] *= scale
    return params, x, c0


def solve(*arrays, solver="fixed_point", activation="tanh"):
    return ranjax.solve(*arrays, gates="recurrent", activation=activation, solver=solver)


def jacobians_at(params, x, c0):
    states, _ = solve(params, x, c0, solver="sequential")
    steps, earlier = Steps(content(params, x), gates_of_input(params, x)), jnp.roll(states, 1, 1).at[:, 0].set(c0)
    return adjoint.jacobians_of(
        steps, earlier, jax.nn.sigmoid(steps.z + gates_of_state(params, earlier, "tanh")), "tanh"
    )
