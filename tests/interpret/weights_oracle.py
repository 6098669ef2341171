"""The weights of a decomposition as plain loops in float64 numpy, and random inputs to compare with them."""

import jax
import jax.numpy as jnp
import numpy as np

import ranjax
from ranjax import weights

KINDS = [(gates, activation) for gates in ranjax.cell.GATES for activation in ("tanh", "identity")]
BATCH, TIME, SIZE, FEATURES = 3, 37, 5, 6


def random_layer(gates, activation="tanh", projection=None, time=TIME, seed=0, dtype=jnp.float64, features=FEATURES):
    """Parameters of a cell, inputs and an initial state, every leaf at random."""
    cell = ranjax.RANCell(features, gates, activation, projection, param_dtype=dtype)
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (BATCH, time, SIZE), dtype)
    c0 = jax.random.normal(keys[1], (BATCH, features), dtype)
    leaves, tree = jax.tree.flatten(jax.eval_shape(cell.init, keys[2], c0, x[:, 0])["params"])
    leaves = [
        0.6 * jax.random.normal(k, p.shape, dtype) for k, p in zip(jax.random.split(keys[3], len(leaves)), leaves)
    ]
    return jax.tree.unflatten(tree, leaves), x, c0


def constant(i, f, steps=4, features=3):
    """A decomposition with the same gates at every step."""
    i, f = jnp.full((steps, features), i), jnp.full((steps, features), f)
    return weights.Decomposition(i=i, f=f, u=i, c=i, c0=i[0])


def weights_by_loop(i, f):
    """w^t_j, and the weight of the initial state, step by step."""
    i, f = np.asarray(i, np.float64), np.asarray(f, np.float64)
    time = i.shape[-2]
    w, carry = np.zeros((*i.shape[:-2], time, time, i.shape[-1])), np.ones_like(i)
    for t in range(time):
        if t:
            w[..., t, :, :] = f[..., t, None, :] * w[..., t - 1, :, :]
        w[..., t, t, :] = i[..., t, :]
        carry[..., t, :] = f[..., t, :] * (carry[..., t - 1, :] if t else 1)
    return w, carry


def reduced_by_loop(w, u, reduce):
    """One number for the weights of all components."""
    part = np.abs(w * np.asarray(u)[..., None, :, :]) if reduce == "contribution" else w
    return {"max": part.max(-1), "l2": np.sqrt((part**2).sum(-1))}.get(reduce, part.sum(-1))


def weighted_sum(parts, w):
    """The states as weighted sums of contents and initial state."""
    return jnp.einsum("...tjf,...jf->...tf", w, parts.u) + weights.carried(parts) * parts.c0[..., None, :]
