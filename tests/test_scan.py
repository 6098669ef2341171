"""Every property of `linear_recurrence` over one table of solvers."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import mesh, needs_devices, spread

import ranjax
import ranjax.scan
from ranjax.kernels import reference
from ranjax.scan import SOLVERS

linear_recurrence = jax.jit(ranjax.linear_recurrence, static_argnames=("reverse", "solver"))  # one compilation a call
LENGTHS = (0, 1, 2, 3, 17, 255, 257, 1000)
ULPS = 64  # of the largest state: what reordering a sum of decaying terms may cost

solvers = pytest.mark.parametrize("solver", SOLVERS)
directions = pytest.mark.parametrize("reverse", [False, True])


def problem(batch=(2,), time=17, features=3, seed=0, dtype=np.float64, low=-1.0):
    rng = np.random.default_rng(seed)
    decay = rng.uniform(low, 1.0, (*batch, time, features)).astype(dtype)
    inputs = rng.normal(size=(*batch, time, features)).astype(dtype)
    return decay, inputs, rng.normal(size=(*batch, features)).astype(dtype)


def assert_close(states, expected, eps):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(states, expected, rtol=0, atol=ULPS * eps * max(1.0, np.abs(expected).max(initial=0)))


@solvers
@directions
@pytest.mark.parametrize("time", LENGTHS)
def test_equals_the_loop(solver, reverse, time, x64):
    decay, inputs, initial = problem(time=time)
    states = linear_recurrence(decay, inputs, initial, reverse=reverse, solver=solver)
    assert_close(states, oracle.recurrence(decay, inputs, initial, reverse), np.finfo(np.float64).eps)


@solvers
@given(seed=st.integers(0, 2**32 - 1), reverse=st.booleans(), low=st.sampled_from([-1.0, 0.0, 0.99]))
def test_equals_the_loop_in_float32(solver, seed, reverse, low):
    decay, inputs, initial = problem(time=100, seed=seed, dtype=np.float32, low=low)
    states = linear_recurrence(decay, inputs, initial, reverse=reverse, solver=solver)
    assert states.dtype == jnp.float32
    assert_close(states, oracle.recurrence(decay, inputs, initial, reverse), np.finfo(np.float32).eps)


@solvers
@settings(max_examples=4)  # each compiles three lengths
@given(cuts=st.tuples(*[st.integers(0, 40)] * 2).map(sorted), seed=st.integers(0, 2**32 - 1))
def test_split_at_two_points(solver, cuts, seed, x64):
    decay, inputs, initial = problem(time=40, seed=seed)
    parts, carry = [], initial
    for of in map(slice, [0, *cuts], [*cuts, 40]):
        parts.append(linear_recurrence(decay[:, of], inputs[:, of], carry, solver=solver))
        carry = parts[-1][:, -1] if parts[-1].size else carry
    whole = oracle.recurrence(decay, inputs, initial)
    assert_close(np.concatenate(parts, axis=1), whole, np.finfo(np.float64).eps)


@solvers
@directions
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_batch(solver, reverse, batch, x64):
    decay, inputs, initial = problem(batch)
    states = linear_recurrence(decay, inputs, initial, reverse=reverse, solver=solver)
    assert states.shape == inputs.shape
    assert_close(states, oracle.recurrence(decay, inputs, initial, reverse), np.finfo(np.float64).eps)


@solvers
@directions
def test_no_initial_state_is_zeros_exactly(solver, reverse):
    decay, inputs, initial = problem(dtype=np.float32)
    without = ranjax.linear_recurrence(decay, inputs, reverse=reverse, solver=solver)
    np.testing.assert_array_equal(
        without, ranjax.linear_recurrence(decay, inputs, 0 * initial, reverse=reverse, solver=solver)
    )


@pytest.mark.quick
@solvers
@directions
def test_derivatives(solver, reverse, x64):
    @jax.jit
    def solve(*arrays):
        return linear_recurrence(*arrays, reverse=reverse, solver=solver)

    order = 1 if solver == "pallas" else 2  # its second order takes long to compile; see `test_hessian`
    check_grads(solve, problem(time=7), order, modes=("fwd", "rev"))
    check_grads(solve, problem(time=1), order=1, modes=("fwd", "rev"))


@solvers
def test_hessian(solver, x64):
    """Forward over reverse mode, and forward over forward, of which `vmap` takes every direction at once."""
    decay, inputs, _ = problem((), time=7, features=1)

    def last(decay, solver):
        return jnp.sum(linear_recurrence(decay, inputs, solver=solver)[-1])

    of = {kind: jax.jit(kind(last), static_argnums=1) for kind in (jax.hessian, lambda f: jax.jacfwd(jax.jacfwd(f)))}
    forward_over_reverse, forward_twice = of.values()
    expected = forward_over_reverse(decay, "associative")
    assert_close(forward_over_reverse(decay, solver), expected, np.finfo(np.float64).eps)
    assert_close(forward_twice(decay, solver), expected, np.finfo(np.float64).eps)


@solvers
@directions
def test_gradient_equals_autodiff_of_the_unrolled_loop(solver, reverse, x64):
    @jax.jit
    def unrolled(decay, inputs, initial):
        h, states = initial, [None] * inputs.shape[-2]
        for t in reversed(range(len(states))) if reverse else range(len(states)):
            h = states[t] = decay[:, t] * h + inputs[:, t]
        return jnp.stack(states, axis=-2)

    @jax.jit
    def solve(*arrays):
        return linear_recurrence(*arrays, reverse=reverse, solver=solver)

    arrays = problem(time=30)
    weights = np.random.default_rng(1).normal(size=arrays[1].shape)
    expected = jax.grad(lambda *a: jnp.sum(weights * jnp.sin(unrolled(*a))), (0, 1, 2))(*arrays)
    for got, want in zip(jax.grad(lambda *a: jnp.sum(weights * jnp.sin(solve(*a))), (0, 1, 2))(*arrays), expected):
        assert_close(got, want, np.finfo(np.float64).eps)


@solvers
@directions
def test_vmap_over_any_array(solver, reverse, x64):
    def solve(*arrays):
        return linear_recurrence(*arrays, reverse=reverse, solver=solver)

    stacked = [np.stack([a, 2 * a - 1]) for a in problem(time=5)]
    gradient = jax.jit(jax.grad(lambda *a: solve(*a).sum(), (0, 1, 2)))
    for axes in [(0, 0, 0), (None, 0, None), (0, None, None), (None, None, 0)]:
        arrays = [a if axis == 0 else a[0] for a, axis in zip(stacked, axes)]
        mapped = jax.jit(jax.vmap(solve, axes))(*arrays)
        mapped_gradient = jax.jit(jax.vmap(gradient, axes))(*arrays)
        for n in range(2):
            row = [a[n] if axis == 0 else a for a, axis in zip(arrays, axes)]
            assert_close(mapped[n], oracle.recurrence(*row, reverse=reverse), np.finfo(np.float64).eps)
            for got, want in zip(mapped_gradient, gradient(*row)):
                assert_close(got[n], want, np.finfo(np.float64).eps)


@pytest.mark.quick
@solvers
def test_vmap_adds_no_loop(solver):
    arrays = problem((4, 2), dtype=np.float32)

    def loops(f, *arrays):
        return jax.jit(f).lower(*arrays).as_text().count("stablehlo.while")

    def solve(*arrays):
        return linear_recurrence(*arrays, solver=solver)

    assert loops(jax.vmap(solve), *arrays) == loops(solve, *arrays)


@pytest.mark.quick
@solvers
def test_compiles_once_per_shape(solver):
    solve = jax.jit(lambda *arrays: linear_recurrence(*arrays, solver=solver))
    for seed in range(3):
        solve(*problem(seed=seed, dtype=np.float32))
    assert solve._cache_size() == 1


@pytest.mark.quick
@solvers
def test_states_are_float32_or_wider(solver, x64):
    decay, inputs, initial = problem()
    for dtypes, expected in [
        (("bfloat16", "bfloat16", "bfloat16"), "float32"),
        (("float16", "bfloat16", "float32"), "float32"),
        (("float32", "float32", "float64"), "float64"),
        (("float64", "bfloat16", "float32"), "float64"),
    ]:
        arrays = [jnp.asarray(a, dtype) for a, dtype in zip((decay, inputs, initial), dtypes)]
        states = linear_recurrence(*arrays, solver=solver)
        assert states.dtype == expected
        assert_close(states, oracle.recurrence(*arrays), np.finfo(expected).eps)
        gradient = jax.grad(lambda *a: linear_recurrence(*a, solver=solver).sum(), (0, 1, 2))(*arrays)
        assert [str(g.dtype) for g in gradient] == list(dtypes)


@pytest.mark.parametrize(
    ("solver", "most", "odd"),
    [("auto", 1.1, 1.1), ("sequential", 1.1, 1.1), ("associative", 6, 6), ("chunked", 1.2, 3.2)],
)
def test_memory_of_the_gradient_does_not_grow_with_the_logarithm_of_the_length(solver, most, odd, patch):
    """Temporaries beside inputs, states and results, in arrays of their size; autodiff of a scan has 8 and more."""
    patch(reference, "CHUNK", 64)

    def temporaries(time):
        arrays = [jnp.asarray(a) for a in problem((2,), time, 8, dtype=np.float32)]
        gradient = jax.jit(lambda *a: jax.vjp(lambda *a: linear_recurrence(*a, solver=solver), *a)[1](a[1]))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / arrays[1].nbytes

    assert temporaries(4096) <= most
    assert temporaries(4095) <= odd


@pytest.mark.quick
def test_one_traced_program_serves_every_platform():
    traced = jax.jit(jax.grad(lambda *a: linear_recurrence(*a).sum(), (0, 1, 2))).trace(*problem(dtype=np.float32))
    lowered = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert "stablehlo.while" in lowered["cpu"]
    assert "stablehlo.while" in lowered["tpu"]
    assert "stablehlo.while" not in lowered["cuda"]


def test_auto_selects_the_kernel_on_supported_gpus(patch):
    def taken(capability):
        device = types.SimpleNamespace(**({"compute_capability": capability} if capability else {}))
        patch(jax, "local_devices", lambda: [device])
        gradient = jax.grad(lambda *a: ranjax.linear_recurrence(*a).sum())
        return "pallas_call" in str(jax.make_jaxpr(gradient)(*problem(dtype=np.float32)))

    assert not taken("9.0")
    patch(jax, "default_backend", lambda: "gpu")
    assert taken("9.0")
    assert taken("12.1")
    assert taken("8.0")
    assert not taken("7.5")
    assert not taken("gfx90a")
    assert not taken(None)
    patch(ranjax.scan, "find_spec", lambda name: None)  # a JAX without Triton
    assert not taken("9.0")
    with pytest.raises(
        ValueError, match=r"solver='pallas' needs `jax.experimental.pallas.triton`, which JAX .* not have"
    ):
        ranjax.linear_recurrence(*problem(dtype=np.float32), solver="pallas")


def test_inside_shard_map_the_kernel_needs_check_vma_off(patch):
    """The results of a kernel cannot be typed as varying over devices, as `check_vma` requires."""
    patch(ranjax.scan, "_has_gpu", lambda: True)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = problem((2,), dtype=np.float32)

    def program(check):
        specs = jax.sharding.PartitionSpec("batch")
        f = jax.shard_map(ranjax.linear_recurrence, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check)
        return str(jax.make_jaxpr(f)(*arrays))

    assert "pallas_call" in program(False)
    assert "pallas_call" not in program(True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"solver": "magic"}, ValueError, r"`solver` must be one of .*'sequential'.* got 'magic'"),
        ({"decay": np.ones((17, 3))}, ValueError, r"`decay` must have the shape of `inputs`.*broadcast_to"),
        ({"decay": np.ones(3), "inputs": np.ones(3)}, ValueError, r"`inputs` must have the axes.*\(3,\)"),
        ({"initial": np.ones((2, 4))}, ValueError, r"`initial` must be .* \(2, 3\); got \(2, 4\)"),
        (
            {"inputs": np.ones((2, 17, 3), int)},
            TypeError,
            r"`inputs` must be .* floating or complex dtype; got int.*astype",
        ),
        ({"decay": np.ones((2, 17, 3), bool)}, TypeError, r"`decay` must be .* floating or complex dtype; got bool"),
        ({"initial": np.ones((2, 3), int)}, TypeError, r"`initial` must be .* floating or complex dtype; got int"),
        (
            {"initial": np.ones((2, 3), complex), "solver": "pallas"},
            TypeError,
            r"`solver`='pallas' is for real arrays; got complex64\. Use solver='auto'",
        ),
    ],
)
def test_bad_input(change, kind, message):
    arguments = dict(zip(("decay", "inputs", "initial"), problem(dtype=np.float32))) | change
    solver = arguments.pop("solver", "auto")
    with pytest.raises(kind, match=message):
        linear_recurrence(**arguments, solver=solver)


@pytest.mark.parametrize("solver", ["sequential", "associative"])
def test_works_under_enable_checks(solver):
    decay, inputs, initial = map(jnp.asarray, problem(dtype=np.float32))
    f = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(linear_recurrence(*a, solver=solver))), (0, 1, 2))
    with jax.enable_checks(True):
        found = f(decay, inputs, initial)
    jax.tree.map(np.testing.assert_array_equal, found, f(decay, inputs, initial))


def test_chunked_has_more_loops_than_sequential():
    a = jnp.ones((1, 200, 2))
    loops = {
        solver: jax.jit(partial(ranjax.linear_recurrence, solver=solver)).lower(a, a).as_text().count("stablehlo.while")
        for solver in ("sequential", "chunked")
    }
    assert loops["sequential"] == 1 < loops["chunked"]


@pytest.mark.shipped
@directions
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_chunked_with_the_shipped_length(reverse, time, x64):
    assert reference.CHUNK == 64
    arrays = problem(time=time)
    solve = partial(ranjax.linear_recurrence, reverse=reverse, solver="chunked")
    assert_close(jax.jit(solve)(*arrays), oracle.recurrence(*arrays, reverse), np.finfo(np.float64).eps)
    gradients = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(*arrays)
        for f in (solve, partial(ranjax.linear_recurrence, reverse=reverse, solver="sequential"))
    )
    for got, want in zip(*gradients):
        assert_close(got, want, np.finfo(np.float64).eps)


@pytest.mark.shipped
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the choice for a CPU")
@pytest.mark.parametrize(
    ("shape", "chosen"),
    [((1, 4095, 16), "sequential"), ((1, 4096, 16), "chunked"), ((8, 4096, 200), "sequential")],
)
def test_on_a_cpu_long_sequences_of_small_rows_are_solved_in_chunks(shape, chosen):
    decay, inputs = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).random((2, *shape)))
    found = linear_recurrence(decay, inputs)
    np.testing.assert_array_equal(found, linear_recurrence(decay, inputs, solver=chosen))
    np.testing.assert_allclose(found, oracle.recurrence(decay, inputs), rtol=1e-5)


def complex_problem(time, batch=(2,), features=3):
    """Decays inside the unit circle, as those of an LRU."""
    rng = np.random.default_rng(time)
    shape = (*batch, time, features)
    decay = rng.uniform(0.7, 1, shape) * np.exp(1j * rng.uniform(-np.pi, np.pi, shape))
    inputs, initial = (rng.normal(size=s) + 1j * rng.normal(size=s) for s in (shape, (*batch, features)))
    return decay, inputs, initial


complex_solvers = pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "pallas"])


@complex_solvers
@directions
def test_complex_arrays_equal_the_loop(solver, reverse, x64, patch):
    patch(reference, "LONG", 200)
    for time in (1, 17, 257):
        decay, inputs, initial = complex_problem(time)
        states = ranjax.linear_recurrence(decay, inputs, initial, reverse=reverse, solver=solver)
        assert states.dtype == jnp.complex128
        np.testing.assert_allclose(states, oracle.recurrence(decay, inputs, initial, reverse), rtol=0, atol=1e-12)
        narrow = ranjax.linear_recurrence(decay.astype(np.complex64), inputs.real.astype(np.float32), solver=solver)
        assert narrow.dtype == jnp.complex64
        np.testing.assert_allclose(narrow, oracle.recurrence(decay, inputs.real), rtol=0, atol=1e-4)


@complex_solvers
def test_derivatives_of_complex_arrays(solver, x64):
    arrays = complex_problem(7, batch=())

    def parts(decay, inputs, initial):
        h = ranjax.linear_recurrence(decay, inputs, initial, solver=solver)
        return h.real, h.imag

    check_grads(jax.jit(parts), arrays, order=1, modes=("fwd", "rev"))

    def loss(solve):
        return jax.grad(lambda *a: jnp.sum(jnp.abs(solve(*a)) ** 2), (0, 1, 2))(*map(jnp.asarray, arrays))

    def loop(decay, inputs, initial):
        states = [initial]
        for a, b in zip(decay, inputs, strict=True):
            states.append(a * states[-1] + b)
        return jnp.stack(states[1:])

    found = loss(lambda *a: ranjax.linear_recurrence(*a, solver=solver))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), found, loss(loop))


@needs_devices
def test_complex_arrays_over_a_mesh(x64):
    decay, inputs, initial = complex_problem(16)
    solve = partial(ranjax.linear_recurrence, axis_name="time")
    over = spread(solve, mesh(time=8), (P(None, "time"), P(None, "time"), P()), P(None, "time"))
    np.testing.assert_allclose(over(decay, inputs, initial), oracle.recurrence(decay, inputs, initial), atol=1e-12)
