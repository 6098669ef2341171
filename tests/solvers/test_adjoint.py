"""The linear system of the gradient: its Jacobians, its solution, its result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from networks import FEATURES, jacobians_at, problem, solve

import ranjax
from ranjax import FixedPoint, RANCell
from ranjax.cell import content, gates_of_input, gates_of_state
from ranjax.solvers import adjoint, solve_adjoint
from ranjax.solvers.masks import Steps
from ranjax.solvers.result import Result, Status


@pytest.mark.parametrize("options", [{}, {"projection": 3}], ids=str)
def test_the_diagonal_is_that_of_the_jacobian(options, x64):
    params, x, c0 = problem(1, batch=1, **options)
    c0 = 0.1 * c0
    steps = Steps(content(params, x), gates_of_input(params, x))
    z = steps.z + gates_of_state(params, c0, "tanh")[:, None]
    gates = jax.nn.sigmoid(z)
    jacobians = adjoint.jacobians_of(steps, c0[:, None], gates, "tanh")
    found = adjoint.clipped(jacobians, adjoint.diagonal(params))[0, 0]
    full = jax.jacfwd(lambda c: ranjax.cell.step(params, c, x[0, 0]))(c0[0])
    np.testing.assert_allclose(found, np.clip(np.diag(full), -1, 1), atol=1e-13)


def test_the_diagonal_is_clipped():
    j = adjoint.Jacobians(jnp.array([[0.9, 0.9]]), jnp.ones((1, 2, 2)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(adjoint.clipped(j, jnp.array([[3.0, -3.0], [0.0, 0.0]])), [[1.0, -1.0]])


@pytest.mark.parametrize("options", [{}, {"activation": "identity", "projection": 3}], ids=str)
def test_gradients_equal_autodiff_of_the_sequential_scan(options, x64):
    arrays = problem(60, **options)

    def loss(solver):
        def of(*arrays):
            states, _ = solve(*arrays, solver=solver, activation=options.get("activation", "tanh"))
            return jnp.sum(jnp.sin(states) * jnp.arange(60.0)[None, :, None])

        return jax.jit(jax.grad(of, (0, 1, 2)))

    def plain(params, x, c0):  # no derivative rule of ours
        def advance(c, x):
            c = ranjax.cell.step(params, c, x, options.get("activation", "tanh"))
            return c, c

        states = jnp.swapaxes(jax.lax.scan(advance, c0, jnp.swapaxes(x, 0, 1))[1], 0, 1)
        return jnp.sum(jnp.sin(states) * jnp.arange(60.0)[None, :, None])

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(*arrays)
    solvers = (FixedPoint(chunk=chunk, on_failure="nan") for chunk in (None, 25))
    for solver in ("sequential", *solvers, FixedPoint(max_iterations=2)):
        got = loss(solver)(*arrays)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(1, np.abs(b).max()))


def test_second_derivatives(x64):
    arrays = problem(4, batch=1)
    check_grads(jax.jit(lambda *a: solve(*a)[0]), arrays, order=2, modes=("rev",))

    def by(solver):  # the Hessian times a vector
        gradient = jax.grad(lambda c0: jnp.sum(jnp.sin(solve(*arrays[:2], c0, solver=solver)[0])))
        return jax.jit(lambda c0: jax.jvp(gradient, (c0,), (jnp.cos(c0),)))(arrays[2])

    np.testing.assert_allclose(by(FixedPoint(chunk=3)), by("sequential"), rtol=0, atol=1e-10)


def test_the_gradient_of_the_last_state_converges():
    """All but the last few cotangents have vanished, and need no digits of their own."""
    params, x, c0 = problem(1000, dtype=jnp.float32)

    def last(x):
        return jnp.sum(solve(params, x, c0, solver=FixedPoint(on_failure="nan", max_iterations=40))[0][:, -1] ** 2)

    assert bool(jnp.all(jnp.isfinite(jax.jit(jax.grad(last))(x))))


def test_products_run_at_the_highest_precision():
    """On a GPU or TPU, in the iterations, the gradient and the sequential scan in their place."""
    arrays = problem(6, dtype=jnp.float32)
    kernel, highest = arrays[0]["gates"]["recurrent_kernel"].shape, (jax.lax.Precision.HIGHEST,) * 2

    def found(**settings):
        solver = FixedPoint(**settings)
        program = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(solve(*a, solver=solver)[0]), (0, 1, 2)))(*arrays)
        return list(products(program.jaxpr))

    with_weights = [kind for _, kind, factors in found(chunk=3) if kernel in factors]  # between chunks, too
    assert set(with_weights) == {highest}
    loops = [(inside, kind) for inside, kind, _ in found() if {"while", "cond"} & set(inside)]
    assert {tuple(name for name in inside if name != "jit") for inside, _ in loops} == {
        (rule, *loop) for rule in ("custom_jvp_call", "custom_linear_solve") for loop in (("while",), ("cond", "scan"))
    }
    assert all(kind == highest for _, kind in loops)


def products(jaxpr, inside=()):
    """The matrix products of a program: the loops around them, their precision, the shapes of their factors."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield inside, equation.params["precision"], {factor.aval.shape for factor in equation.invars}
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner, (*inside, equation.primitive.name))


