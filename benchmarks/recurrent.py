"""Gates that read h_{t-1}, solver against solver: `python benchmarks/recurrent.py --checkpoint RUN`.

For a trained model, each shape and each solver: milliseconds of the gradient of the sum of squares of a layer's states,
the number of iterations, whether they converged, and the largest deviation from the sequential scan, relative to the
largest gradient. Also the states alone, and by as many iterations without a test of the residual. For diagonal gates:
the fused sequential scan beside Newton's iteration, at the same sizes with random weights.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import timing

from ranjax import FixedPoint, RANCell, cli, solve
from ranjax.cell import content, gates_of_input, output
from ranjax.data import load_corpus
from ranjax.solvers.fixed_point import averaged
from ranjax.solvers.masks import Steps
from ranjax.solvers.recurrent import make_iteration
from ranjax.training.model import load_run

RESULTS = Path(__file__).parent / "results"
LOOSE = {"rtol": 1e-4, "adjoint_rtol": 1e-4}
SOLVERS = {  # the others are compared with the first
    "recurrent": {
        "sequential": "sequential",
        "fixed point": FixedPoint(on_failure="nan"),
        "fixed point, all at once": FixedPoint(chunk=None, on_failure="nan"),
        "fixed point, chunks of 256": FixedPoint(chunk=256, on_failure="nan"),
        "fixed point, tolerances 1e-4": FixedPoint(**LOOSE, on_failure="nan"),
    },
    "diagonal": {"fused": "auto", "sequential": "sequential", "Newton": FixedPoint(on_failure="nan")},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Gates that read h_{t-1}, solver against solver.

    Attributes:
      checkpoint: a run of ranjax.train with recurrent gates.
      data_dir: folder of the data sets.
      layer: of its model, counted from 1.
      shapes: batch and number of steps.
      seconds: time limit of the rounds of one shape.
      out: folder of the results.
    """

    checkpoint: str
    data_dir: str | None = None
    layer: int = 1
    shapes: tuple[tuple[int, int], ...] = ((20, 35), (16, 1024), (2, 8192))
    seconds: float = 30.0
    out: Path = RESULTS


def gradient(gates: str, activation: str, solver: str | FixedPoint):
    """A function that returns the gradient of the sum of squares of the states, and the solver's result."""

    def total(params, x):
        states, result = solve(params, x, gates=gates, activation=activation, solver=solver)
        return jnp.sum(states**2), result

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


def early_exit(activation: str, params: dict, x: jax.Array, seconds: float) -> list[dict]:
    """The states by iterations until they converge, and by as many iterations without a test of the residual.

    The latter are averaged from the first one on, because the solver begins to average at a residual of 1.
    """
    solver, features = FixedPoint(chunk=None, on_failure="nan"), params["content"]["kernel"].shape[1]
    run = jax.jit(partial(solve, gates="recurrent", activation=activation, solver=solver))
    expected, result = run(params, x)
    count = int(result.iterations)

    @jax.jit
    def iterated(params, x):
        steps, c0 = Steps(content(params, x), gates_of_input(params, x)), jnp.zeros((x.shape[0], features))
        apply = make_iteration(params, steps, c0, activation, solver)

        def advance(done, loop):
            c, step = loop
            settled = (jnp.arange(x.shape[1]) <= done)[:, None]
            return averaged(c, apply(c)[0], step, jnp.zeros(()), settled)

        zero = jnp.zeros_like(steps.u)
        return jax.lax.fori_loop(0, count, advance, (zero, zero))[0]

    calls = {
        "states, fixed point, all at once": partial(run, params, x),
        "states, as many iterations": partial(iterated, params, x),
    }
    about = {"gates": "recurrent", "batch": x.shape[0], "time": x.shape[1], "features": features, "iterations": count}
    deviation = float(jnp.max(jnp.abs(iterated(params, x) - expected)) / jnp.max(jnp.abs(expected)))
    about |= {"converged": bool(result.converged), "deviation": deviation}
    times = timing.alternate(calls, seconds=seconds)
    return [about | {"solver": name} | timing.summary(found) for name, found in times.items()]


def measure(gates: str, activation: str, params: dict, x: jax.Array, seconds: float) -> list[dict]:
    """The rows of one layer and shape."""
    calls = {name: partial(gradient(gates, activation, s), params, x) for name, s in SOLVERS[gates].items()}
    found = {name: call() for name, call in calls.items()}
    expected = jax.tree.leaves(next(iter(found.values()))[0])
    rows = []
    for name, times in timing.alternate(calls, seconds=seconds).items():
        got, result = found[name]
        pairs = zip(jax.tree.leaves(got), expected, strict=True)
        deviation = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
        about = {"gates": gates, "solver": name, "batch": x.shape[0], "time": x.shape[1]}
        about |= {"features": params["content"]["kernel"].shape[1], "deviation": deviation}
        about |= {"iterations": int(result.iterations), "converged": bool(result.converged)}
        rows.append(about | timing.summary(times))
    return rows


def main(options: Options) -> None:
    run = load_run(options.checkpoint)
    ids = load_corpus(run.config.dataset, options.data_dir, run.config.tokenizer).valid
    embedding = run.params["embed"]["embedding"]
    cells = [run.params[f"stack_{n}"]["cell"] for n in range(options.layer)]
    diagonal = RANCell(run.model.sizes[options.layer - 1], "diagonal")
    rows = []
    for batch, time in options.shapes:
        x = embedding[jnp.asarray(ids[: batch * time].reshape(batch, time))]
        for cell in cells[:-1]:
            states, _ = solve(cell, x, gates="recurrent", activation=run.config.activation)
            x = output(cell, states, run.config.activation)
        before = len(rows)
        rows += measure("recurrent", run.config.activation, cells[-1], x, options.seconds)
        rows += early_exit(run.config.activation, cells[-1], x, options.seconds / 3)
        params = diagonal.init(jax.random.key(0), jnp.zeros((batch, diagonal.features)), x[:, 0])["params"]
        rows += measure("diagonal", "tanh", params, x, options.seconds / 3)
        for row in rows[before:]:
            print(
                "{batch} x {time}, {gates} gates, {solver:32} {median_ms:9.2f} ms, {iterations} iterations, "
                "converged: {converged}, deviation {deviation:.1e}".format(**row),
                flush=True,
            )
        about = {"dataset": run.config.dataset, "layer": options.layer}
        timing.write(options.out, "recurrent", timing.stamp() | about, rows)


if __name__ == "__main__":
    cli.start(lambda: main(cli.options(Options, None, "python benchmarks/recurrent.py")), huge_pages=True)
