"""Gates on h_{t-1} solved for all steps at once: the sequential answer and its gradient, or a reported fall-back."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

import ranjax
from ranjax import RAN, FixedPoint, LanguageModel, RANCell
from ranjax.solvers import adjoint as jacobian
from ranjax.solvers import recurrent
from ranjax.cell import content, gates_of_input, gates_of_state
from ranjax.solvers.fixed_point import averaged, iterate, relative
from ranjax.solvers.masks import Steps

FEATURES = 8
IDENTITY = {"activation": "identity"}


def problem(time=40, batch=2, scale=1.0, dtype=jnp.float64, **options):
    """Parameters, inputs and a first state; `scale` is of the weights on h."""
    cell = RANCell(FEATURES, param_dtype=dtype, **options)
    rng = np.random.default_rng(time)
    x = jnp.asarray(rng.normal(size=(batch, time, 5)), dtype)
    c0 = jnp.asarray(rng.normal(size=(batch, FEATURES)), dtype)
    params = cell.init(jax.random.key(0), c0, jnp.zeros((batch, 5), dtype))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jnp.asarray(rng.normal(size=p.shape), dtype), params)
    params["gates"]["recurrent_kernel"] *= scale
    return params, x, c0


def solve(*arrays, solver="fixed_point", activation="tanh"):
    return ranjax.solve(*arrays, gates="recurrent", activation=activation, solver=solver)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("time", "options", "solver"),
    [
        *(
            (*case, FixedPoint(splitting))
            for splitting in ("diagonal", "frozen")
            for case in (
                (0, {}),
                (1, {}),
                (3, {"activation": "identity"}),
                (40, {"projection": 3}),
                (257, {}),
                (257, {"activation": "identity"}),
            )
        ),
        (40, {"projection": 3}, FixedPoint(window=12)),
        (257, {}, FixedPoint(window=12)),
    ],
    ids=str,
)
def test_equals_the_equations(time, options, solver, x64):
    params, x, c0 = problem(time, **options)
    activation = options.get("activation", "tanh")
    states, record = solve(params, x, c0, solver=solver, activation=activation)
    assert bool(record.converged)
    assert int(record.iterations) <= time + 1
    if time:
        expected, _ = oracle.ran(params, x, c0, activation)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_as_many_passes_as_steps_suffice(x64):
    """And one that finds it: with weights that make a chaos of it, too, where nearly as many are needed."""
    _, record = solve(*problem(64, scale=16), solver=FixedPoint(max_iterations=65))
    assert bool(record.converged)
    assert int(record.iterations) > 40


@pytest.mark.parametrize(("scale", "time"), [(1, 2048), (2, 2048), (4, 512), (16, 2048)])
def test_never_a_wrong_answer_in_silence(scale, time, x64):
    """Weights on h far above those of a trained model: the states may be chaotic, and the passes fail."""
    params, x, c0 = problem(time, scale=scale)
    states, record = jax.jit(solve)(params, x, c0)
    expected, _ = oracle.ran(params, x, c0, "tanh")
    turned = {
        **params,
        "gates": {**params["gates"], "recurrent_kernel": params["gates"]["recurrent_kernel"] * (1 + 2e-16)},
    }
    rounding = np.abs(oracle.ran(turned, x, c0, "tanh")[0] - expected).max()
    assert np.abs(states - expected).max() <= max(1e-10, 100 * rounding)
    before = jnp.concatenate([c0[:, None], states[:, :-1]], axis=1)
    step = jax.vmap(lambda c, x: ranjax.cell.step(params, c, x), (1, 1), 1)
    assert float(jnp.abs(step(before, x) - states).max()) <= 1e-12
    assert bool(record.converged) == (scale <= 2)


@pytest.mark.parametrize(
    ("part", "recurrence"), [("sequence", "auto"), ("segment", "associative"), ("spike", "chunked"), ("spike", "auto")]
)
def test_every_step_by_its_own_measure(part, recurrence):
    """States and gradients of a small sequence beside a large one, of a small segment after one, after one input."""
    cell, rng = RANCell(FEATURES), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 100, 5)), jnp.float32)
    starts, loud = jnp.zeros((2, 100), bool), np.zeros((2, 100), bool)
    if part == "sequence":
        loud[0] = True
    else:
        loud[:, : 50 if part == "segment" else 1] = True
        starts = starts.at[:, 50].set(part == "segment")
    quiet = ~loud & (np.arange(100) >= 50)
    x, weight = jnp.where(loud[..., None], 1e6 * x, x), jnp.where(loud, 1e3, 1.0)[..., None]
    variables = RAN(cell).init(jax.random.key(0), x)
    variables["params"]["cell"]["gates"]["recurrent_kernel"] *= 2

    @partial(jax.jit, static_argnums=0)
    def of(solver):
        def weighed(x):
            h = RAN(cell, solver).apply(variables, x, segment_starts=starts)
            return jnp.sum(weight * h), h

        return jax.grad(weighed, has_aux=True)(x)

    solver = FixedPoint(recurrence=recurrence, on_failure="nan")
    for got, expected in zip(of(solver), of("sequential"), strict=True):
        np.testing.assert_allclose(got[quiet], expected[quiet], rtol=0, atol=3e-5 * np.abs(expected[quiet]).max())


def test_a_gradient_of_the_last_state_alone_converges():
    """Of its cotangents all but the last few have faded, and need no digits of their own."""
    params, x, c0 = problem(1000, dtype=jnp.float32)

    def last(x):
        return jnp.sum(solve(params, x, c0, solver=FixedPoint(on_failure="nan", max_iterations=40))[0][:, -1] ** 2)

    assert bool(jnp.all(jnp.isfinite(jax.jit(jax.grad(last))(x))))


def products(jaxpr, inside=()):
    """The matrix products of a program: what they lie in, their precision, the shapes of their factors."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield inside, equation.params["precision"], {factor.aval.shape for factor in equation.invars}
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner, (*inside, equation.primitive.name))


