"""How many passes a fixed point takes: `python experiments/convergence/run.py --checkpoint RUN --data-dir DIR`.

For each run of ranjax.train with recurrent gates, as trained and as it began, and each of its layers: the residual of
every pass and its distance from the sequential states, over lengths, over weights on h scaled up, for some iterations.
float64, batch 1, the run's own validation text. Rows go to results.jsonl, a picture to residuals.png.
"Passes to a level": those made before the states whose residual is at most that.
"""

import dataclasses
import datetime
import json
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import ranjax
from ranjax.cell import ACTIVATIONS, content, gates_of_input, output
from ranjax.data import load_corpus
from ranjax.evaluate import load_run
from ranjax.fixed_point import FixedPoint
from ranjax.masks import Steps
from ranjax.recurrent import make_pass

HERE = Path(__file__).parent
LEVELS = (1e-3, 1e-4, 1e-6)
WINDOWS = {2048: (128, 512, 1024, 2048), 16384: (512, 1024)}  # of so many steps, by length


@dataclasses.dataclass(frozen=True)
class Options:
    """Passes of the fixed point on trained models.

    Attributes:
      checkpoint: directories of runs.
      data_dir: folder of the data sets.
      lengths: numbers of steps; what is compared besides the length is compared at 512.
      scales: factors on the weights on h.
      most: passes, at most.
      out: folder of the results.
    """

    checkpoint: tuple[str, ...]
    data_dir: str | None = None
    lengths: tuple[int, ...] = (35, 128, 512, 2048, 16384)
    scales: tuple[float, ...] = (2, 4, 8, 16)
    most: int = 60
    out: Path = HERE


def passes(name: str, most: int, apply: dict, first: jax.Array, expected: jax.Array) -> dict:
    """Residual and error of the states before each pass."""
    c, residuals, errors, history = first, [], [], []
    for k in range(most):
        errors.append(float(jnp.max(jnp.abs(c - expected)) / jnp.max(jnp.abs(expected))))
        after, residual = apply[
            "frozen" if name == "frozen" or (name == "frozen, then diagonal" and k < 3) else "diagonal"
        ](c)
        residuals.append(float(residual))
        if not residuals[-1] > LEVELS[-1] / 100:
            break
        history = [*history, (c, after)][-3:]
        c = anderson(history) if name == "Anderson, depth 2" else after
    row = {f"passes_{level:g}": next((k for k, r in enumerate(residuals) if r <= level), None) for level in LEVELS}
    row |= {f"passes_error_{level:g}": next((k for k, e in enumerate(errors) if e <= level), None) for level in LEVELS}
    return row | {"residuals": [float(f"{r:.2e}") for r in residuals]}


