"""A training step spread over devices, by mesh: `python benchmarks/train_mesh.py` writes results/ and prints a table.

For each mesh: the bytes of the results of the step's collectives and the memory of one device, both from the compiled
program, and the largest deviation of the loss from that on one device, relative to it. On a CPU the devices are
simulated and share the cores, so no time is measured.
"""

import dataclasses
import json
import os
from datetime import date
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # simulated, on a CPU

import jax
import numpy as np
from scaling import received

from ranjax import cli
from ranjax.training.config import Config, check
from ranjax.training.cost import step_bytes
from ranjax.training.mesh import make_mesh, put, put_text, shardings
from ranjax.training.model import build_model
from ranjax.training.optimizer import make_optimizer
from ranjax.training.report import device
from ranjax.training.step import initial_state, make_step
from ranjax.training.windows import Steps

MODELS = {
    "RAN, recurrent gates": {},
    "RAN, input gates, residual blocks": {"gates": "input", "block": "residual"},
    "LSTM": {"cell": "lstm"},
}
MESHES = "data=1", "data=2", "data=4", "data=8", "data=4,model=2", "data=1,model=8", "data=2,time=4"


@dataclasses.dataclass(frozen=True)
class Options:
    """A training step spread over devices.

    Attributes:
      features: of two layers.
      vocabulary: number of tokens.
      batch: sequences of a step.
      steps: of a sequence.
      losses: how many steps are trained to compare their losses.
      out: folder of the results.
    """

    features: int = 256
    vocabulary: int = 10_000
    batch: int = 16
    steps: int = 64
    losses: int = 5
    out: Path = Path(__file__).parent / "results"


def measured(options: Options, mesh: str, model: dict) -> dict:
    """One row, with the losses of the first steps."""
    config = Config(features=(options.features,), batch_size=options.batch, steps=options.steps, mesh=mesh, dropout=0.0)
    config = dataclasses.replace(config, **model)
    check(config)
    devices, windows = make_mesh(config), options.losses
    network, optimizer = build_model(config, options.vocabulary), make_optimizer(config, windows)
    state = initial_state(network, optimizer, config)
    state = put(state, shardings(devices, state))
    ids = np.random.default_rng(0).integers(0, options.vocabulary, (options.batch, windows * options.steps + 1))
    text = put_text(devices, ids.astype(np.int32))
    steps = Steps(make_step(network, optimizer, config, windows, mesh=devices), state, text, config, windows)
    row = {"mesh": mesh, "parameters": sum(p.size for p in jax.tree.leaves(state.params))}
    row |= {"bytes": step_bytes(steps.longest), "collectives": received(steps.longest.as_text())}
    losses = []
    for n in range(windows):
        state = steps(state, text, n)
        losses.append(float(state.loss))
    return row | {"losses": losses}


def main(options: Options) -> None:
    """The table, row by row, and the file."""
    rows = []
    for name, model in MODELS.items():
        for mesh in MESHES:
            if "time" in mesh and "cell" in model:
                continue
            row = {"model": name} | measured(options, mesh, model)
            first = next(one for one in [*rows, row] if one["model"] == name)["losses"]
            row["deviation"] = float(np.max(np.abs(np.array(row["losses"]) / first - 1)))
            rows.append(row)
            kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sorted(row["collectives"].items())) or "-"
            print(f"| {name} | {mesh} | {kinds} | {row['bytes'] / 1e6:.1f} | {row['deviation']:.1e} |", flush=True)
    found = {"device": device(), "date": date.today().isoformat(), "jax": jax.__version__, "rows": rows}
    options_of = {name: value for name, value in vars(options).items() if name != "out"}
    (options.out / "train-mesh.json").write_text(json.dumps(found | {"options": options_of}, indent=1) + "\n")


if __name__ == "__main__":
    main(cli.options(Options, None, "python benchmarks/train_mesh.py"))
