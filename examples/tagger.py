"""A bidirectional tagger over padded batches, in Flax NNX: does the same token occur earlier, does it later?

python examples/tagger.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ranjax.nnx import RAN, RANCell

TOKENS, LONGEST, FEATURES, TAGS = 8, 12, 64, 4


class Tagger(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(TOKENS, FEATURES, rngs=rngs)
        self.both = nnx.Bidirectional(*(RAN(RANCell(FEATURES, FEATURES, rngs=rngs)) for _ in range(2)), rngs=rngs)
        self.out = nnx.Linear(2 * FEATURES, TAGS, rngs=rngs)

    def __call__(self, tokens, lengths):
        return self.out(self.both(self.embed(tokens), seq_lengths=lengths))


def batch(rng, size=64):
    """Tokens, the lengths of their sequences, and tags: 1 if the token occurs before, 2 if after, 3 if both."""
    tokens, lengths = rng.integers(0, TOKENS, (size, LONGEST)), rng.integers(1, LONGEST + 1, size)
    valid = np.arange(LONGEST) < lengths[:, None]
    same = (tokens[:, :, None] == tokens[:, None]) & valid[:, :, None] & valid[:, None]
    earlier, later = np.tril(same, -1).any(2), np.triu(same, 1).any(2)
    return tuple(map(jnp.asarray, (tokens, lengths, earlier + 2 * later, valid)))


def loss(model, tokens, lengths, tags, valid):
    nats = optax.softmax_cross_entropy_with_integer_labels(model(tokens, lengths), tags)
    return jnp.sum(nats * valid) / jnp.sum(valid)  # padding does not count


@nnx.jit
def step(model, optimizer, *one_batch):
    nats, gradient = nnx.value_and_grad(loss)(model, *one_batch)
    optimizer.update(model, gradient)
    return nats


def main(steps=250):
    rng, model = np.random.default_rng(0), Tagger(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for _ in range(steps):
        step(model, optimizer, *batch(rng))
    tokens, lengths, tags, valid = batch(rng, 500)
    right = jnp.sum((jnp.argmax(model(tokens, lengths), -1) == tags) & valid) / jnp.sum(valid)
    print(f"{right:.1%} of the tags of unseen sequences are right")
    return float(right)


if __name__ == "__main__":
    main()
