"""The next sample of four channels of an electroencephalogram, from the file that matplotlib ships.

python examples/forecast.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.cbook import get_sample_data

from ranjax import RANCell, ResidualBlock

TRAINED, WINDOW, FEATURES = 600, 50, 8  # samples, of 800


class Forecaster(nn.Module):
    @nn.compact
    def __call__(self, samples):
        """The change to the next sample, from those up to each."""
        x = nn.Dense(FEATURES)(jnp.diff(samples, axis=1, prepend=samples[:, :1]))
        x = ResidualBlock(RANCell(FEATURES, gates="input", activation="identity"))(x)
        return nn.Dense(samples.shape[-1])(x)


def error(model, variables, windows):
    """Mean squared error of the next sample; all but the last are read."""
    predicted = windows[:, :-1] + model.apply(variables, windows[:, :-1])
    return jnp.mean(jnp.square(predicted - windows[:, 1:])[:, 10:])  # once some samples are read


def main(steps=300):
    with get_sample_data("eeg.dat") as file:
        samples = np.frombuffer(file.read(), "<f8").reshape(-1, 4)
    samples = (samples - samples[:TRAINED].mean(0)) / samples[:TRAINED].std(0)
    windows = np.stack([samples[n : n + WINDOW] for n in range(len(samples) - WINDOW + 1)]).astype(np.float32)
    train, test = windows[: TRAINED - WINDOW + 1], windows[TRAINED:]
    model, optimizer = Forecaster(), optax.adamw(1e-3, weight_decay=0.3)
    variables = model.init(jax.random.key(0), train[:1])
    state, rng = optimizer.init(variables), np.random.default_rng(0)

    @jax.jit
    def step(variables, state, batch):
        updates, state = optimizer.update(jax.grad(lambda v: error(model, v, batch))(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    for _ in range(steps):
        variables, state = step(variables, state, train[rng.integers(0, len(train), 32)])
    same = float(np.mean(np.square(np.diff(test, axis=1))[:, 10:]))
    found = float(error(model, variables, test))
    print(f"mean squared error on unseen samples: {found:.3f}; of the sample before: {same:.3f}")
    return found, same


if __name__ == "__main__":
    main()