def test_only_the_first_passes_may_be_rough():
    """On a GPU or TPU; neither the gradient nor the walk in place of passes that failed."""
    arrays = problem(6, dtype=jnp.float32)
    kernel = arrays[0]["gates"]["recurrent_kernel"].shape
    exact, rough = ((precision, precision) for precision in (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT))

    def found(**settings):
        solver = FixedPoint(precision="default", **settings)
        program = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(solve(*a, solver=solver)[0]), (0, 1, 2)))(*arrays)
        return list(products(program.jaxpr))

    with_weights = [kind for _, kind, factors in found(window=3) if kernel in factors]  # from window to window too
    assert with_weights.count(rough) == 1
    assert set(with_weights) == {exact, rough}
    of = [(inside, kind) for inside, kind, _ in found() if {"while", "cond"} & set(inside)]
    assert [inside for inside, kind in of if kind == rough] == [("custom_jvp_call", "while")]
    assert {inside for inside, kind in of if kind == exact} == {
        (rule, *loop) for rule in ("custom_jvp_call", "custom_linear_solve") for loop in (("while",), ("cond", "scan"))
    }
    assert all(kind in (exact, rough) for _, kind in of)


@pytest.mark.parametrize("splitting", ["diagonal", "frozen"])
def test_with_one_feature_the_diagonal_is_the_jacobian(splitting, x64):
    """So the iteration is Newton's, forwards and in reverse: a few passes, where frozen gates take many."""
    cell = RANCell(1, param_dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 400, 3)))
    params = cell.init(jax.random.key(1), jnp.zeros((1, 1)), x[:, 0])["params"]
    params["gates"] |= {"bias": jnp.array([[0.0], [1.0]]), "recurrent_kernel": jnp.full((1, 2, 1), 0.3)}
    solver = FixedPoint(splitting, max_iterations=8, on_failure="nan")
    gradient = jax.grad(lambda x: jnp.sum(solve(params, x, solver=solver)[0] ** 2))(x)
    assert bool(jnp.all(jnp.isfinite(gradient))) == (splitting == "diagonal")
    reverse = FixedPoint(splitting, max_iterations=8, on_failure="nan", rtol=0.5)  # so that only the gradient can fail
    gradient = jax.grad(lambda x: jnp.sum(solve(params, x, solver=reverse)[0] ** 2))(x)
    assert bool(jnp.all(jnp.isfinite(gradient))) == (splitting == "diagonal")