def test_with_one_feature_the_system_takes_few_iterations(x64):
    """The diagonal is the Jacobian."""
    cell = RANCell(1, param_dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 400, 3)))
    params = cell.init(jax.random.key(1), jnp.zeros((1, 1)), x[:, 0])["params"]
    params["gates"] |= {"bias": jnp.array([[0.0], [1.0]]), "recurrent_kernel": jnp.full((1, 2, 1), 0.3)}
    for rtol in (None, 0.5):  # with 0.5 only the gradient can fail
        solver = FixedPoint(max_iterations=8, on_failure="nan", rtol=rtol)
        gradient = jax.grad(lambda x, solver=solver: jnp.sum(solve(params, x, solver=solver)[0] ** 2))(x)
        assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("kept", [1, 5, 15])
def test_every_iteration_of_the_system_makes_a_step_exact(kept, x64):
    """From the last step on, with weights for which iterations overshoot."""
    params, x, c0 = problem(30, scale=8)
    jacobians, g = jacobians_at(params, x, c0), jnp.asarray(np.random.default_rng(1).normal(size=(2, 30, FEATURES)))

    def cotangents(most):
        return adjoint.iterate_system(params, jacobians, g, FixedPoint(max_iterations=most), reverse=True)[0]

    expected, found = cotangents(31), cotangents(kept)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found[:, -kept:], expected[:, -kept:], rtol=0, atol=1e-13 * scale)
    assert float(jnp.abs(found - expected).max()) > 1e-6 * scale


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


def by_steps(params, x, c0, states, adjoint):
    """The gradients of parameters, inputs and initial state, from the adjoint by the derivatives of single steps."""
    earlier = jnp.concatenate([c0[:, None], states[:, :-1]], axis=1)
    _, chain = jax.vjp(lambda p, x, c: ranjax.cell.step(p, c, x), params, x, earlier)
    d_params, d_x, d_earlier = chain(adjoint)
    return d_params, d_x, d_earlier[:, 0]


@pytest.mark.parametrize(
    ("gates", "solver"),
    [
        ("recurrent", "sequential"),
        ("recurrent", "fixed_point"),
        ("recurrent", FixedPoint(chunk=17, on_failure="nan")),
        ("diagonal", "newton"),
        ("diagonal", "auto"),
    ],
    ids=str,
)
def test_solve_adjoint_equals_vjp(gates, solver, x64):
    params, x, c0 = problem(60, gates=gates)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(2, 60, FEATURES)))
    run = partial(ranjax.solve, gates=gates, solver="sequential")
    (states, _), chain = jax.vjp(run, params, x, c0)
    expected = chain((g, Result(np.zeros((), jax.dtypes.float0), np.zeros((), jax.dtypes.float0), jnp.zeros(()))))
    found, result = jax.jit(partial(solve_adjoint, gates=gates, solver=solver))(params, x, g, c0)
    assert int(result.status) == Status.SUCCESS
    assert (int(result.iterations) > 1) == (solver not in ("sequential", "auto"))
    got = by_steps(params, x, c0, states, found)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, expected)


@pytest.mark.parametrize("chunk", [None, 11])
def test_solve_adjoint_reports_failures(chunk, x64):
    params, x, c0 = problem(30)
    g = jnp.ones((2, 30, FEATURES))
    run = partial(solve_adjoint, params, x, c0=c0, gates="recurrent")
    expected, _ = run(g, solver="sequential")
    options = {"chunk": chunk, "max_iterations": 1}
    found, result = run(g, solver=FixedPoint(on_failure="nan", rtol=0.9, max_iterations=3, chunk=chunk))
    # The states converge to that tolerance, the system does not; its NaN reaches the other chunks.
    assert int(result.status) == (Status.MAX_ITERATIONS if chunk is None else Status.NOT_FINITE)
    assert bool(jnp.any(jnp.isnan(found)))
    found, result = run(g, solver=FixedPoint(**options))
    assert int(result.status) == Status.MAX_ITERATIONS
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    _, result = run(g.at[0, 3, 2].set(jnp.nan), solver=FixedPoint(chunk=chunk))
    assert int(result.status) == Status.NOT_FINITE


def test_solve_adjoint_under_vmap_and_without_steps(x64):
    params, x, c0 = problem(12)
    g = jnp.stack([jnp.ones((2, 12, FEATURES)), jnp.zeros((2, 12, FEATURES))])
    run = partial(solve_adjoint, params, x, c0=c0, gates="recurrent", solver="fixed_point")
    found, result = jax.vmap(run)(g)
    assert result.status.shape == (2,)
    np.testing.assert_allclose(found[0], run(g[0])[0], rtol=0, atol=1e-13)
    assert not found[1].any()
    empty, result = solve_adjoint(params, x[:, :0], g[0, :, :0], gates="recurrent", solver="fixed_point")
    assert empty.shape == (2, 0, FEATURES)
    assert bool(result.converged)


def test_bad_arguments_of_solve_adjoint():
    params, x, c0 = problem(dtype=jnp.float32)
    with pytest.raises(
        ValueError, match=r"`cotangents` must have the shape of the states, .* = \(2, 40, 8\); got \(2, 8\)"
    ):
        solve_adjoint(params, x, c0, gates="recurrent")
    with pytest.raises(ValueError, match=r"`gates` must be one of 'recurrent', 'diagonal'; got 'input'"):
        solve_adjoint(params, x, jnp.zeros((2, 40, 8)), gates="input")
