"""What a model takes, known before it exists."""

import re
import time

import jax
import jax.numpy as jnp
import pytest
from small_runs import settings

from ranjax.errors import UserError
from ranjax.training import size
from ranjax.training.config import Config
from ranjax.training.model import abstract_params, build_model
from ranjax.training.run import train
from ranjax.training.size import check_memory, check_step, parameter_count

SHAPES = [
    {"features": (5,)},
    {"features": (5,), "layers": 1, "embedding": 7},
    {"features": (5,), "layers": 4},
    {"features": (5, 3, 4), "embedding": 2},
    {"features": (5, 6, 7), "tie": True},
]
RAN = [{"gates": gates} for gates in ("recurrent", "diagonal", "input")]
RAN += [{"gates": gates, "projection": 3} for gates in ("recurrent", "input")]


RESIDUAL = [{"block": "residual"}, {"block": "residual", "conv_width": 1, "expansion": None, "gates": "input"}]
ADAPTIVE = [{"softmax": "adaptive", "cutoffs": (4,)}, {"softmax": "adaptive", "cutoffs": [2, 7]}]


@pytest.mark.parametrize("cell", [*RAN, {"cell": "lstm"}, {"cell": "gru"}, {"cell": "rnn"}, *RESIDUAL, *ADAPTIVE])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameters_are_counted_as_the_model_has_them(cell, shape):
    config = Config(**{"tie": False, **cell, **shape})
    params = abstract_params(build_model(config, 11))
    assert parameter_count(config, 11) == sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "options",
    [
        {"features": (2**31 - 1,)},
        {"features": (100_000, 100_000)},
        {"layers": 10**9},
        {"embedding": 2**31 - 1, "tie": False},
        {"features": (2**31 - 1,), "cell": "lstm"},
    ],
)
@pytest.mark.parametrize("free", [None, 10**9])
def test_a_model_that_no_memory_holds_is_refused_at_once(options, free, monkeypatch):
    monkeypatch.setattr(size, "free_memory", lambda device: free)
    began = time.monotonic()
    if free is None:
        options = options | {"features": (2**31 - 1,) * len(options.get("features", (1,)))}
    with pytest.raises(UserError, match=r"takes at least [\d,]+ MB of .*'s memory.*Lower --features, --embedding"):
        check_memory(Config(**options), 100, copies=4)
    assert time.monotonic() - began < 1


def test_the_copies_that_training_needs_are_counted(monkeypatch):
    config = Config(features=(8,))
    needed = 4 * parameter_count(config, 100)
    monkeypatch.setattr(size, "free_memory", lambda device: 3 * needed)
    check_memory(config, 100, copies=3)
    with pytest.raises(UserError, match=re.escape(f"of which {3 * needed / 1e6:,.0f} MB are free")):
        check_memory(config, 100, copies=4)


def test_what_a_step_takes_is_that_of_the_compiled_program(monkeypatch):
    def step(state, text):
        return state + jnp.sum(jnp.sin(jnp.outer(text, text)) @ jnp.outer(text, text)), text.sum()

    numbers = jax.ShapeDtypeStruct((1000,), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(jnp.zeros(500_000), numbers).compile()
    monkeypatch.setattr(size, "free_memory", lambda _: 10**9)
    said = check_step(compiled)
    found = re.fullmatch(r"a step takes (\d+) MB beside the (\d+) of its state and text; 1,000 MB are free", said)
    more, state = map(int, found.groups())
    assert 8 <= more <= 20  # at least two arrays of 4 MB
    assert state == 2
    monkeypatch.setattr(size, "free_memory", lambda _: None)
    assert "free" not in check_step(compiled)
    monkeypatch.setattr(size, "free_memory", lambda _: 10**6)
    with pytest.raises(UserError, match=r"a step takes .* 1 MB of .* memory are free\. Give --accumulate or --remat"):
        check_step(compiled)


def test_a_training_whose_step_does_not_fit_leaves_nothing(pets_text, tmp_path, monkeypatch):
    config = settings(pets_text, tmp_path / "run")
    monkeypatch.setattr(size, "free_memory", lambda _: 11_000)
    with pytest.raises(UserError, match=r"a step takes .* MB of .* memory are free"):
        train(config)
    assert not config.directory.exists()