@pytest.mark.parametrize("options", [{}, {"projection": 3}], ids=str)
def test_the_splitting_is_the_diagonal_of_the_jacobian(options, x64):
    params, x, c0 = problem(1, batch=1, **options)
    c0 = 0.1 * c0
    steps = Steps(content(params, x), gates_of_input(params, x))
    z = steps.z + gates_of_state(params, c0, "tanh")[:, None]
    gates = jax.nn.sigmoid(z)
    jacobians = jacobian.jacobians_of(steps, c0[:, None], gates, "tanh")
    found = jacobian.clipped(jacobians, jacobian.diagonal(params))[0, 0]
    full = jax.jacfwd(lambda c: ranjax.cell.step(params, c, x[0, 0]))(c0[0])
    np.testing.assert_allclose(found, np.clip(np.diag(full), -1, 1), atol=1e-13)


def test_float32_equals_the_walk_to_rounding():
    arrays = problem(300, dtype=jnp.float32)
    states, record = solve(*arrays)
    expected, _ = solve(*arrays, solver="sequential")
    assert bool(record.converged)
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("options", [{}, {"activation": "identity", "projection": 3}], ids=str)
@pytest.mark.parametrize("splitting", ["diagonal", "frozen"])
def test_gradients_equal_autodiff_of_the_walk(options, splitting, x64):
    arrays = problem(60, **options)

    def loss(solver):
        def of(*arrays):
            states, _ = solve(*arrays, solver=solver, activation=options.get("activation", "tanh"))
            return jnp.sum(jnp.sin(states) * jnp.arange(60.0)[None, :, None])

        return jax.jit(jax.grad(of, (0, 1, 2)))

    def plain(params, x, c0):  # no derivative rule of ours
        def walk(c, x):
            c = ranjax.cell.step(params, c, x, options.get("activation", "tanh"))
            return c, c

        states = jnp.swapaxes(jax.lax.scan(walk, c0, jnp.swapaxes(x, 0, 1))[1], 0, 1)
        return jnp.sum(jnp.sin(states) * jnp.arange(60.0)[None, :, None])

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(*arrays)
    failing = FixedPoint(splitting, max_iterations=2)
    window = 25 if splitting == "frozen" else None
    for solver in ("sequential", FixedPoint(splitting, window=window, on_failure="nan"), failing):
        got = loss(solver)(*arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(1, np.abs(b).max()))


