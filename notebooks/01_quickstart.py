# %% [markdown]
# # Quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/ranjax/blob/main/notebooks/01_quickstart.ipynb)
#
# A recurrent additive network in place of an LSTM. You will see that a layer and its cell agree, that all solvers of
# a linear recurrence agree, and which of them is fastest on the device that you have. Two minutes on two CPU cores;
# most of the time is compilation, on an accelerator too. The outputs below are of a whole run on two CPU cores, which
# other programs shared: compare their times with each other, and only roughly.

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
# ## In place of an LSTM cell
#
# `RANCell` stands where `nn.LSTMCell` stood, and its carry is the one array c. `RAN` stands where `nn.RNN` stood: it
# has the same parameters and results, and computes the products with x for all steps at once.

# %%
import jax.numpy as jnp
from flax import linen as nn

from ranjax import RAN, RANCell

TIME = 64 if SHORT else 1024
x = jax.random.normal(jax.random.key(0), (8, TIME, 64))  # (batch, time, in)

lstm = nn.RNN(nn.LSTMCell(features=64))
ran = nn.RNN(RANCell(features=64))
fast = RAN(RANCell(features=64))

variables = ran.init(jax.random.key(1), x)
parameters = {
    "LSTM": sum(p.size for p in jax.tree.leaves(lstm.init(jax.random.key(1), x))),
    "RAN": sum(p.size for p in jax.tree.leaves(variables)),
}
print("parameters:", parameters)
with jax.default_matmul_precision("float32"):  # TPUs and GPUs round products otherwise
    h = fast.apply(variables, x)
    difference = float(jnp.abs(h - ran.apply(variables, x)).max())
print("outputs", h.shape, "largest difference between the cell in a loop and the layer:", difference)
assert difference < 1e-4

# %% [markdown]
# ## A deep network
#
# With gates that read the input only the recurrence is linear, and one scan solves it. In residual blocks such layers
# are as good as an LSTM on the texts that were compared.

# %%
from ranjax import ResidualBlock

network = nn.Sequential([ResidualBlock(RANCell(features=64, gates="input")) for _ in range(3)])
of_network = network.init(jax.random.key(2), x)
print(network.apply(of_network, x).shape)

# %% [markdown]
# ## Every state is a weighted sum
#
# The weights are those of the inputs in the last state. They are exact.

# %%
from ranjax import weights

with jax.default_matmul_precision("float32"):
    parts = weights.decompose(variables["params"]["cell"], x)
    w = weights.at(parts, TIME - 1)  # (batch, time, features)
    error = float(jnp.abs(jnp.sum(w * parts.u, axis=1) - parts.c[:, -1]).max())
print("largest difference between the weighted sum and the state:", error)
assert error < 1e-4

# %% [markdown]
# ## All solvers agree
#
# The recurrence h_t = a_t h_{t-1} + b_t can be solved by a loop, in parallel over time, or in chunks. States and
# gradients agree to rounding.

# %%
from ranjax import linear_recurrence

SOLVERS = ["sequential", "associative", "chunked"]
decay = jax.nn.sigmoid(jax.random.normal(jax.random.key(3), (8, TIME, 64)) + 2)
inputs = jax.random.normal(jax.random.key(4), decay.shape)


def loss(a, b, solver):
    return jnp.sum(jnp.sin(linear_recurrence(a, b, solver=solver)))


gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
expected = gradient(decay, inputs, "sequential")
for solver in SOLVERS[1:]:
    found = gradient(decay, inputs, solver)
    worst = max(float(jnp.abs(f - e).max() / jnp.abs(e).max()) for f, e in zip(found, expected))
    print(f"{solver:12} largest deviation of a gradient from the loop's, relative: {worst:.1e}")
    assert worst < 1e-4

# %% [markdown]
# ## Which solver is fastest here
#
# Medians of gradients, with `block_until_ready`, compilation left out. Other programs on the same machine change
# them.

# %%
import time


def milliseconds(function, *args, seconds=0.1 if SHORT else 1.5):
    """The median time of a call."""
    jax.block_until_ready(function(*args))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


shapes = [(4, 64, 32)] if SHORT else [(8, 1024, 512), (1, 65536, 64)]
table = {}
for shape in shapes:
    arrays = jax.nn.sigmoid(jax.random.normal(jax.random.key(5), shape)), jnp.ones(shape)
    for solver in ["auto", *SOLVERS]:
        table[shape, solver] = milliseconds(lambda a, b, solver=solver: gradient(a, b, solver), *arrays)

print(f"{'milliseconds of a gradient':30}", *(f"{shape!s:>16}" for shape in shapes))
for solver in ["auto", *SOLVERS]:
    print(f"{solver:30}", *(f"{table[shape, solver]:16.2f}" for shape in shapes))
print("fastest:", {shape: min(SOLVERS, key=lambda solver: table[shape, solver]) for shape in shapes})

# %% [markdown]
# ## And which layer
#
# The gradient of a layer by its gates and its solver, beside an LSTM of flax with as many features.

# %%
layers = {
    "LSTM (nn.RNN)": nn.RNN(nn.OptimizedLSTMCell(features=128)),
    "RAN, input gates": RAN(RANCell(features=128, gates="input")),
    "RAN, diagonal gates": RAN(RANCell(features=128, gates="diagonal")),
    "RAN, recurrent gates, sequential": RAN(RANCell(features=128)),
    "RAN, recurrent gates, fixed point": RAN(RANCell(features=128), solver="fixed_point"),
}
sequence = jax.random.normal(jax.random.key(6), (8, TIME, 128))
times = {}
for name, layer in layers.items():
    of_layer = layer.init(jax.random.key(7), sequence)
    step = jax.jit(jax.grad(lambda v, layer=layer: jnp.sum(layer.apply(v, sequence) ** 2)))
    times[name] = milliseconds(step, of_layer)
    print(f"{name:36} {times[name]:8.2f} ms, {times['LSTM (nn.RNN)'] / times[name]:5.2f} times the LSTM's speed")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.4), dpi=80)
axes.barh(list(times), list(times.values()), color="C0")
axes.invert_yaxis()
axes.set(xlabel=f"ms of a gradient, 8 x {TIME} x 128, {jax.devices()[0].device_kind}")
figure.tight_layout()

# %% [markdown]
# ## The kernel, on an accelerator
#
# `solver="pallas"` is one kernel. On NVIDIA GPUs `"auto"` selects it. On a TPU it has been tested by interpretation
# only: this cell tries it there, and nothing after it depends on it. On a CPU it is interpreted, so only a short
# sequence is tried.

# %%
few = (decay, inputs) if jax.default_backend() != "cpu" else (decay[:1, :16], inputs[:1, :16])
kernel = linear_recurrence(*few, solver="pallas")
print("largest deviation from the loop:", float(jnp.abs(kernel - linear_recurrence(*few, solver="sequential")).max()))
if jax.default_backend() != "cpu":
    for shape in shapes:
        arrays = jax.nn.sigmoid(jax.random.normal(jax.random.key(5), shape)), jnp.ones(shape)
        print(shape, f"{milliseconds(lambda a, b: gradient(a, b, 'pallas'), *arrays):.2f} ms a gradient by the kernel")

# %% [markdown]
# Next: train a language model on WikiText-2 (`02_train_wikitext2`), or see what a model remembers
# (`03_what_does_it_remember`).
