"""The number of iterations of the fixed point on trained models.

    python experiments/convergence/run.py --checkpoint RUN --data-dir DIR

For runs of ranjax.train with recurrent gates, as trained and at initialisation: the residual of every iteration of each
layer, and its distance from the states of the sequential scan, over lengths and over scaled weights on h, for several
iterations. In float64, on the validation text, with batch 1. The iterations to a level are those run before the states
whose residual is at most that level. passes.jsonl has the counts, residuals.png the residuals; rows of other runs are
kept.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from iterations import chunks, variants

from ranjax import RAN, cli
from ranjax.cell import Params
from ranjax.errors import UserError, flag, is_size
from ranjax.figure import blank_figure
from ranjax.training.model import Run, load_run
from ranjax.training.report import device, versions
from ranjax.training.run import load_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
USUAL = ("diagonal", "frozen", "float32", "not averaged")  # at all lengths
COMPARED = 512  # steps at which everything else is compared
CHUNKS = {2048: (128, 512, 1024, 2048), 16384: (512, 1024)}  # sizes, by length


@dataclass(frozen=True)
class Options:
    """Counts the iterations of the fixed point on trained models."""

    checkpoint: tuple[str, ...]
    """Directories of runs."""
    data_dir: str | None = None
    """Folder of the data sets."""
    lengths: tuple[int, ...] = (35, 128, 512, 2048, 16384)
    """Numbers of steps; everything but the length is compared at 512."""
    scales: tuple[float, ...] = (2, 4, 8, 16)
    """Factors of the weights on h."""
    most: int = 60
    """The largest number of iterations."""
    out: Path = HERE
    """Folder of the results."""


def measure(params: Params, x: jax.Array, activation: str, trained: bool, options: Options) -> list[dict[str, Any]]:
    """The rows of one layer.

    Args:
      params: of the layer.
      x: its inputs, `(1, time, in)`.
      activation: of the layer.
      trained: if not, only the usual iterations are compared.
      options: of the study.
    """
    kernel, rows = params["gates"]["recurrent_kernel"], []
    norm = max(float(jnp.linalg.norm(kernel[:, gate], 2)) for gate in range(2))
    lengths = [(time, 1.0) for time in options.lengths]
    scales = [(COMPARED, scale) for scale in options.scales]
    for time, scale in lengths + scales:
        scaled = {**params, "gates": {**params["gates"], "recurrent_kernel": scale * kernel}}
        compared = variants(scaled, x[:, :time], activation, options.most, x[:, time : 2 * time])
        names = USUAL if scale == 1 else ("diagonal",)
        if trained and (time, scale) == (COMPARED, 1):
            names = tuple(compared)
        common = {"time": time, "scale": scale, "spectral_norm": round(scale * norm, 2)}
        rows += [{"iteration": name, **common, **compared[name]()} for name in names]
        for size in CHUNKS.get(time, ()):
            counts = chunks(scaled, x[:, :time], activation, size)
            rows.append({"iteration": f"windows of {size}", **common, **counts})
    return rows


def measure_layers(run: Run, params: Params, tokens: jax.Array, epochs: int, options: Options) -> Iterator[dict]:
    """The rows of all layers of a model with these parameters, trained for so many epochs, in float64."""
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    activation, inputs = run.config.activation, inputs_of_layers(run, params, tokens)
    for layer, (size, x) in enumerate(zip(run.model.sizes, inputs, strict=True)):
        cell = params[f"stack_{layer}"]["cell"]
        about = {"epochs": epochs, "layer": layer + 1, "features": size, "activation": activation}
        about |= {"dropout": run.config.dropout}
        about |= {"block": run.config.block}
        for row in measure(cell, x, activation, epochs > 0, options):
            yield about | row


def inputs_of_layers(run: Run, params: Params, tokens: jax.Array) -> list[jax.Array]:
    """What the RAN of each layer reads, `(1, time, in)`."""
    found = []

    def keep(call, args, kwargs, context):
        if isinstance(context.module, RAN) and context.method_name == "__call__":
            found.append(jnp.swapaxes(args[0], 0, 1) if context.module.time_major else args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        run.model.apply({"params": params}, tokens, deterministic=True, method="hidden")
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The residual of every iteration, with one panel for each trained layer."""
    rows = [row for row in rows if row["epochs"] and row["scale"] == 1 and "residuals" in row]
    runs, layers, times = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "layer", "time"))
    columns, lines = 2 * len(layers), (len(runs) + 1) // 2  # two runs a line
    figure = blank_figure(3.2 * columns + 2, 3 * lines)
    panels = [(run, layer) for run in runs for layer in layers]
    for number, (run, layer) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, number, sharey=figure.axes[0] if figure.axes else None)
        draw_layer(axes, [row for row in rows if (row["run"], row["layer"]) == (run, layer)], times)
        axes.set_title(f"{run}, layer {layer}")
    figure.supxlabel("iteration")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.supylabel("one-step residual, relative")
    figure.savefig(path, dpi=110)


