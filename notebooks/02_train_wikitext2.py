# %% [markdown]
# # Train on WikiText-2
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/ranjax/blob/main/notebooks/02_train_wikitext2.ipynb)
#
# A language model of residual blocks around RANs that one scan solves, trained for one epoch on WikiText-2 with a
# live curve, stopped, resumed, sampled, and compared with an LSTM of the same width. Expect test perplexities of some
# 181 and 211. The outputs below took some twenty minutes on two CPU cores that several other programs shared, half of
# what they can do or less; accelerators have not been timed. The full recipe, `python -m ranjax.train --dataset
# wikitext-2`, reaches 112.10 in 32 minutes.

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
# ## The settings
#
# WikiText-2 is read from the folder that `RANJAX_DATA` names, or downloaded. `ranjax.config.recipe` has the settings
# that the program takes for this data set; here the network is half as wide and sees the text once.

# %%
import shutil
from dataclasses import replace

from ranjax import config

DATA = os.environ.get("RANJAX_DATA")
RUNS = Path("runs/notebook-02")
shutil.rmtree(RUNS, ignore_errors=True)
settings = replace(
    config.recipe("wikitext-2"),
    data_dir=DATA,
    features=(128,),
    dropout=0.1,
    epochs=1,
    streams=8,
    out=str(RUNS / "ran"),
)
if SHORT:  # a small text
    small = {"data_dir": None, "features": (8,), "layers": 1, "cutoffs": (8,), "batch_size": 4, "steps": 7, "warmup": 2}
    settings = replace(settings, dataset="text.txt", tokenizer="word", **small)
changed = {name: value for name, value in vars(settings).items() if value != getattr(config.Config, name, None)}
print({name: value for name, value in changed.items() if name != "data_dir"})

# %% [markdown]
# ## Training with a live curve
#
# `ranjax.train.train` does what the program does. It runs in a thread here, so that this notebook can draw meanwhile;
# `Stop` is what Ctrl-C sets in a terminal.

# %%
import io
import json
import threading
import time
from contextlib import redirect_stdout, suppress

import matplotlib.pyplot as plt
from IPython.display import display

from ranjax.cli import Stop
from ranjax.train import train
from ranjax.training import report

report.LOG_SECONDS = 1.0 if SHORT else 4.0  # seconds between points of the curve


def points(out):
    """The rows that a run has logged so far."""
    path = Path(out) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def drawn(curves):
    figure, axes = plt.subplots(figsize=(6, 3), dpi=80)
    for name, out in curves.items():
        rows = points(out)
        axes.plot([row["epoch"] for row in rows], [row["train_perplexity"] for row in rows], label=name)
    axes.set(xlabel="epoch", ylabel="training perplexity so far", yscale="log")
    axes.legend(frameon=False)
    plt.close(figure)
    return figure


def watched(settings, curves, stop_at=None):
    """Trains in a thread and draws; with `stop_at` until that part of the epoch. Returns the result of a run's end."""
    stop, results = Stop(), []

    def work():
        with suppress(SystemExit):  # it was stopped, and has saved its state
            results.append(train(settings, stop=stop))

    worker, said = threading.Thread(target=work), io.StringIO()
    figure = display(drawn(curves), display_id=True)
    with redirect_stdout(said):  # the curve takes the place of a line for each of its points
        worker.start()
        while worker.is_alive():
            time.sleep(0.2 if SHORT else 4)
            figure.update(drawn(curves))
            rows = points(settings.out)
            if stop_at is not None and rows and rows[-1]["epoch"] >= stop_at:
                stop.ask(2)  # SIGINT
    figure.update(drawn(curves))
    print(*said.getvalue().splitlines()[-1:])
    return results[0] if results else None


curves = {"RAN, input gates, residual": settings.out}
result = watched(settings, curves, stop_at=0.3)
print("the run has ended" if result else f"stopped at epoch {points(settings.out)[-1]['epoch']:.2f}, saved")

# %% [markdown]
# ## Resuming
#
# The run goes on where it was stopped, to the same bits as one that was never stopped: parameters, optimiser, dropout
# and position in the text are saved.

# %%
if result is None:
    result = watched(replace(settings, resume=True), curves)
print(f"test perplexity {result['test_perplexity']:.2f}, {result['parameters']:,} parameters")
print(f"{result['training_seconds'] / 60:.1f} minutes of training, {result['tokens_per_second']:,.0f} tokens a second")

# %% [markdown]
# ## Text from the model

# %%
from ranjax import load_model
from ranjax.generate import Sampling, generate, prompt_ids

run = load_model(settings.out)
for temperature in (0.7, 1.0):
    ids = generate(
        run, prompt_ids(run.vocabulary, "the"), 20 if SHORT else 60, Sampling(temperature, top_p=0.95), seed=0
    )
    print(f"temperature {temperature}: the", run.vocabulary.decode(ids), "\n")

# %% [markdown]
# ## Beside an LSTM
#
# Two layers of an LSTM with as many features, on the same text, at the same learning rate and dropout. It has no
# blocks, and neither model's settings have been tuned here: what this compares is one epoch of each. Tuned
# comparisons are in `experiments/parity` and `experiments/on-par`.

# %%
other = replace(config.recipe("wikitext-2", cell="lstm"), block="plain", out=str(RUNS / "lstm"))
names = ["dataset", "data_dir", "tokenizer", "features", "layers", "dropout", "epochs", "streams", "cutoffs"]
names += ["batch_size", "steps", "warmup"]
other = replace(other, **{name: getattr(settings, name) for name in names})
curves["LSTM"] = other.out
lstm = watched(other, curves)

print(f"{'':28} {'test':>8} {'parameters':>12} {'minutes':>8} {'tokens/s':>9}")
for name, row in zip(curves, (result, lstm)):
    print(
        f"{name:28} {row['test_perplexity']:8.2f} {row['parameters']:12,} {row['training_seconds'] / 60:8.1f} "
        f"{row['tokens_per_second']:9,.0f}"
    )
print(result["device"], result["date"])

# %% [markdown]
# In a terminal the same is `python -m ranjax.train --dataset wikitext-2`, Ctrl-C, and `--resume`.