def anderson(history: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The mix of the last passes with the least step."""
    steps = jnp.stack([(after - before).ravel() for before, after in history])
    gram = steps @ steps.T
    weights = jnp.linalg.solve(gram + 1e-12 * jnp.trace(gram) * jnp.eye(len(gram)), jnp.ones(len(gram)))
    return sum(w * after for w, (_, after) in zip(weights / weights.sum(), history, strict=True))


def rounded(params: dict, earlier: jax.Array, activation: str, *_: str) -> jax.Array:
    """What h_{t-1} gives to the gates, its factors rounded to bfloat16, as products are by default on a TPU."""
    kernel, h = params["gates"]["recurrent_kernel"], ACTIVATIONS[activation](earlier)
    return jnp.tensordot(*(jax.lax.reduce_precision(a, 8, 7) for a in (h, kernel)), 1)


def windows(solve, x: jax.Array, size: int) -> float:
    """Mean passes of windows that are solved one after another, each from the last state of the one before."""
    c0, counts = jnp.zeros((1, solve.keywords["params"]["content"]["kernel"].shape[1])), []
    for start in range(0, x.shape[1], size):
        states, record = solve(x=x[:, start : start + size], c0=c0)
        c0 = states[:, -1]
        counts.append(int(record.iterations) - 1)  # the last one checks
    return float(np.mean(counts))


def study(params: dict, x: jax.Array, activation: str, options: Options) -> list[dict]:
    """The rows of one layer with the inputs `(1, time, in)`."""
    kernel, rows = params["gates"]["recurrent_kernel"], []
    norm = max(float(jnp.linalg.norm(kernel[:, gate], 2)) for gate in range(2))
    cases = [(time, 1.0, ("diagonal", "frozen")) for time in options.lengths]
    cases += [(512, 1.0, ("frozen, then diagonal", "Anderson, depth 2"))]
    cases += [(512, scale, ("diagonal",)) for scale in options.scales]
    for time, scale, names in cases:
        scaled = {**params, "gates": {**params["gates"], "recurrent_kernel": scale * kernel}}
        steps = Steps(content(scaled, x[:, :time]), gates_of_input(scaled, x[:, :time]))
        c0 = jnp.zeros((1, kernel.shape[-1]))
        settings = {"gates": "recurrent", "activation": activation}
        expected, _ = ranjax.solve(scaled, x[:, :time], solver="sequential", **settings)
        apply = {s: jax.jit(make_pass(scaled, steps, c0, activation, FixedPoint(s))) for s in ("diagonal", "frozen")}
        for name in names:
            row = {"iteration": name, "time": time, "scale": scale, "spectral_norm": round(scale * norm, 2)}
            rows.append(row | passes(name, options.most, apply, jnp.zeros_like(expected), expected))
        if time == 512 and scale == 1 and "diagonal" in names:
            with mock.patch("ranjax.recurrent._recurrent", rounded):
                apply = {"diagonal": jax.jit(make_pass(scaled, steps, c0, activation, FixedPoint()))}
                found = passes("diagonal", options.most, apply, jnp.zeros_like(expected), expected)
            row |= {"iteration": "bfloat16 products"}
            rows.append(row | found)
        if time in WINDOWS:
            solve = jax.jit(partial(ranjax.solve, solver=FixedPoint(rtol=1e-4, window=None), **settings))
            solve = partial(solve, params=scaled)
            for size in WINDOWS[time]:
                row = {"iteration": f"windows of {size}", "time": time, "scale": 1.0, "spectral_norm": round(norm, 2)}
                rows.append(row | {"passes_0.0001": windows(solve, x[:, :time], size)})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The residual of every pass, one panel for each trained layer."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["epochs"] and row["scale"] == 1 and "residuals" in row]
    runs, layers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "layer"))
    figure = Figure(figsize=(3.2 * len(runs) + 2, 3 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), len(runs), squeeze=False, sharey=True)
    for (run, layer), axes in zip(((run, layer) for layer in layers for run in runs), grid.flat, strict=True):
        for row in rows:
            if (row["run"], row["layer"]) == (run, layer) and row["iteration"] in ("diagonal", "frozen"):
                color = f"C{sorted({r['time'] for r in rows}).index(row['time'])}"
                style = "-" if row["iteration"] == "diagonal" else ":"
                axes.plot(row["residuals"], style, color=color, label=f"{row['iteration']}, T = {row['time']:,}")
        axes.set(yscale="log", title=f"{run}, layer {layer}")
    figure.supxlabel("pass")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.supylabel("one-step residual, relative")
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    rows = []
    for directory in options.checkpoint:
        run = load_run(directory)
        corpus = load_corpus(run.config.dataset, options.data_dir, run.config.tokenizer)
        tokens = jnp.asarray(corpus.valid[None, : max(options.lengths)])
        lines = (json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines())
        epochs = 1 + int(np.argmin([line["valid_perplexity"] for line in lines if "valid_perplexity" in line]))
        fresh = run.model.init(jax.random.key(run.config.seed), tokens[:, :2], deterministic=True)["params"]
        for trained, params in ((epochs, run.params), (0, fresh)):
            params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
            x = params["embed"]["embedding"][tokens]
            for layer, size in enumerate(run.model.sizes):
                cell = params[f"stack_{layer}"]["cell"]
                for row in study(cell, x, run.config.activation, options):
                    about = {"run": Path(directory).name, "dataset": run.config.dataset, "dropout": run.config.dropout}
                    about |= {
                        "epochs": trained,
                        "layer": layer + 1,
                        "features": size,
                        "activation": run.config.activation,
                    }
                    rows.append(about | row | {"date": datetime.date.today().isoformat()})
                    print({key: value for key, value in rows[-1].items() if key != "residuals"}, flush=True)
                states, _ = ranjax.solve(cell, x, gates="recurrent", activation=run.config.activation)
                x = output(cell, states, run.config.activation)
    (options.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, options.out / "residuals.png")


if __name__ == "__main__":
    import tyro

    jax.config.update("jax_enable_x64", True)
    main(tyro.cli(Options))