def draw_layer(axes: "Axes", rows: list[dict[str, Any]], times: list[int]) -> None:
    """The panel of one layer."""
    lines = {"diagonal": "-", "frozen": ":"}
    for row in rows:
        name = row["iteration"]
        if name in lines:
            style = f"C{times.index(row['time'])}{lines[name]}"
            axes.plot(row["residuals"], style, label=f"{name}, T = {row['time']:,}")
    axes.set_yscale("log")


def opened(directory: str, options: Options) -> tuple[Run, jax.Array]:
    """A run and its validation tokens, `(1, time)`, after a check that the study can use them."""
    run = load_run(directory)
    if (run.model.cell, run.model.gates) != ("ran", "recurrent"):
        got = f"{run.model.cell} with {run.model.gates} gates"
        raise UserError(f"--checkpoint {directory} must be a RAN with recurrent gates; got {got}.")
    valid = load_text(run, directory, "valid", options.data_dir)
    needed = max(2 * COMPARED, *options.lengths)  # the other text is as long as the first
    if len(valid) < needed:
        raise UserError(f"{directory} must have {needed:,} tokens for validation; got {len(valid):,}.")
    return run, jnp.asarray(valid[None, :needed])


def best_epoch(directory: str) -> int:
    """The epoch of the lowest validation perplexity, whose parameters the run has kept."""
    lines = (Path(directory) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return 1 + int(np.argmin([row["valid_perplexity"] for row in rows if "valid_perplexity" in row]))


def check(options: Options) -> None:
    """Raises a UserError for options out of their range."""
    if not options.checkpoint:
        raise UserError("--checkpoint must be followed by at least one directory of a run.")
    for name, sizes in (("lengths", options.lengths), ("most", (options.most,))):
        if not (sizes and all(map(is_size, sizes))):
            got = ", ".join(map(str, sizes)) or "nothing"
            raise UserError(f"{flag(name)} must be whole numbers, each at least 1; got {got}.")


def main(options: Options) -> None:
    """The study."""
    check(options)
    runs = [(directory, *opened(directory, options)) for directory in options.checkpoint]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "passes.jsonl"
    names = {Path(directory).name for directory in options.checkpoint}
    kept = map(json.loads, path.read_text("utf-8").splitlines() if path.exists() else ())
    rows = [row for row in kept if row["run"] not in names]
    process = {"date": date.today().isoformat(), "device": device(), "versions": versions()}
    for directory, run, tokens in runs:
        fresh = run.model.init(jax.random.key(run.config.seed), tokens[:, :2], deterministic=True)["params"]
        of_run = {"run": Path(directory).name, "dataset": Path(run.config.dataset).name}
        for epochs, params in ((best_epoch(directory), run.params), (0, fresh)):
            for row in measure_layers(run, params, tokens, epochs, options):
                rows.append(of_run | process | row)
                print({key: value for key, value in rows[-1].items() if key != "residuals"}, flush=True)
    cli.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, options.out / "residuals.png")


def program() -> None:
    """The command line of the study."""
    with cli.exit_with_message():
        main(cli.options(Options, None, "python experiments/convergence/run.py"))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    cli.start(program)