def test_second_derivatives(x64):
    arrays = problem(4, batch=1)
    check_grads(jax.jit(lambda *a: solve(*a)[0]), arrays, order=2, modes=("rev",))

    def by(solver):  # the Hessian times a vector
        gradient = jax.grad(lambda c0: jnp.sum(jnp.sin(solve(*arrays[:2], c0, solver=solver)[0])))
        return jax.jit(lambda c0: jax.jvp(gradient, (c0,), (jnp.cos(c0),)))(arrays[2])

    np.testing.assert_allclose(by(FixedPoint(window=3)), by("sequential"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("on_failure", ["sequential", "nan", "ignore"])
def test_what_stands_for_a_failure(on_failure, x64):
    arrays = problem()
    states, record = solve(*arrays, solver=FixedPoint(max_iterations=3, on_failure=on_failure))
    expected, _ = solve(*arrays, solver="sequential")
    assert int(record.iterations) == 3
    assert not bool(record.converged)
    assert float(record.residual) > 1e-9
    if on_failure == "sequential":
        np.testing.assert_array_equal(states, expected)
    elif on_failure == "nan":
        assert bool(jnp.all(jnp.isnan(states)))
    else:
        np.testing.assert_allclose(states[:, :3], expected[:, :3], atol=1e-14)  # a step is made exact by each pass
        assert float(jnp.abs(states - expected).max()) > 1e-9


def test_nan_ends_the_passes_at_once(x64):
    params, x, c0 = problem()
    _, record = solve(params, x.at[0, 5].set(jnp.nan), c0)
    assert int(record.iterations) == 1
    assert not bool(record.converged)


def test_a_looser_tolerance_takes_fewer_passes(x64):
    arrays = problem(256)
    loose, tight = (solve(*arrays, solver=FixedPoint(rtol=rtol))[1] for rtol in (1e-3, 1e-12))
    assert 1 < int(loose.iterations) < int(tight.iterations)
    assert float(loose.residual) <= 1e-3


def test_rough_products_first(x64):
    """The record goes on where the rough passes end; on a CPU their products are exact."""
    arrays = problem()
    states, record = solve(*arrays, solver=FixedPoint(precision="default"))
    expected, exact = solve(*arrays)
    np.testing.assert_allclose(states, expected, atol=1e-13)
    assert int(record.iterations) == int(exact.iterations) + 1  # the pass that ends the rough ones is made again


@pytest.mark.parametrize("recurrence", ["associative", "chunked"])
def test_any_solver_of_the_linear_recurrences(recurrence, x64):
    arrays = problem(130)
    states, _ = solve(*arrays, solver=FixedPoint(recurrence=recurrence, on_failure="nan"))
    np.testing.assert_allclose(states, solve(*arrays, solver="sequential")[0], atol=1e-12)


@pytest.mark.parametrize("most", [2, 100])
def test_narrow_parameters_are_multiplied_in_the_dtype_of_the_states(most):
    """Whether the passes fail does not choose the function."""
    params, x, c0 = problem(30, dtype=jnp.float32)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    u, z = content(wide, x), gates_of_input(wide, x)
    steps = Steps(jnp.swapaxes(u, 0, 1), jnp.swapaxes(z, 0, 1))
    solver = FixedPoint(max_iterations=most)
    got, expected = (recurrent.recurrent_states(p, steps, c0, "tanh", jacobian.Way(solver))[0] for p in (narrow, wide))
    np.testing.assert_array_equal(got, expected)


def test_iterate_returns_what_its_record_tells():
    x, record = iterate(lambda x: (x / 2, jnp.max(x)), jnp.ones((1, 1)), 0.1, most=20)
    assert (float(x[0, 0]), int(record.iterations), float(record.residual)) == (0.0625, 5, 0.0625)


def test_what_changes_its_sign_is_averaged_and_nothing_is_extrapolated(x64):
    """Each sequence by itself: of x <- a x one with a = -0.9 ends soon, one with a = 0.9 takes what it takes alone."""

    def passes(*factors):
        a = jnp.array(factors)[:, None, None]
        first = jnp.full((len(factors), 200, 1), 0.5)  # a step that its pass has made exact is not averaged
        return int(iterate(lambda x: (a * x, jnp.max(jnp.abs(x[:, -1]))), first, 1e-6, most=999)[1].iterations)

    assert passes(0.9) == passes(0.9, -0.9) == 1 + math.ceil(math.log(2e-6) / math.log(0.9))
    assert passes(0.9, 0.5) == passes(0.9)
    assert passes(-0.9) <= 6


def test_the_average(x64):
    """Of one sequence for each ratio of its last two steps, three time steps long, the first of them exact."""
    ratios = jnp.array([-0.5, -3.0, 0.5, 3.0])[:, None, None]
    before = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)))
    step, settled = ratios * before, (jnp.arange(3) < 1)[:, None]
    weight = jnp.array([1 / 3, 1 / 2, 0, 0])[:, None, None]  # |r_{k-1}|^2 a (a - 1) / (|r_{k-1}|^2 (a - 1)^2), capped
    found, after = averaged(jnp.ones_like(step), 1 + step, before, jnp.float64(0.9), settled)
    np.testing.assert_allclose(found, 1 + jnp.where(settled, 1, 1 - weight) * step)
    np.testing.assert_allclose(after, jnp.where(weight > 0, 0, step))  # so the next pass is not averaged
    found, after = averaged(jnp.ones_like(step), 1 + step, before, jnp.float64(1.0), settled)
    np.testing.assert_allclose(found, 1 + step)  # as long as the residual says that nothing is known yet


