"""A recurrent policy over many environments, with resets where episodes begin: a cell in a scan, then one layer.

python examples/policy.py
"""

from functools import partial
from timeit import timeit

import jax
import jax.numpy as jnp
from flax import linen as nn

from ranjax import RAN, RANCell

TIME, ENVIRONMENTS, OBSERVATION, FEATURES, ACTIONS = 128, 64, 16, 128, 4


@partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
class Scanned(nn.Module):
    """The usual pattern, here with a `RANCell` for a GRU's: the carry is set to zeros where an episode begins."""

    @nn.compact
    def __call__(self, carry, step):
        observation, reset = step
        return RANCell(FEATURES, name="cell")(carry * (1 - reset[:, None]), observation)


class InAScan(nn.Module):
    @nn.compact
    def __call__(self, carry, observations, resets):
        carry, h = Scanned(name="layer")(carry, (observations, resets))
        return carry, nn.Dense(ACTIONS, name="logits")(h)


class AsALayer(nn.Module):
    @nn.compact
    def __call__(self, carry, observations, resets):
        cell = RANCell(FEATURES, parent=None)  # of the layer: layer/cell
        layer = RAN(cell, time_major=True, return_carry=True, name="layer")
        carry, h = layer(observations, initial_carry=carry, segment_starts=resets)
        return carry, nn.Dense(ACTIONS, name="logits")(h)


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    observations = jax.random.normal(keys[0], (TIME, ENVIRONMENTS, OBSERVATION))
    resets = jax.random.bernoulli(keys[1], 0.05, (TIME, ENVIRONMENTS)).astype(jnp.float32)  # 1.0 where one begins
    inputs, outputs = (jnp.zeros((ENVIRONMENTS, FEATURES)), observations, resets), {}
    variables = InAScan().init(keys[2], *inputs)
    for model in (InAScan(), AsALayer()):  # with the same parameters
        gradient = jax.jit(jax.grad(lambda v, model=model: jnp.sum(model.apply(v, *inputs)[1] ** 2)))
        outputs[type(model).__name__] = model.apply(variables, *inputs), jax.block_until_ready(gradient(variables))
        seconds = timeit(lambda gradient=gradient: jax.block_until_ready(gradient(variables)), number=10)
        print(f"{type(model).__name__:10} {100 * seconds:6.1f} ms a gradient")
    return outputs


if __name__ == "__main__":
    main()
