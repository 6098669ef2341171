"""How many passes a fixed point takes: `python experiments/convergence/run.py --checkpoint RUN --data-dir DIR`.

For runs of ranjax.train with recurrent gates, as trained and as they began: the residual of every pass of each layer
and its distance from the sequential states, over lengths, over weights on h scaled up, for some iterations; float64,
batch 1, the validation text. "Passes to a level" are those made before the states whose residual is at most that.
"""

import dataclasses
import json
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from passes import variants, windows

import ranjax
from harness.ablation import constraint
from ranjax.cell import output
from ranjax.errors import UserError, exit_with_message, flag, is_size, write_whole
from ranjax.evaluate import Run, load_run, load_text
from ranjax.training.report import blank_figure, device, versions

HERE = Path(__file__).parent
USUAL = ("diagonal", "frozen", "float32", "not averaged")  # at all lengths
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


def study(params: dict, x: jax.Array, activation: str, trained: bool, options: Options) -> list[dict]:
    """The rows of one layer with the inputs `(1, time, in)`."""
    kernel, rows = params["gates"]["recurrent_kernel"], []
    norm = max(float(jnp.linalg.norm(kernel[:, gate], 2)) for gate in range(2))
    for time, scale in (*((time, 1.0) for time in options.lengths), *((512, scale) for scale in options.scales)):
        scaled = {**params, "gates": {**params["gates"], "recurrent_kernel": scale * kernel}}
        compared = variants(scaled, x[:, :time], activation, options.most, x[:, time : 2 * time])
        common = {"time": time, "scale": scale, "spectral_norm": round(scale * norm, 2)}
        names = compared if trained and (time, scale) == (512, 1) else USUAL if scale == 1 else ("diagonal",)
        rows += [{"iteration": name, **common, **compared[name]()} for name in names]
        for size in WINDOWS.get(time, ()):
            counts = windows(scaled, x[:, :time], activation, size)
            rows.append({"iteration": f"windows of {size}", **common, **counts})
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The residual of every pass, one panel for each trained layer."""
    rows = [row for row in rows if row["epochs"] and row["scale"] == 1 and "residuals" in row]
    runs, layers, times = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "layer", "time"))
    columns, height = 2 * len(layers), (len(runs) + 1) // 2  # two runs a line
    figure = blank_figure(3.2 * columns + 2, 3 * height)
    for number, (run, layer) in enumerate(((run, layer) for run in runs for layer in layers), 1):
        axes = figure.add_subplot(height, columns, number, sharey=figure.axes[0] if figure.axes else None)
        for row in rows:
            if (row["run"], row["layer"]) == (run, layer) and row["iteration"] in ("diagonal", "frozen"):
                style = f"C{times.index(row['time'])}" + ("-" if row["iteration"] == "diagonal" else ":")
                axes.plot(row["residuals"], style, label=f"{row['iteration']}, T = {row['time']:,}")
        axes.set(yscale="log", title=f"{run}, layer {layer}")
    figure.supxlabel("pass")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.supylabel("one-step residual, relative")
    figure.savefig(path, dpi=110)


def opened(directory: str, options: Options) -> tuple[Run, jax.Array]:
    """A run and the tokens it reads, `(1, time)`, once they are seen to be what is measured here."""
    run = load_run(directory)
    if (run.model.cell, run.model.gates) != ("ran", "recurrent"):
        got = f"{run.model.cell} with {run.model.gates} gates"
        raise UserError(f"--checkpoint {directory} must be a RAN with recurrent gates; got {got}.")
    valid = load_text(run, directory, "valid", options.data_dir)
    if len(valid) < (asked := max(1024, *options.lengths)):  # 512, and as many again, are always read
        raise UserError(f"{directory} must have {asked:,} tokens for validation; got {len(valid):,}.")
    return run, jnp.asarray(valid[None, :asked])


def main(options: Options) -> None:
    if not options.checkpoint:
        raise UserError("--checkpoint must be followed by at least one directory of a run.")
    for name, sizes in (("lengths", options.lengths), ("most", (options.most,))):
        if not (sizes and all(map(is_size, sizes))):
            got = ", ".join(map(str, sizes)) or "nothing"
            raise UserError(f"{flag(name)} must be whole numbers, each at least 1; got {got}.")
    runs = [(directory, *opened(directory, options)) for directory in options.checkpoint]
    options.out.mkdir(parents=True, exist_ok=True)
    rows, process = [], {"date": date.today().isoformat(), "device": device(), "versions": versions()}
    for directory, run, tokens in runs:
        lines = (json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines())
        epochs = 1 + int(np.argmin([line["valid_perplexity"] for line in lines if "valid_perplexity" in line]))
        fresh = run.model.init(jax.random.key(run.config.seed), tokens[:, :2], deterministic=True)["params"]
        for trained, params in ((epochs, run.params), (0, constraint(run.config.ablation)(fresh))):
            params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
            x = params["embed"]["embedding"][tokens]
            for layer, size in enumerate(run.model.sizes):
                cell = params[f"stack_{layer}"]["cell"]
                for row in study(cell, x, run.config.activation, trained > 0, options):
                    about = {"run": Path(directory).name, "dataset": Path(run.config.dataset).name, "epochs": trained}
                    about |= {"layer": layer + 1, "features": size, "activation": run.config.activation}
                    about |= {"dropout": run.config.dropout, **process}
                    rows.append(about | row)
                    print({key: value for key, value in rows[-1].items() if key != "residuals"}, flush=True)
                states, _ = ranjax.solve(cell, x, gates="recurrent", activation=run.config.activation)
                x = output(cell, states, run.config.activation)
    write_whole(options.out / "passes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, options.out / "residuals.png")


if __name__ == "__main__":
    import tyro

    jax.config.update("jax_enable_x64", True)
    with exit_with_message():
        main(tyro.cli(Options))