@pytest.mark.parametrize("kept", [1, 5, 15])
def test_a_pass_of_the_gradient_makes_a_step_exact_too(kept, x64):
    """From the last one on, with weights that make the passes overshoot."""
    params, x, c0 = problem(30, scale=8)
    jacobians, g = jacobians_at(params, x, c0), jnp.asarray(np.random.default_rng(1).normal(size=(2, 30, FEATURES)))

    def cotangents(most):
        way = jacobian.Way(FixedPoint(max_iterations=most, on_failure="ignore"))
        return jax.vjp(lambda r: jacobian.linear_solve(params, jacobians, r, way), g)[1](g)[0]

    expected, found = cotangents(31), cotangents(kept)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found[:, -kept:], expected[:, -kept:], rtol=0, atol=1e-13 * scale)
    assert float(jnp.abs(found - expected).max()) > 1e-6 * scale


def jacobians_at(params, x, c0):
    states, _ = solve(params, x, c0, solver="sequential")
    steps, earlier = Steps(content(params, x), gates_of_input(params, x)), jnp.roll(states, 1, 1).at[:, 0].set(c0)
    return jacobian.jacobians_of(
        steps, earlier, jax.nn.sigmoid(steps.z + gates_of_state(params, earlier, "tanh")), "tanh"
    )


def test_the_passes_of_diagonal_gates_are_newtons(x64):
    """Nothing is averaged, though they overshoot."""
    params, x, c0 = problem(100, gates="diagonal", scale=3)
    solver = FixedPoint(max_iterations=4, on_failure="ignore")
    found, record = ranjax.solve(params, x, c0, gates="diagonal", solver=solver)
    apply = recurrent.make_pass(params, Steps(content(params, x), gates_of_input(params, x)), c0, "tanh", solver)
    c = jnp.zeros_like(found)
    for _ in range(4):
        c, residual = apply(c)
    np.testing.assert_allclose(found, c, rtol=0, atol=1e-12)
    assert float(record.residual) == pytest.approx(float(residual))


def test_under_vmap(x64):
    """Each with passes of its own: weights and all."""
    params, x, c0 = problem(60)
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    inputs = jnp.stack([x, 3 * x])
    for solver in (FixedPoint(on_failure="nan"), FixedPoint(window=25)):
        states, record = jax.vmap(partial(solve, solver=solver), (0, 0, None))(many, inputs, c0)
        for n in range(2):
            expected, its = solve(jax.tree.map(lambda p, n=n: p[n], many), inputs[n], c0, solver=solver)
            np.testing.assert_allclose(states[n], expected, rtol=0, atol=1e-12)
            assert int(record.iterations[n]) == int(its.iterations)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_pass_makes_a_step_exact_and_no_average_undoes_it(reverse, x64):
    """x_t = b_t - 0.9 x_{t-1}, in reverse - 0.9 x_{t+1}."""
    time = 9
    b = 0.1 * jnp.asarray(np.random.default_rng(0).normal(size=(2, time, 1)))
    shift = -0.9 * jnp.eye(time, k=1 if reverse else -1)
    expected = np.linalg.solve(np.eye(time) - shift, b)
    far = np.arange(time)[None, :: -1 if reverse else 1, None]

    def apply(x):
        after = b + shift @ x
        return after, jnp.max(jnp.abs(after - x))

    run = partial(iterate, apply, jnp.zeros_like(b), 1e-12, reverse=reverse)
    for most in range(time):
        np.testing.assert_allclose(jnp.where(far < most, run(most=most)[0] - expected, 0), 0, atol=1e-15)
    assert float(jnp.abs(run(most=5)[0] - run(most=5, average=False)[0]).max()) > 0.01  # there were averages


def test_memory_does_not_grow_with_the_passes():
    params, x, c0 = problem(512, dtype=jnp.float32)
    features = FEATURES

    def temporaries(solver):
        of = jax.jit(jax.grad(lambda *a: jnp.sum(solve(*a, solver=solver)[0] ** 2), (0, 1, 2)))
        size = of.lower(params, x, c0).compile().memory_analysis().temp_size_in_bytes
        return size / (x.shape[0] * x.shape[1] * features * 4)

    few, many = (temporaries(FixedPoint(max_iterations=n)) for n in (2, 200))
    assert few == many < 20


@pytest.mark.parametrize("time", [8192, 7000])
def test_windows_need_a_dozen_arrays(time):
    """Inputs, gradients and temporaries of the gradient in all, in arrays of the states' size."""
    x, c0 = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, time, FEATURES), (2, FEATURES)))
    params = jax.eval_shape(RANCell(FEATURES).init, jax.random.key(0), c0, c0)["params"]
    of = jax.jit(jax.grad(lambda *a: jnp.sum(solve(*a)[0] ** 2), (0, 1, 2)))
    used = of.lower(params, x, c0).compile().memory_analysis()
    total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    assert total / (2 * time * FEATURES * 4) <= 12


