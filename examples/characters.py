"""A model of characters in 40 lines, with `linear_recurrence` alone: no Flax, a dictionary of parameters.

python examples/characters.py
"""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ranjax import linear_recurrence

TEXT = "\n".join(topics.values())[:40_000]  # Python's own documentation
CHARACTERS, SIZE = sorted(set(TEXT)), 64


def init(key):
    shapes = {"embed": (len(CHARACTERS), SIZE), "content": (SIZE, SIZE), "gates": (SIZE, 2 * SIZE)}
    shapes |= {"out": (SIZE, len(CHARACTERS))}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def logits(params, ids, state=None):
    x = params["embed"][ids]
    i, f = jnp.split(jax.nn.sigmoid(x @ params["gates"]), 2, axis=-1)
    c = linear_recurrence(f, i * (x @ params["content"]), state)  # c_t = f_t * c_{t-1} + i_t * u_t
    return jnp.tanh(c) @ params["out"], c[..., -1, :]


@jax.jit
@jax.value_and_grad
def loss(params, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, ids[:, :-1])[0], ids[:, 1:]).mean()


def main(steps=200):
    ids = np.array([CHARACTERS.index(c) for c in TEXT], np.int32)
    windows, params, optimizer = (
        ids[: len(ids) // 101 * 101].reshape(-1, 101),
        init(jax.random.key(0)),
        optax.adam(1e-2),
    )
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        nats, gradient = loss(params, windows[rng.integers(0, len(windows), 32)])
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
    print(f"{nats:.2f} nats per character")
    return float(nats)


if __name__ == "__main__":
    main()
