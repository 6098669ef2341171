"""Training spread over devices is training on one, but for rounding. Eight CPU devices."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import needs_devices
from small_runs import assert_same

from ranjax.errors import UserError
from ranjax.training.config import Config, check
from ranjax.training.mesh import described, make_mesh, put, put_text, shardings
from ranjax.training.metrics import WINDOW, make_evaluator
from ranjax.training.model import build_model
from ranjax.training.optimizer import make_optimizer
from ranjax.training.step import initial_state, make_step
from ranjax.training.windows import Steps

VOCABULARY, WINDOWS = 31, 16
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, (8, 200)).astype(np.int32)
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all)(?:-start)?\(")
BLOCK = {"block": "residual", "gates": "input"}


def settings(**options):
    config = Config(**{"features": (16,), "layers": 1, "batch_size": 8, "steps": 12} | options)
    check(config)
    return config


def begun(config):
    """A training at its beginning: its compiled steps, its state and its text, spread over the mesh of the settings."""
    mesh, model, optimizer = make_mesh(config), build_model(config, VOCABULARY), make_optimizer(config, WINDOWS)
    state = initial_state(model, optimizer, config)
    state, text = put(state, shardings(mesh, state)), put_text(mesh, TEXT)
    return Steps(make_step(model, optimizer, config, WINDOWS, mesh=mesh), state, text, config, WINDOWS), state, text


def losses(config, number=5):
    steps, state, text = begun(config)
    found = []
    for n in range(number):
        state = steps(state, text, n)
        found.append(float(state.loss))
    return np.array(found), state


@needs_devices
@pytest.mark.parametrize(
    ("options", "meshes"),
    [
        ({"vary_steps": 2}, ["data=8"]),
        ({}, ["data=2,model=4"]),
        (BLOCK, ["data=4", "model=2,data=1"]),
        (BLOCK | {"dropout": 0.0}, ["time=4,data=2"]),
        ({"cell": "lstm", "accumulate": 2}, ["data=4"]),
        ({"softmax": "adaptive", "cutoffs": (10, 20), "locked": True}, ["data=2,model=2"]),
        ({"dropout": 0.0, "remat": 3}, ["data=1,time=2"]),
    ],
)
def test_losses_are_those_of_one_device(options, meshes):
    """The order of batches and the masks of dropout do not depend on the mesh."""
    alone, one = losses(settings(mesh="data=1", **options))
    for mesh in meshes:
        found, state = losses(settings(mesh=mesh, **options))
        np.testing.assert_allclose(found, alone, rtol=1e-6)
        assert len(state.loss.devices()) == np.prod([int(n) for n in re.findall(r"\d+", mesh)])
        assert int(state.tokens) == int(one.tokens)


@needs_devices
@pytest.mark.quick
def test_one_device_is_bitwise_what_it_is_without_a_mesh():
    config = settings(mesh="data=1")
    model, optimizer = build_model(config, VOCABULARY), make_optimizer(config, WINDOWS)
    state, step = initial_state(model, optimizer, config), make_step(model, optimizer, config, WINDOWS)
    for _ in range(3):
        state = step(state, jnp.asarray(TEXT))
    assert_same(state, losses(config, 3)[1])


@needs_devices
@pytest.mark.quick
@pytest.mark.parametrize(
    "options", [{}, BLOCK, {"cell": "lstm"}, {"cell": "gru"}, {"softmax": "adaptive", "cutoffs": (10, 20)}]
)
def test_a_split_batch_sums_gradients_and_exchanges_nothing_else(options):
    """As many bytes as the parameters have, once, and a few numbers; no activation is gathered."""
    steps, state, _ = begun(settings(mesh="data=4", features=(64,), **options))
    found = COLLECTIVE.findall(steps.longest.as_text())
    assert {kind for _, kind in found} == {"all-reduce"}
    sizes = re.findall(r"\[([\d,]*)\]", " ".join(shapes for shapes, _ in found))
    numbers = sum(int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes)
    held = sum(p.size for p in jax.tree.leaves(state.params))
    assert held <= numbers <= 1.1 * held


@needs_devices
def test_split_parameters_are_a_share_of_the_memory():
    """With what the optimizer keeps of them; matrices, along their longest axis."""
    _, state, _ = begun(settings(mesh="data=1,model=4", features=(64,), **BLOCK))
    for tree in (state.params, state.optimizer):
        leaves = [a for a in jax.tree.leaves(tree) if a.ndim > 1]
        held = sum(a.addressable_shards[0].data.size for a in leaves)
        assert held < 0.3 * sum(a.size for a in leaves)


@needs_devices
@pytest.mark.parametrize(
    ("mesh", "streams", "options"),
    [("data=4", 1, {}), ("data=4", 4, {}), ("data=2,model=2", 2, {}), ("data=2", 2, BLOCK | {"solver": "pallas"})],
)
def test_evaluation_on_a_mesh(mesh, streams, options):
    config = settings(mesh=mesh, **options)
    model, mesh = build_model(config, VOCABULARY), make_mesh(config)
    params = initial_state(model, make_optimizer(config, WINDOWS), config).params
    ids = np.random.default_rng(1).integers(0, VOCABULARY, 5 * WINDOW)
    found = make_evaluator(model, streams, mesh=mesh)(params, ids)
    expected = make_evaluator(model, streams)(params, ids)
    assert found.tokens == expected.tokens
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)


@needs_devices
def test_the_batch_is_split_over_as_many_devices_as_divide_it():
    used = {batch: make_mesh(settings(mesh=None, batch_size=batch)).shape["data"] for batch in (1, 6, 8, 20)}
    assert used == {1: 1, 6: 6, 8: 8, 20: 5}
    assert make_mesh(settings(mesh="model=2", batch_size=20)).shape["data"] == 4
    assert make_mesh(settings(mesh=None, accumulate=2)).shape["data"] == 4
    mesh = make_mesh(settings(mesh="model=2", batch_size=20))
    assert described(mesh) == ["it runs on 8 of 8 devices: data 4, model 2"]


@needs_devices
@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        ("data=4,time=4", {"dropout": 0.0}, "--mesh data=4,time=4 takes 16 devices; there are 8. Give another one."),
        ("data=3", {"batch_size": 6}, "--mesh data=3 takes 3 devices; that must divide the 8 there are."),
    ],
)
def test_devices_that_are_not_there(mesh, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make_mesh(settings(mesh=mesh, **options))


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        ("rows=2", {}, "--mesh must be axes of data, model and time with their sizes, such as .*; got 'rows=2'"),
        ("data=2,data=2", {}, "--mesh must be axes"),
        ("data=3", {}, r"--mesh data=3: data must divide --batch-size / --accumulate, which is 8; got 3\."),
        ("data=8", {"accumulate": 2}, "data must divide --batch-size / --accumulate, which is 4; got 8"),
        ("model=3", {}, "model must divide --features, which is 16; got 3"),
        ("model=2", {"embedding": 7}, "model must divide --embedding, which is 7; got 2"),
        ("time=5", {"dropout": 0.0}, "time must divide --steps / --remat, which is 12; got 5"),
        ("time=2", {}, "time is split for --cell ran only, .* with all of these at 0: --dropout, "),
        ("time=2", {"dropout": 0.0, "cell": "lstm"}, "time is split for --cell ran only"),
        (
            "time=2",
            {"dropout": 0.0, "gates": "input", "solver": "pallas"},
            "without a split of model or --solver pallas",
        ),
    ],
)
def test_a_mesh_that_divides_nothing_is_refused(mesh, options, message):
    with pytest.raises(UserError, match=message):
        check(replace(settings(**options), mesh=mesh))