def test_a_gradient_that_fades_beyond_the_least_number_converges():
    """Early windows hear of the last state in numbers that are flushed to 0."""
    params, x, c0 = problem(9000, dtype=jnp.float32)
    params["gates"]["bias"] += jnp.array([0.0, 1.5])[:, None]

    def last(x):
        return jnp.sum(solve(params, x, c0, solver=FixedPoint(window=500, on_failure="nan"))[0][:, -1] ** 2)

    gradient = jax.jit(jax.grad(last))(x)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    size = jnp.max(jnp.abs(gradient).reshape(2, 18, -1), axis=(0, 2))
    assert float(size[0]) < 1e-37
    assert 1e-38 < float(jnp.min(jnp.where(size > 0, size, 1))) < 1e-25  # there is a window in between


def test_the_gradients_of_windows_are_summed_in_the_dtype_of_the_states():
    params, x, c0 = problem(512, dtype=jnp.float32)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def of_weights(solver):
        def loss(p):
            return jnp.sum(jnp.sin(solve(p, x, c0, solver=solver)[0]))

        return jax.jit(jax.grad(loss))(params)["gates"]["recurrent_kernel"]

    few, many = (of_weights(FixedPoint(window=n)).astype(float) for n in (256, 4))
    np.testing.assert_allclose(many, few, rtol=2**-7, atol=1e-4)  # rounded once


def test_windows_are_solved_each_for_itself(x64):
    """As many windows as there must be, all of one length but for the last."""
    params, x, c0 = problem(64, scale=2)
    one = FixedPoint(window=22, on_failure="nan")
    states, record = solve(params, x, c0, solver=one)
    c, passes = c0, []
    for part in (x[:, :22], x[:, 22:44], x[:, 44:]):
        some, its = solve(params, part, c, solver=one)
        c = some[:, -1]
        passes.append(int(its.iterations))
    np.testing.assert_allclose(states[:, 44:], some, rtol=0, atol=1e-13)
    assert int(record.iterations) == max(passes) < int(solve(params, x, c0)[1].iterations)

    broken = x.at[:, 30].set(jnp.nan)
    states, record = solve(params, broken, c0, solver=one)
    assert not bool(record.converged)
    np.testing.assert_array_equal(jnp.isnan(states).any((0, 2)), np.arange(64) >= 22)


