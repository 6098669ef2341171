# %% [markdown]
# # What does it remember?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/ranjax/blob/main/notebooks/03_what_does_it_remember.ipynb)
#
# Every state of a recurrent additive network is a weighted sum of what it has read. This notebook trains a small
# model on the documentation that every Python carries, to a test perplexity near 120, and then looks inside: the
# weights as a heat map, the half-lives of its components, the words that a prediction is due to, and the interactive
# page. Five minutes on two CPU cores, four of them training, with other programs beside it; accelerators have not
# been timed.

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
# ## A model
#
# A plain RAN with the paper's gates, which read the last output. Nothing is downloaded. Another version of Python has
# another text.

# %%
import shutil

from ranjax import load_model
from ranjax.train import Config, train

OUT = "runs/notebook-03"
shutil.rmtree(OUT, ignore_errors=True)
settings = {"features": (96,), "epochs": 2, "learning_rate": 4e-3, "schedule": "cosine", "streams": 8, "dropout": 0.1}
if SHORT:  # a small text
    settings |= {"dataset": "text.txt", "tokenizer": "bpe", "features": (8,), "epochs": 1, "batch_size": 4, "warmup": 2}
result = train(Config(out=OUT, **settings))
run = load_model(OUT)
print(f"test perplexity {result['test_perplexity']:.2f}")

# %% [markdown]
# ## The weights of a text
#
# `attribution.decompositions` returns gates, contents and states of each layer. The state of step $t$ is the sum over
# $j$ of the weight $w^t_j$ times the content $u_j$, in every component, exactly:

# %%
import jax.numpy as jnp

from ranjax import attribution, weights

TEXT = "Return the name of the file that is open, or None if there is no such"
if SHORT:
    TEXT = "the cat sat on the mat and a dog ran to the log"
ids = run.vocabulary.encode(TEXT)
words = [run.vocabulary.decode([i]) for i in ids]
with jax.default_matmul_precision("float32"):
    first, second = attribution.decompositions(run.model, run.params, ids)
sums = jnp.einsum("tjf,jf->tf", weights.full(first), first.u) + weights.carried(first) * first.c0
print(
    len(words),
    "tokens; largest difference between the weighted sums and the states:",
    float(jnp.abs(sums - first.c).max()),
)
assert jnp.allclose(sums, first.c, atol=1e-4)

# %% [markdown]
# ## A heat map
#
# Columns are the states as the text is read, rows the tokens that they hold: the L2 norm of the weights over the
# components. A row that stays dark is remembered; a column that begins a new dark row forgets what was before.

# %%
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

figure, panels = plt.subplots(1, 2, figsize=(11, 5.5), dpi=72)
for number, (axes, parts) in enumerate(zip(panels, (first, second)), 1):
    axes.imshow(weights.reduced(parts).T, cmap="Greys", norm=PowerNorm(0.5, vmin=0))
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(words)), words, fontsize=8, parse_math=False)
    axes.set(title=f"layer {number}", xlabel="the state at", ylabel="remembers")
figure.tight_layout()

# %% [markdown]
# ## The strongest sources
#
# `weights.top` finds them without all the weights, so it suits long texts.

# %%
strengths, steps = weights.top(second, k=3)
for t in range(0, len(words), 4):
    found = ", ".join(f"{words[j]!r} {s:.2f}" for s, j in zip(strengths[t].tolist(), steps[t].tolist()) if j >= 0)
    print(f"the state at {words[t]!r:12} holds {found}")

# %% [markdown]
# ## Half-lives
#
# After how many steps half of a weight is gone: the median of each component, over a part of the validation text.
# Most components forget within a step or two; a few carry the memory.

# %%
from ranjax import memory
from ranjax.evaluate import load_text

text = load_text(run, OUT, "valid")[: 300 if SHORT else 20_000]
most, window = (16, 64) if SHORT else (256, 2048)
layers = memory.memory(run.model, run.params, text, most=most, window=window)
figure, axes = plt.subplots(figsize=(6, 2.8), dpi=80)
for number, layer in enumerate(layers, 1):
    lives = layer.quantile(0.5)
    axes.step(sorted(lives), [n / len(lives) for n in range(1, len(lives) + 1)], where="post", label=f"layer {number}")
    print(f"layer {number}: {int((lives == 1).sum())} of {len(lives)} components at 1 step, longest {int(lives.max())}")
axes.set(xscale="log", xlabel="median half-life in steps", ylabel="share of components")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## Which words a prediction is due to
#
# The logit of a next token is a sum of one share for each token read, the biases, and nothing else. A weight is not
# such a share: it has no sign, and stops at the state.

# %%
logits, _ = run.model.apply({"params": run.params}, ids[None], deterministic=True)
target = int(jnp.argmax(logits[0, -1]))
shares = attribution.shares(run.model, run.params, ids, target=target, step=len(ids) - 1)
print("the likeliest next token:", repr(run.vocabulary.decode([target])))
print(f"its logit {float(shares.total):.3f} = biases {float(shares.bias):+.3f} and the bars, summed")
with jax.default_matmul_precision("float32"):
    again, _ = run.model.apply({"params": run.params}, ids[None], deterministic=True)
    assert (
        abs(float(attribution.shares(run.model, run.params, ids, target, len(ids) - 1).total - again[0, -1, target]))
        < 1e-3
    )

integrated = attribution.integrated_gradients(run.model, run.params, ids, target=target, step=len(ids) - 1)
figure, axes = plt.subplots(figsize=(9, 2.8), dpi=72)
places = jnp.arange(len(words))
axes.bar(places - 0.2, shares.words, 0.4, label="shares (gates held)")
axes.bar(places + 0.2, integrated.words, 0.4, label="integrated gradients (gates, too)")
axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8, parse_math=False)
axes.set(ylabel="of the logit")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## The page
#
# What `python -m ranjax.explain --checkpoint DIR --text "..." --out page.html` writes, inside the notebook. Point at
# a word.

# %%
import html

from IPython.display import display

from ranjax.explain import explain
from ranjax.interpret.render import write_page

PAGE = Path(OUT, "page.html")
write_page(explain(run, TEXT), 2, PAGE)
page = html.escape(PAGE.read_text("utf-8"))
frame = f'<iframe srcdoc="{page}" width="100%" height="620" style="border: 0"></iframe>'
display({"text/html": frame}, raw=True)
