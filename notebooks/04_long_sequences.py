# %% [markdown]
# # Long sequences
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/ranjax/blob/main/notebooks/04_long_sequences.ipynb)
#
# A linear recurrence over up to a million steps: how long each solver takes against the length, how exact each is,
# and the same over several devices. On a CPU expect loops and chunks to be the fastest; on an accelerator look for a
# solver that is parallel over time. Two minutes on two CPU cores. The outputs below are of a whole run on two CPU
# cores, which other programs shared: compare their times with each other, and only roughly.

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
# ## Time against length
#
# h_t = a_t h_{t-1} + b_t with 16 features: the gradient of a sum over all states. Medians of three, compilation left
# out.

# %%
import time

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from ranjax import RAN, RANCell, linear_recurrence

FEATURES = 16
LENGTHS = [100, 1000] if SHORT else [10**3, 10**4, 10**5, 10**6]
SOLVERS = ["sequential", "associative", "chunked"]


def arrays(steps):
    """Decays that forget within some hundred steps, and inputs."""
    keys = jax.random.split(jax.random.key(steps))
    return 1 - 0.01 * jax.random.uniform(keys[0], (steps, FEATURES)), jax.random.normal(keys[1], (steps, FEATURES))


def gradient(solver):
    return jax.jit(jax.grad(lambda a, b: jnp.sum(linear_recurrence(a, b, solver=solver) ** 2), argnums=(0, 1)))


def median_ms(function, *args):
    """Of three calls after the first, which compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[1]


times = {solver: [median_ms(gradient(solver), *arrays(steps)) for steps in LENGTHS] for solver in SOLVERS}
print(f"{'ms of a gradient':16}", *(f"{steps:>12,}" for steps in LENGTHS), " steps")
for solver, row in times.items():
    print(f"{solver:16}", *(f"{value:12.2f}" for value in row))

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), dpi=80)
for solver, row in times.items():
    axes.loglog(LENGTHS, row, "o-", label=solver)
axes.set(xlabel="steps", ylabel="ms of a gradient", title=f"{FEATURES} features, {jax.devices()[0].device_kind}")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## How exact
#
# Against a loop of NumPy in float64, at the longest length: once with decays that forget, once with decays of 1,
# where every rounding error is kept. The sequential solver compensates its sums there.


# %%
def in_float64(a, b):
    states, h = np.empty(b.shape), np.zeros(b.shape[-1])
    for t, (a_t, b_t) in enumerate(zip(np.asarray(a, np.float64), np.asarray(b, np.float64))):
        h = a_t * h + b_t
        states[t] = h
    return states


a, b = arrays(LENGTHS[-1])
cases = {"forgetting": (a, b), "decay 1": (jnp.ones_like(a), jnp.abs(b))}
print(
    f"{'largest error':16}",
    *(f"{name:>14}" for name in cases),
    f"  relative to the largest state, {LENGTHS[-1]:,} steps",
)
expected = {name: in_float64(*case) for name, case in cases.items()}
for solver in SOLVERS:
    errors = []
    for name, case in cases.items():
        states = jax.jit(lambda a, b, solver=solver: linear_recurrence(a, b, solver=solver))(*case)
        errors.append(float(np.abs(np.asarray(states) - expected[name]).max() / np.abs(expected[name]).max()))
    print(f"{solver:16}", *(f"{error:14.1e}" for error in errors))
    assert max(errors) < 1e-3

# %% [markdown]
# ## Gates that read the output
#
# With `gates="input"` a layer is such a recurrence. With the paper's gates each step waits for the one before, or
# `solver="fixed_point"` iterates linear recurrences, a thousand steps at once. `Result` has the number of iterations.

# %%
import ranjax

STEPS = 64 if SHORT else 8192
x = jax.random.normal(jax.random.key(0), (1, STEPS, 64))
for name, layer in {
    "input gates": RAN(RANCell(64, gates="input")),
    "recurrent gates, sequential": RAN(RANCell(64)),
    "recurrent gates, fixed point": RAN(RANCell(64), solver="fixed_point"),
}.items():
    variables = layer.init(jax.random.key(1), x[:, :2])
    step = jax.jit(jax.grad(lambda v, layer=layer: jnp.sum(layer.apply(v, x) ** 2)))
    print(f"{name:30} {median_ms(step, variables):9.1f} ms a gradient of {STEPS:,} steps")
_, result = ranjax.solve(variables["params"]["cell"], x, gates="recurrent", solver="fixed_point")
print(result.message)

# %% [markdown]
# ## Time over several devices
#
# Inside `jax.shard_map` each device holds a part of the steps. Devices exchange two states each, whatever the length.
# The program is the same on one device, on the eight chips of a Kaggle TPU, or on virtual devices of a CPU
# (`XLA_FLAGS=--xla_force_host_platform_device_count=8`, set before JAX starts; their times say nothing, since they
# share the cores).

# %%
from functools import partial

from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((jax.device_count(),), ("time",), axis_types=(AxisType.Auto,))
steps = LENGTHS[-1] // jax.device_count() * jax.device_count()
a, b = (array[:steps] for array in arrays(LENGTHS[-1]))
whole = jax.jit(linear_recurrence)
over = jax.jit(
    jax.shard_map(partial(linear_recurrence, axis_name="time"), mesh=mesh, in_specs=P("time"), out_specs=P("time"))
)
difference = float(jnp.abs(over(a, b) - whole(a, b)).max() / jnp.abs(whole(a, b)).max())
print(f"devices: {jax.device_count()}, {steps // jax.device_count():,} steps each")
print(f"largest difference from one device, relative: {difference:.1e}")
print(f"one device {median_ms(whole, a, b):.1f} ms, all of them {median_ms(over, a, b):.1f} ms, forward")
assert difference < 1e-4

# %%
layer = RAN(RANCell(features=64, gates="input"), axis_name="time")
x = jax.random.normal(jax.random.key(2), (1, 64 * jax.device_count(), 32))
variables = RAN(RANCell(features=64, gates="input")).init(jax.random.key(3), x)
sharded = jax.shard_map(layer.apply, mesh=mesh, in_specs=(P(), P(None, "time")), out_specs=P(None, "time"))
with jax.default_matmul_precision("float32"):
    h, expected = jax.jit(sharded)(variables, x), RAN(RANCell(features=64, gates="input")).apply(variables, x)
print("a layer over time, largest difference:", float(jnp.abs(h - expected).max()))
assert jnp.allclose(h, expected, atol=1e-4)

# %% [markdown]
# What is exchanged, memory, and a plan for 64 devices and a million steps: `docs/scaling.md`.