def test_the_language_model_with_it_and_without():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 30)))
    plain = LanguageModel(20, features=FEATURES, init_scale=0.5)
    variables = plain.init(jax.random.key(0), tokens, deterministic=True)
    assert set(variables) == {"params"}
    model = LanguageModel(20, features=FEATURES, init_scale=0.5, solver="fixed_point")
    expected, state = plain.apply(variables, tokens, deterministic=True)
    (logits, found), sown = model.apply(variables, tokens, deterministic=True, mutable="solver")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, state)
    records = [layer["record"] for layer in sown["solver"].values()]
    assert len(records) == 2
    assert all(bool(record.converged) and int(record.iterations) > 2 for record in records)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"splitting": "full"}, r"`splitting` must be one of 'diagonal', 'frozen'; got 'full'"),
        ({"recurrence": "magic"}, r"`recurrence` must be one of .*'sequential'"),
        ({"on_failure": "shrug"}, r"`on_failure` must be one of 'sequential', 'nan', 'ignore'"),
        ({"precision": "low"}, r"`precision` must be one of"),
        ({"rtol": 0}, r"`rtol` must be a number above 0 and below 1, or None; got 0"),
        ({"adjoint_rtol": 2}, r"`adjoint_rtol` must be a number above 0"),
        ({"rtol": 1.0}, r"`rtol` must be a number above 0 and below 1, or None; got 1.0"),
        ({"rtol": jnp.float32(0.5)}, r"`rtol` must be a number above 0 .* got Array"),
        ({"adjoint_rtol": "1e-3"}, r"`adjoint_rtol` must be a number above 0 .* got '1e-3'"),
        ({"max_iterations": 0}, r"`max_iterations` must be a whole number, at least 1; got 0"),
        ({"max_iterations": None}, r"`max_iterations` must be a whole number, at least 1; got None"),
        ({"window": 0}, r"`window` must be a whole number, at least 1, or None; got 0"),
        ({"window": 10.5}, r"`window` must be a whole number, at least 1, or None; got 10.5"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        FixedPoint(**setting)


def test_names_of_the_iteration_fit_the_gates():
    for gates, solver in (("input", "fixed_point"), ("input", FixedPoint()), ("input", "newton")):
        with pytest.raises(ValueError, match=rf"got {re.escape(repr(solver))} with gates='input'"):
            RAN(RANCell(4, gates), solver)
    with pytest.raises(ValueError, match="'pallas', 'newton'; got 'fixed_point' with gates='diagonal'"):
        RAN(RANCell(4, "diagonal"), "fixed_point")
    with pytest.raises(ValueError, match="'sequential', 'fixed_point'; got 'newton' with gates='recurrent'"):
        RAN(RANCell(4), "newton")


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_newton_solves_diagonal_gates_in_few_passes(x64, activation):
    """The Jacobian is its diagonal: the residual is squared, where it is below 1, at every pass."""
    cell = RANCell(8, "diagonal", activation, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(0), (2, 300, 5), jnp.float64)
    params = cell.init(jax.random.key(1), jnp.zeros((2, 8), jnp.float64), x[:, 0])["params"]
    options = {"gates": "diagonal", "activation": activation}

    def loss(solver, params, x):
        c, record = ranjax.solve(params, x, solver=solver, **options)
        return jnp.sum(jnp.sin(c)), (c, record)

    (_, (walked, _)), expected = jax.value_and_grad(partial(loss, "sequential"), (0, 1), has_aux=True)(params, x)
    (_, (c, record)), found = jax.value_and_grad(partial(loss, "newton"), (0, 1), has_aux=True)(params, x)
    np.testing.assert_allclose(c, walked, rtol=0, atol=1e-12)
    assert bool(record.converged)
    assert int(record.iterations) <= 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


def test_bad_arguments_of_solve():
    params, x, _ = problem(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"`gates` must be 'recurrent', .*; got 'input'"):
        ranjax.solve(params, x, gates="input")
    with pytest.raises(
        ValueError, match=r"`params` must be those .*\['cell'\] of a layer, .*of a LanguageModel; got params"
    ):
        ranjax.solve({"params": params}, x, gates="recurrent")
    with pytest.raises(ValueError, match=r"`activation` must be one of 'tanh', 'identity'; got 'relu'"):
        ranjax.solve(params, x, gates="recurrent", activation="relu")
    with pytest.raises(ValueError, match=r"`c0` must have the shape .* = \(2, 8\); got \(3, 8\)"):
        ranjax.solve(params, x, jnp.zeros((3, 8)), gates="recurrent")
    for shape in ((5,), (2, 40, 6)):
        with pytest.raises(ValueError, match=rf"`x` must have the axes .* in = 5 .* got .*{re.escape(str(shape))}"):
            ranjax.solve(params, jnp.zeros(shape), gates="recurrent")


def test_the_record_is_of_the_worst_window():
    """Of two windows the first alone fails."""
    cell, x = RANCell(6), np.random.default_rng(0).normal(size=(1, 40, 5)).astype(np.float32)
    x[:, 20:] *= 0.01
    params = cell.init(jax.random.key(0), jnp.zeros((1, 6)), x[:, 0])["params"]
    params["gates"]["bias"] -= 3.0

    def records(**options):
        solve = partial(ranjax.solve, params, gates="recurrent", solver=FixedPoint(window=20, **options))
        c, first = solve(x[:, :20])
        return first, solve(x[:, 20:], c[:, -1])[1], solve(x)[1]

    first, second, _ = records()
    assert int(second.iterations) < int(first.iterations)
    first, second, whole = records(max_iterations=int(second.iterations), on_failure="ignore")
    assert (bool(first.converged), bool(second.converged), bool(whole.converged)) == (False, True, False)
    assert float(whole.residual) == pytest.approx(float(first.residual), rel=1e-2)


def test_the_system_of_the_gradient_has_a_tolerance_of_its_own():
    cell, c0 = RANCell(6), jnp.zeros((1, 6))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 60, 5)), jnp.float32)
    params = cell.init(jax.random.key(0), c0, x[:, 0])["params"]

    def finite(adjoint_rtol):
        solver = FixedPoint(rtol=0.3, adjoint_rtol=adjoint_rtol, max_iterations=4, on_failure="nan")

        def loss(x):
            return jnp.sum(jnp.sin(ranjax.solve(params, x, c0, gates="recurrent", solver=solver)[0]))

        return bool(jnp.all(jnp.isfinite(jax.grad(loss)(x))))

    assert (finite(None), finite(0.3)) == (False, True)


