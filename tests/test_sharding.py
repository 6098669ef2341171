"""Sequences spread over the devices of a mesh give the states and gradients of whole ones. Eight CPU devices."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import BATCH, FEATURES, TIME, assert_close, drawn, layer_problem, mesh, needs_devices, spread

import ranjax
from ranjax import linear_recurrence
from ranjax.sharding import largest

pytestmark = needs_devices


@pytest.mark.quick
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_baselines_over_the_batch(x64, cell):
    model = ranjax.LanguageModel(11, cell=cell, features=FEATURES)
    tokens = np.random.default_rng(0).integers(0, 11, (BATCH, 7))
    params = model.init(jax.random.key(0), tokens, deterministic=True)["params"]

    def loss(params, tokens):
        return jnp.mean(jnp.sin(model.apply({"params": params}, tokens, deterministic=True)[0]))

    over = spread(lambda p, t: jax.lax.pmean(loss(p, t), "batch"), mesh(batch=2), (P(), P("batch")), P())
    assert_close(jax.grad(over)(params, tokens), jax.grad(loss)(params, tokens), 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("solver", ["sequential", "associative", "chunked", "auto"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrence_over_time_batch_and_features(x64, solver, reverse):
    arrays = drawn()
    axes = P("batch", "time", "features")
    function = partial(linear_recurrence, solver=solver, reverse=reverse, axis_name="time")
    over = spread(function, mesh(time=2, batch=2, features=2), (axes, axes, P("batch", "features")), axes)
    whole = jax.jit(partial(linear_recurrence, reverse=reverse))
    assert_close(over(*arrays), whole(*arrays))

    def derivatives(f):
        def loss(*arrays):
            return jnp.sum(jnp.sin(f(*arrays)))

        def second(*arrays):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(loss, (0, 1, 2))(*arrays))

        tangents = tuple(jnp.sin(3 * a) for a in arrays)
        return jax.grad(loss, (0, 1, 2))(*arrays), jax.jvp(f, arrays, tangents)[1], jax.grad(second, (0, 1, 2))(*arrays)

    assert_close(jax.jit(lambda: derivatives(over))(), jax.jit(lambda: derivatives(whole))())


def test_the_kernel_over_time(x64):
    """Interpreted; JAX has no types for what may differ between devices inside of kernels."""
    decay, inputs, initial = (a[:1, :16].astype(jnp.float32) for a in drawn())
    specs = (P(None, "time"), P(None, "time"), P())
    function = partial(linear_recurrence, solver="pallas", axis_name="time")
    over = jax.shard_map(function, mesh=mesh(time=2), in_specs=specs, out_specs=specs[0], check_vma=False)

    def both(f):
        states, chain = jax.vjp(f, decay, inputs, initial)
        return states, chain(jnp.cos(states))

    assert_close(jax.jit(lambda: both(over))(), jax.jit(lambda: both(linear_recurrence))(), 1e-5)


def test_one_exchange_for_any_number_of_devices(x64):
    """Two states per device are gathered once; nothing else of the sequence is exchanged."""
    decay, inputs, _ = drawn()
    for devices in (2, 8):
        over = spread(
            partial(linear_recurrence, axis_name="time"), mesh(time=devices), (P(None, "time"),) * 2, P(None, "time")
        )
        text = over.lower(decay, inputs).compile().as_text()
        found = re.findall(r"= [^=]*?\b(all-gather|all-reduce|collective-permute|all-to-all)\(", text)
        assert set(found) == {"all-gather"}
        assert len(found) <= 2


def test_batch_and_features_need_no_exchange(x64):
    """Without shard_map too: XLA splits a recurrence along them by itself."""
    decay, inputs, _ = drawn()
    devices = mesh(batch=4, features=2)
    on = NamedSharding(devices, P("batch", None, "features"))
    compiled = jax.jit(linear_recurrence, in_shardings=on, out_shardings=on).lower(decay, inputs).compile()
    assert not re.search(r"all-gather|all-reduce|collective-permute|all-to-all", compiled.as_text())
    placed = (jax.device_put(a, on) for a in (decay, inputs))
    assert_close(compiled(*placed), linear_recurrence(decay, inputs))


@pytest.mark.parametrize(
    ("gates", "projection", "masks"),
    [("input", None, True), ("diagonal", None, True), ("recurrent", None, True), ("recurrent", 4, False)],
)
def test_a_layer_over_time_and_batch(x64, gates, projection, masks):
    cell, params, x, c0 = layer_problem(gates, projection=projection)
    lengths, starts = (
        jnp.array([TIME, 7, 30, 0]),
        jnp.zeros((BATCH, TIME), bool).at[0, 20].set(True).at[2, 24].set(True),
    )
    masked = {"seq_lengths": lengths, "segment_starts": starts} if masks else {}

    def run(layer, params, x, c0, masked):
        return layer.apply({"params": {"cell": params}}, x, initial_carry=c0, **masked)

    axes = P("batch", "time")
    specs = {"seq_lengths": P("batch"), "segment_starts": axes} if masks else {}
    layer = ranjax.RAN(cell, return_carry=True, axis_name="time")
    over = spread(partial(run, layer), mesh(time=4, batch=2), (P(), axes, P("batch"), specs), (P("batch"), axes))
    whole = partial(run, ranjax.RAN(cell, "sequential", return_carry=True))
    assert_close(over(params, x, c0, masked), whole(params, x, c0, masked))

    def loss(f, params, x, c0):
        carry, h = f(params, x, c0, masked)
        return jnp.sum(jnp.sin(h)) + jnp.sum(carry**2)

    gradients = (jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(params, x, c0) for f in (over, whole))
    assert_close(*gradients, 1e-9)


@pytest.mark.parametrize("gates", [None, "recurrent", "diagonal", "input"])
def test_inputs_that_are_not_spread_are_refused(x64, gates):
    cell, _, x, _ = layer_problem(gates or "input")
    if gates is None:
        name, run = "`decay` or `inputs`", lambda x: linear_recurrence(x, x, axis_name="time")
    else:
        name, run = "The inputs", lambda x: ranjax.RAN(cell, axis_name="time").init_with_output(jax.random.key(0), x)[0]
    with pytest.raises(ValueError, match=f"^{name} must be spread over the mesh axis 'time' along time; got the same"):
        spread(run, mesh(time=2), P(), P(None, "time"))(x)


@pytest.mark.parametrize(("gates", "solver"), [(g, s) for g in ranjax.cell.GATES for s in ("auto", "sequential")])
def test_a_layer_over_the_batch_alone(x64, gates, solver):
    cell, params, x, c0 = layer_problem(gates)
    layer = ranjax.RAN(cell, solver)

    def run(params, x, c0):
        return layer.apply({"params": {"cell": params}}, x, initial_carry=c0)

    over = spread(run, mesh(batch=4), (P(), P("batch"), P("batch")), P("batch"))

    def both(f):
        h, chain = jax.vjp(f, params, x, c0)
        return h, chain(jnp.cos(h))

    assert_close(jax.jit(lambda: both(over))(), jax.jit(lambda: both(run))())


def test_overflowing_products_keep_a_zero_carry():
    """Products of decays that overflow leave a carry of 0 as it is."""
    inputs = jnp.zeros((1, 512, 1)).at[0, 500].set(1.0)
    over = spread(partial(linear_recurrence, axis_name="time"), mesh(time=8), P(None, "time"), P(None, "time"))
    assert_close(over(jnp.full((1, 512, 1), 10.0), inputs), linear_recurrence(jnp.full((1, 512, 1), 10.0), inputs), 0)


def test_a_language_model_over_time_and_batch(x64):
    options = {"vocabulary": 9, "features": 6, "dropout": 0.0}
    tokens = jax.random.randint(jax.random.key(0), (BATCH, TIME + 1), 0, 9)
    alone = ranjax.LanguageModel(**options)
    params = jax.jit(partial(alone.init, deterministic=True))(jax.random.key(1), tokens[:, :2])["params"]
    params = jax.tree.map(lambda p: 2 * p.astype(jnp.float64), params)
    state = tuple(jax.random.normal(jax.random.key(n), (BATCH, 6), jnp.float64) for n in range(2))

    def loss(model, reduce, params, state, inputs, targets):
        logits, state = model.apply({"params": params}, inputs, state, deterministic=True)
        return reduce(jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))), state

    axes = P("batch", "time")
    model = ranjax.LanguageModel(**options, axis_name="time")
    everywhere = partial(jax.lax.psum, axis_name=("time", "batch"))
    over = spread(
        partial(loss, model, everywhere), mesh(time=4, batch=2), (P(), P("batch"), axes, axes), (P(), P("batch"))
    )
    arguments = params, state, tokens[:, :-1], tokens[:, 1:]
    (found, carry), gradient = jax.jit(jax.value_and_grad(over, has_aux=True))(*arguments)
    whole = partial(loss, alone, lambda x: x)
    (expected, last), expected_gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(*arguments)
    assert_close((found, carry), (expected, last), 1e-9)
    assert_close(gradient, expected_gradient, 1e-8)


def test_across_two_processes(tmp_path):
    """Four devices in each of two processes: every process finds its part of the states and the gradients."""
    program = tmp_path / "part.py"
    program.write_text(
        "import sys\n"
        "from functools import partial\n"
        "import jax, jax.numpy as jnp, numpy as np\n"
        "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec as P\n"
        "from ranjax import RAN, RANCell, linear_recurrence\n"
        "assert jax.device_count() == 8 and jax.local_device_count() == 4\n"
        "mesh = jax.make_mesh((8,), ('time',), axis_types=(AxisType.Auto,))\n"
        "rng = np.random.default_rng(0)\n"
        "decay, inputs = (rng.uniform(size=(2, 64, 3)).astype(np.float32) for _ in range(2))\n"
        "weights = RAN(RANCell(3)).init(jax.random.key(0), inputs)\n"
        "def layer(inputs, weights, **options):\n"
        "    return RAN(RANCell(3), 'fixed_point', **options).apply(weights, inputs)\n"
        "def put(a, spec):\n"
        "    a = np.asarray(a)\n"
        "    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda index: a[index])\n"
        "for f, others, spec in ((linear_recurrence, decay, P(None, 'time')), (layer, weights, P())):\n"
        "    spread = jax.shard_map(partial(f, axis_name='time'), mesh=mesh, in_specs=(P(None, 'time'), spec),\n"
        "                           out_specs=P(None, 'time'))\n"
        "    loss = lambda f, *a: (jnp.sum(f(*a) ** 2), f(*a))\n"
        "    gradient = lambda f: jax.jit(jax.grad(partial(loss, f), (0, 1), has_aux=True))\n"
        "    found = gradient(spread)(put(inputs, P(None, 'time')), jax.tree.map(lambda a: put(a, spec), others))\n"
        "    expected = gradient(f)(inputs, others)\n"
        "    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):\n"
        "        for shard in a.addressable_shards:\n"
        "            np.testing.assert_allclose(shard.data, np.asarray(b)[shard.index], rtol=2e-5, atol=1e-5)\n"
        "print('same', len(a.addressable_shards))\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(rank)],
            env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.strip().splitlines()[-1:] for out, _ in said] == [["same 4"]] * 2, said


def test_options_without_all_steps_are_refused():
    with pytest.raises(
        ValueError, match=r"got 'sequential' with .* and axis_name='time', where no device has all steps"
    ):
        ranjax.RAN(ranjax.RANCell(4), "sequential", axis_name="time")
    with pytest.raises(ValueError, match="got 'pallas'"):
        ranjax.RAN(ranjax.RANCell(4, "diagonal"), "pallas", axis_name="time")
    with pytest.raises(ValueError, match="`axis_name` is an option of cell='ran'; got 'time' with cell='gru'"):
        ranjax.LanguageModel(5, "gru", axis_name="time")
    layer = ranjax.RAN(ranjax.RANCell(4, "input"), reverse=True, axis_name="time")
    with pytest.raises(ValueError, match="`reverse` needs all of the sequence"):
        layer.init(jax.random.key(0), jnp.zeros((2, 3, 4)))


def test_decay_or_inputs_alone_may_be_spread(x64):
    decay, inputs, _ = drawn()
    axes, function = P(None, "time"), partial(linear_recurrence, axis_name="time")
    over = spread(function, mesh(time=4), (P(), axes), axes)
    assert_close(over(decay[:, :12], inputs), linear_recurrence(jnp.tile(decay[:, :12], (1, 4, 1)), inputs))
    over = spread(function, mesh(time=4), (axes, P()), axes)
    assert_close(over(decay, inputs[:, :12]), linear_recurrence(decay, jnp.tile(inputs[:, :12], (1, 4, 1))))


@pytest.fixture(params=[jax.set_mesh, contextlib.nullcontext], ids=["set", "named by arrays"])
def explicit(request):
    """A mesh with explicit axes, JAX's default: set for the context, or named by the arrays only."""
    explicit = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with request.param(explicit):
        yield explicit


