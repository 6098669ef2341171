# %% [markdown]
# # Recurrent policies
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/ranjax/blob/main/notebooks/05_recurrent_policies.ipynb)
#
# Reinforcement learning with memory: episodes of different lengths in parallel environments, with resets in the
# middle of a rollout. The policy is trained on a corridor whose exit was announced at its entrance: from 50 % to
# nearly all exits right. You will see that acting step by step and learning over whole rollouts compute the same. One
# minute on two CPU cores. The outputs below are of a whole run on two CPU cores, which other programs shared: compare
# their times with each other, and only roughly.

# %%
# Installs ranjax where it is missing. A JAX that is there and new enough is kept as it is.
import importlib.util
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = "OWNER/ranjax"  # on GitHub
SHORT = os.environ.get("RANJAX_SHORT") == "1"  # small sizes, for the tests of this notebook
FLOORS = {"jax": (0, 7, 2), "jaxlib": (0, 7, 2), "flax": (0, 11, 2), "optax": (0, 2, 8), "numpy": (2, 1)}


def kept(name, floor):
    """The installed version of a package as a requirement, if it is new enough."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return []
    return [f"{name}=={found}"] if tuple(map(int, re.findall(r"\d+", found)[:3])) >= floor else []


if importlib.util.find_spec("ranjax") is None:
    checkout = Path("../pyproject.toml").exists()
    source = "..[train]" if checkout else f"ranjax[train] @ git+https://github.com/{REPOSITORY}"
    pins = [pin for name, floor in FLOORS.items() for pin in kept(name, floor)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source, *pins], check=True)
    importlib.invalidate_caches()

import jax

print(date.today(), "Python", platform.python_version(), *(f"{name} {version(name)}" for name in FLOORS))
print(jax.devices(), f"{os.cpu_count()} CPU cores")

# %% [markdown]
# ## The task
#
# At the first step of an episode a sign shows left or right; then come corridors without a sign, 5 to 9 steps; at the
# end the policy must turn the way that the sign said. The reward is 1 for the right turn. Without memory it is 0.5 on
# average.

# %%
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from ranjax import RAN, RANCell

ENVIRONMENTS, TIME, FEATURES, ACTIONS = (8, 20, 8, 2) if SHORT else (128, 64, 64, 2)


class Corridor(NamedTuple):
    """The state of one environment."""

    sign: jax.Array  # 0 left, 1 right
    left: jax.Array  # steps to the end
    first: jax.Array  # whether an episode begins


def begin(key):
    keys = jax.random.split(key)
    return Corridor(jax.random.randint(keys[0], (), 0, 2), jax.random.randint(keys[1], (), 5, 10), jnp.array(True))


def observe(state):
    """The sign at the first step only; whether this is the end."""
    sign = jnp.where(state.first, 2.0 * state.sign - 1, 0.0)
    return jnp.stack([sign, (state.left == 0).astype(jnp.float32), 1.0])


def act(key, state, action):
    """The next state and the reward; a new episode after the end."""
    ended = state.left == 0
    reward = jnp.where(ended & (action == state.sign), 1.0, 0.0)
    following = Corridor(state.sign, state.left - 1, jnp.array(False))
    return jax.tree.map(lambda new, old: jnp.where(ended, new, old), begin(key), following), reward, ended


# %% [markdown]
# ## The policy, twice with the same parameters
#
# Acting needs one step: the cell, whose carry is set to zeros where an episode begins. Learning sees the whole
# rollout: the layer, with `segment_starts`. The products with the observations are then computed for all steps at
# once, and the gradient of a weight is one product.


# %%
class Policy(nn.Module):
    """Logits of the actions and the value, of one step or of a rollout `(time, environments, observation)`."""

    @nn.compact
    def __call__(self, carry, observations, resets):
        cell = RANCell(FEATURES, parent=None)
        layer = RAN(cell, time_major=True, return_carry=True, name="layer")
        carry, h = layer(observations, initial_carry=carry, segment_starts=resets)
        return carry, nn.Dense(ACTIONS, name="logits")(h), nn.Dense(1, name="value")(h)[..., 0]


policy = Policy()
carry = jnp.zeros((ENVIRONMENTS, FEATURES))
states = jax.vmap(begin)(jax.random.split(jax.random.key(0), ENVIRONMENTS))
observations = jax.vmap(observe)(states)
variables = policy.init(jax.random.key(1), carry, observations[None], states.first[None])


def one_step(variables, carry, observation, first):
    """The same as the policy for one step, by the cell alone: no axis of time."""
    parameters = variables["params"]
    carry, h = RANCell(FEATURES).apply({"params": parameters["layer"]["cell"]}, carry * ~first[:, None], observation)
    logits = nn.Dense(ACTIONS).apply({"params": parameters["logits"]}, h)
    return carry, logits


@jax.jit
def rollout(key, variables, states, carry):
    """What all environments do in TIME steps, and where they are then."""

    def step(so_far, key):
        states, carry = so_far
        observation = jax.vmap(observe)(states)
        carry, logits = one_step(variables, carry, observation, states.first)
        keys = jax.random.split(key)
        action = jax.random.categorical(keys[0], logits)
        following, reward, ended = jax.vmap(act)(jax.random.split(keys[1], ENVIRONMENTS), states, action)
        return (following, carry), (observation, states.first, action, reward, ended, logits)

    return jax.lax.scan(step, (states, carry), jax.random.split(key, TIME))


with jax.default_matmul_precision("float32"):  # TPUs and GPUs round products otherwise
    _, (observations, resets, actions, _, _, acted) = rollout(jax.random.key(2), variables, states, carry)
    _, learned, _ = policy.apply(variables, carry, observations, resets)
print(
    int(resets.sum()),
    "episodes begin in",
    actions.shape,
    "steps; largest difference of logits:",
    float(jnp.abs(learned - acted).max()),
)
assert jnp.allclose(learned, acted, atol=1e-4)

# %% [markdown]
# ## Learning
#
# Policy gradients with a learned baseline. Each update is one rollout; the carry goes on from rollout to rollout, and
# the gradient reaches back to the beginning of the rollout.

# %%
import optax

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


def returns(rewards, ended):
    """The reward of the episode that each step belongs to, if it ends in this rollout."""

    def back(following, now):
        reward, end = now
        value = jnp.where(end, reward, 0.97 * following)
        return value, value

    return jax.lax.scan(back, jnp.zeros(rewards.shape[1:]), (rewards, ended), reverse=True)[1]


def loss(variables, carry, batch):
    observations, resets, actions, rewards, ended, _ = batch
    _, logits, values = policy.apply(variables, carry, observations, resets)
    complete = jnp.flip(jnp.cumsum(jnp.flip(ended, 0), 0), 0) > 0  # steps whose episode ends in this rollout
    target, log = returns(rewards, ended), jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log, actions[..., None], -1)[..., 0]
    advantage = jax.lax.stop_gradient(target - values)
    entropy = -jnp.sum(jnp.exp(log) * log, -1)
    each = -chosen * advantage + 0.5 * jnp.square(values - target) - 0.01 * entropy
    return jnp.sum(jnp.where(complete, each, 0)) / jnp.sum(complete)


@jax.jit
def update(key, variables, optimum, states, carry):
    (following, last), batch = rollout(key, variables, states, carry)
    gradient = jax.grad(loss)(variables, carry, batch)
    changes, optimum = optimizer.update(gradient, optimum, variables)
    _, _, _, rewards, ended, _ = batch
    return optax.apply_updates(variables, changes), optimum, following, last, rewards.sum() / ended.sum()


UPDATES = 5 if SHORT else 300
optimum, curve = optimizer.init(variables), []
for number in range(UPDATES):
    variables, optimum, states, carry, right = update(jax.random.key(10 + number), variables, optimum, states, carry)
    curve.append(float(right))
print(f"right turns: {sum(curve[:5]) / 5:.1%} at first, {sum(curve[-5:]) / 5:.1%} at the end")
assert SHORT or sum(curve[-5:]) / 5 > 0.9

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.8), dpi=80)
axes.plot(curve)
axes.axhline(0.5, color="0.7", linestyle="--")
axes.set(xlabel="update", ylabel="right turns", ylim=(0, 1.02))
figure.tight_layout()

# %% [markdown]
# ## The layer beside the usual pattern
#
# The gradient over a rollout by the cell in a scan, as policies are often written, and by the layer, which has one
# product with all observations and one for the gradient of each weight. Medians of alternating measurements. Which is
# faster depends on the size and the device: in the outputs below, on shared CPU cores and with only 3 observations, it
# is the scan. `examples/policy.py` is the same comparison at another size.

# %%
import time


@partial(nn.scan, variable_broadcast="params", split_rngs={"params": False})
class Scanned(nn.Module):
    @nn.compact
    def __call__(self, carry, step):
        observation, reset = step
        return RANCell(FEATURES, name="cell")(carry * ~reset[:, None], observation)


def by_scan(v):
    _, h = Scanned().apply({"params": v["params"]["layer"]}, carry, (observations, resets))
    return h


def by_layer(v):
    layer = RAN(RANCell(FEATURES), time_major=True)
    return layer.apply({"params": v["params"]["layer"]}, observations, initial_carry=carry, segment_starts=resets)


gradients = {
    name: jax.jit(jax.grad(lambda v, forward=forward: jnp.sum(forward(v) ** 2)))
    for name, forward in {"cell in a scan": by_scan, "layer": by_layer}.items()
}
times = {name: [] for name in gradients}
for number in range(4 if SHORT else 40):
    for name, gradient in gradients.items():
        start = time.perf_counter()
        jax.block_until_ready(gradient(variables))
        if number:  # the first compiles
            times[name].append(1000 * (time.perf_counter() - start))
for name, row in times.items():
    print(f"{name:16} {sorted(row)[len(row) // 2]:7.2f} ms a gradient, {TIME} steps, {ENVIRONMENTS} environments")

# %% [markdown]
# ## What the policy remembers
#
# The weight of the sign in the last state of an episode, averaged over the components. Nothing of an earlier episode
# is left.

# %%
from itertools import pairwise

from ranjax import weights

parts = weights.decompose(
    variables["params"]["layer"]["cell"], observations.swapaxes(0, 1), carry, segment_starts=resets.swapaxes(0, 1)
)
held = weights.reduced(parts, "max")[0]  # (time, time) of the first environment
starts = [int(t) for t in jnp.flatnonzero(resets[:, 0])]
for begun, end in list(pairwise(starts))[:4]:
    sign, earlier = float(held[end - 1, begun]), float(held[end - 1, :begun].max(initial=0))
    print(f"steps {begun} to {end - 1}: at the end the sign has a weight of {sign:.2f}, earlier episodes {earlier:.2f}")
    assert earlier == 0
