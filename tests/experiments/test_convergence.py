"""The study of convergence: its iterations are the solver's, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from ranjax import FixedPoint, RANCell, solve
from ranjax.errors import UserError
from ranjax.solvers.fixed_point import iterate
from ranjax.training.model import load_run
from ranjax.training.run import train


def layer():
    """The parameters of a layer whose weights on h are large, and inputs."""
    x = jax.random.normal(jax.random.key(0), (1, 60, 5), jnp.float64)
    params = RANCell(12, param_dtype=jnp.float64).init(jax.random.key(1), jnp.zeros((1, 12)), x[:, 0])["params"]
    params["gates"]["recurrent_kernel"] *= 3
    return params, x


def test_the_iterations_counted_are_those_of_the_solver(script, x64):
    study, (params, x) = script("convergence", "iterations"), layer()
    with jax.numpy_rank_promotion("allow"):
        rows = {name: count() for name, count in study.variants(params, x, "tanh", 40, x).items()}
    _, result = solve(params, x, gates="recurrent", solver=FixedPoint(rtol=1e-4))
    assert rows["diagonal"]["passes_0.0001"] == int(result.iterations) - 1  # the last one checks
    frozen = study.make_solved(params, x, "tanh", study.frozen)
    _, result = iterate(frozen, jnp.zeros((1, 60, 12)), 1e-4, most=100)
    assert rows["frozen"]["passes_0.0001"] == int(result.iterations) - 1
    for name, row in rows.items():
        assert name == "bfloat16 products" or row["passes_0.0001"] is not None, name


def test_the_rounded_iteration_is_the_solvers_but_for_its_products(script, monkeypatch, x64):
    study, (params, x) = script("convergence", "iterations"), layer()
    c = jax.random.normal(jax.random.key(2), (1, 60, 12), jnp.float64)
    rounded, exact = study.make_rounded(params, x, "tanh")(c), study.make_solved(params, x, "tanh")(c)
    assert 1e-6 < jnp.max(jnp.abs(rounded[0] - exact[0])) < 0.1
    monkeypatch.setattr(study, "rounded_product", study.gates_of_state)
    same = study.make_rounded(params, x, "tanh")(c)
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(same, exact))


def test_chunks_that_do_not_converge_have_no_count(script, monkeypatch, x64):
    study, (params, x) = script("convergence", "iterations"), layer()
    whole = study.chunks(params, x, "tanh", 60)
    assert whole["most_passes_0.0001"] == whole["passes_0.0001"]
    assert study.chunks(params, x, "tanh", 20)["most_passes_0.0001"] <= whole["most_passes_0.0001"]
    params["gates"]["recurrent_kernel"] *= jnp.nan
    assert study.chunks(params, x, "tanh", 20) == {"passes_0.0001": None}


def test_what_the_study_cannot_use_is_refused_before_anything_is_written(script, pets, tmp_path):
    config = dataclasses.replace(pets, gates="input", out=str(tmp_path / "run"))
    train(config)
    kept = tmp_path / "out" / "passes.jsonl"
    kept.parent.mkdir()
    kept.write_text("kept")
    convergence = script("convergence")
    for checkpoint, options, message in (
        ((), {}, "at least one directory"),
        ((config.out,), {}, "must be a RAN with recurrent gates"),
        ((config.out,), {"lengths": ()}, "--lengths must be whole numbers, each at least 1; got nothing"),
        ((config.out,), {"lengths": (35, -5)}, "--lengths must be .*; got 35, -5"),
        ((config.out,), {"most": 0}, "--most must be .*; got 0"),
    ):
        with pytest.raises(UserError, match=message):
            convergence.main(convergence.Options(checkpoint, out=kept.parent, **options))
    assert [path.read_text() for path in kept.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_a_network_is_measured_as_trained_and_as_initialised(script, pets, tmp_path, monkeypatch, x64, block):
    (tmp_path / "pets.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 500)
    config = dataclasses.replace(pets, out=str(tmp_path / "run"), block=block)
    train(config)
    convergence, measured = script("convergence"), []

    def measure(params, x, activation, trained, options):
        measured.append((trained, params["gates"]["recurrent_kernel"]))
        return [{"iteration": "diagonal"}]

    monkeypatch.setattr(convergence, "measure", measure)
    monkeypatch.setattr(convergence, "draw", lambda rows, path: path.write_text(str(len(rows))))
    convergence.main(convergence.Options((config.out,), lengths=(35,), out=tmp_path / "out"))
    (trained, kernel), (as_initialised, first_kernel) = measured
    assert (trained, as_initialised) == (True, False)
    assert kernel.dtype == jnp.float64
    assert jnp.max(jnp.abs(kernel - first_kernel)) > 1e-4
    assert (tmp_path / "out" / "residuals.png").read_text() == "2"
    lines = (tmp_path / "out" / "passes.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == [block] * 2
    other = json.dumps({"run": "another"})
    (tmp_path / "out" / "passes.jsonl").write_text("\n".join([other, *lines]) + "\n")
    convergence.main(convergence.Options((config.out,), lengths=(35,), out=tmp_path / "out"))
    assert (tmp_path / "out" / "passes.jsonl").read_text().splitlines()[:1] == [other]
    assert (tmp_path / "out" / "residuals.png").read_text() == "3"


def test_the_inputs_of_every_layer_are_what_its_ran_reads(script, pets, tmp_path):
    """Solved from them alone, the last states are those that the model returns."""
    for block in ("plain", "residual"):
        config = dataclasses.replace(pets, out=str(tmp_path / block), block=block, layers=2)
        train(config)
        run, tokens = load_run(config.out), jnp.arange(40)[None] % 5
        inputs = script("convergence").inputs_of_layers(run, run.params, tokens)
        _, state = run.model.apply({"params": run.params}, tokens, deterministic=True)
        for n, (x, carry) in enumerate(zip(inputs, state, strict=True)):
            c, _ = solve(run.params[f"stack_{n}"]["cell"], x, gates="recurrent")
            expected = carry[0] if block == "residual" else carry
            assert jnp.allclose(c[:, -1], expected, atol=1e-6)