@pytest.mark.parametrize("solver", ["sequential", "chunked"])
def test_a_recurrence_on_an_explicit_mesh(x64, explicit, solver):
    decay, inputs, initial = (np.asarray(a) for a in drawn())
    solve = partial(linear_recurrence, solver=solver)
    expected = oracle.recurrence(decay, inputs, initial)
    assert_close(jax.jit(solve)(decay, inputs, initial), expected)  # arrays from elsewhere
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(solve(*a))), (0, 1)))
    arrays = [jax.device_put(a, NamedSharding(explicit, P("batch"))) for a in (decay, inputs)]
    assert jax.typeof(solve(*arrays)).sharding.spec[0] == "batch"
    assert_close(gradient(*arrays), gradient(decay, inputs))
    whole = jax.device_put(inputs, NamedSharding(explicit, P()))
    assert_close(solve(arrays[0], whole), solve(decay, inputs))


@pytest.mark.parametrize("manual", ["batch", "time"])
def test_a_mesh_with_explicit_axes_and_one_manual_axis(x64, manual):
    decay, inputs, _ = (np.asarray(a) for a in drawn())
    both = jax.make_mesh((2, 2), ("batch", "time"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    axis_name, spec = ("time", P(None, "time")) if manual == "time" else (None, P("batch"))
    with jax.set_mesh(both):
        solve = partial(linear_recurrence, axis_name=axis_name)
        over = jax.jit(jax.shard_map(solve, in_specs=spec, out_specs=spec, axis_names={manual}))
        arrays = [jax.device_put(a, NamedSharding(both, spec)) for a in (decay, inputs)]
        assert_close(over(*arrays), oracle.recurrence(decay, inputs))


def test_the_largest_of_nan_is_infinite():
    over = spread(lambda a: largest(jnp.max(a), "time"), mesh(time=2), P("time"), P())
    assert float(over(jnp.array([1.0, 2.0]))) == 2
    assert np.isinf(over(jnp.array([jnp.nan, 1.0])))


@pytest.mark.parametrize(
    ("gates", "solver"),
    [("recurrent", "auto"), ("recurrent", "fixed_point"), ("diagonal", "auto"), ("input", "auto")],
)
def test_a_layer_on_an_explicit_mesh(x64, explicit, gates, solver):
    params, x, _ = jax.tree.map(np.asarray, layer_problem(gates)[1:])
    layer = ranjax.RAN(ranjax.RANCell(FEATURES, gates, param_dtype=jnp.float64), solver)

    def loss(params, x):
        h = layer.apply({"params": {"cell": params}}, x)
        return jnp.sum(jnp.sin(h)), h

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, h), gradient = found(params, x)
    params, x = (jax.device_put(a, NamedSharding(explicit, spec)) for a, spec in ((params, P()), (x, P("batch"))))
    (_, spread_h), spread_gradient = found(params, x)
    solved, _ = ranjax.solve(params, x, gates=gates, solver=solver)
    parts = ranjax.weights.decompose(params, x, solver=solver)
    assert {jax.typeof(a).sharding.spec[0] for a in (spread_h, solved, *parts[:4])} == {"batch"}
    assert_close(spread_h, h, 1e-11)
    assert_close(np.tanh(solved), h, 1e-11)
    assert_close(parts.c, solved, 1e-11)
    assert_close(parts.i[:, 0] * parts.u[:, 0], parts.c[:, 0], 1e-11)
    assert_close(spread_gradient, gradient, 1e-9)


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gates": "input", "block": "residual"},
        {"cell": "lstm", "tie": False},
        {"gates": "diagonal", "softmax": "adaptive", "cutoffs": (4,)},
    ],
)
def test_a_language_model_on_an_explicit_mesh(options, explicit):
    """Tokens on a mesh as `jax.make_mesh` makes it: logits are sharded as they are."""
    model, tokens = ranjax.LanguageModel(11, features=FEATURES, **options), np.arange(4 * 7).reshape(4, 7) % 11
    params = model.init(jax.random.key(0), tokens, deterministic=True)["params"]

    def loss(params, tokens):
        logits, state = model.apply({"params": params}, tokens, deterministic=True)
        return jnp.mean(jnp.sin(logits)), (logits, state)

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = found(params, tokens)
    placed = (
        jax.device_put(params, NamedSharding(explicit, P())),
        jax.device_put(tokens, NamedSharding(explicit, P("batch"))),
    )
    (total, (logits, state)), gradient = found(*placed)
    assert {jax.typeof(a).sharding.spec[0] for a in (logits, *jax.tree.leaves(state))} == {"batch"}
    assert_close(((total, (logits, state)), gradient), expected, 1e-5)