@pytest.mark.parametrize("recurrence", ["pallas", "sequential"])
def test_the_recurrence_that_is_asked_for_is_taken_both_ways(recurrence):
    cell, x = RANCell(4), jnp.ones((1, 9, 3))
    params = cell.init(jax.random.key(0), jnp.zeros((1, 4)), x[:, 0])["params"]

    def total(x):
        return jnp.sum(ranjax.solve(params, x, gates="recurrent", solver=FixedPoint(recurrence=recurrence))[0])

    there, back = (str(jax.make_jaxpr(program)(x)).count("pallas_call") for program in (total, jax.grad(total)))
    assert 0 < there < back if recurrence == "pallas" else there == back == 0


def test_steps_whose_squares_overflow_are_not_averaged():
    step = jnp.full((1, 3, 2), 1e20)
    found, _ = averaged(0 * step, step, -step, jnp.float32(0.9), jnp.zeros((3, 1), bool))
    np.testing.assert_array_equal(found, step)


def test_what_is_flushed_to_0_is_relative_to_the_least_that_has_digits():
    finfo = jnp.finfo(jnp.float32)
    state = jnp.full((1, 3, 2), 4 * finfo.tiny)
    assert relative(state / 4, (state, state)) == finfo.eps


def test_the_diagonal_is_clipped():
    j = jacobian.Jacobians(jnp.array([[0.9, 0.9]]), jnp.ones((1, 2, 2)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(jacobian.clipped(j, jnp.array([[3.0, -3.0], [0.0, 0.0]])), [[1.0, -1.0]])


@pytest.mark.parametrize("large", [0, 1])
def test_the_residual_is_relative_to_the_larger_state(x64, large):
    params, x, c0 = problem(2, batch=1)
    params["gates"]["recurrent_kernel"] *= 0
    params["gates"]["bias"] = params["gates"]["bias"].at[1].set(-9.0)  # all is forgotten
    c = 1e3 * large * jnp.ones((1, 2, FEATURES))
    earlier = jnp.stack([c0, c[:, 0]], 1)
    after = jax.vmap(lambda c, x: ranjax.cell.step(params, c, x), (1, 1), 1)(earlier, x)
    scale = jnp.maximum(jnp.abs(after).max(-1), jnp.abs(earlier).max(-1))
    steps = Steps(content(params, x), gates_of_input(params, x))
    _, residual = recurrent.make_pass(params, steps, c0, "tanh", FixedPoint())(c)
    np.testing.assert_allclose(residual, (jnp.abs(after - c).max(-1) / scale).max(), rtol=1e-12)


@pytest.mark.parametrize("gates", ["recurrent", "diagonal", "input"])
@pytest.mark.parametrize("narrow", ["parameters", "inputs"])
def test_the_dtype_of_the_products_is_that_of_both(x64, gates, narrow):
    """As in a layer: what the gates read of the state is not rounded to a narrower dtype of the weights."""
    cell = RANCell(4, gates, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (2, 30, 3), jnp.float64)
    params = cell.init(jax.random.key(0), jnp.zeros((2, 4), jnp.float64), x[:, 0])["params"]
    if narrow == "parameters":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    else:
        x = x.astype(jnp.bfloat16)
    expected, _ = oracle.ran(*jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x)), np.zeros((2, 4)), "tanh")
    np.testing.assert_allclose(ranjax.solve(params, x, gates=gates)[0], expected, rtol=0, atol=1e-12)
