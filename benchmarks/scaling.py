"""Time spread over the devices of a mesh: `python benchmarks/scaling.py` writes results/ and prints a table.

The gradient of a recurrence, and of RAN layers, over sequences of growing length on 1, 2, 4, ... devices: milliseconds,
the memory of one device (arguments, results and temporaries), and the bytes of the results of collectives (a device's
own part included), from the compiled program. On a CPU the devices are simulated and share the cores: memory and bytes
are valid, times are not.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # simulated, on a CPU

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ranjax
from ranjax import cli
from ranjax.figure import blank_figure

TIME = P(None, "time")
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(")
BYTES = {"f32": 4, "f64": 8, "s32": 4, "u32": 4, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time spread over the devices of a mesh.

    Attributes:
      devices: numbers of devices; those above the number available are skipped.
      lengths: numbers of steps.
      features: of the states and of the inputs.
      seconds: time limit of the rounds of one length.
      out: folder of the results.
    """

    devices: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (4096, 16384, 65536)
    features: int = 128
    seconds: float = 10.0
    out: Path = Path(__file__).parent / "results"


def layer(gates: str, key: jax.Array, features: int) -> tuple[Callable, tuple]:
    """A layer's outputs as a function of the mesh axis, its parameters and its inputs; and the parameters."""
    cell = ranjax.RANCell(features, gates, bias_init=lambda *_: jnp.full(features, 3.0))  # long memory
    variables = ranjax.RAN(cell).init(key, jnp.zeros((1, 2, features)))

    def outputs(axis_name, variables, x):
        return ranjax.RAN(cell, axis_name=axis_name).apply(variables, x)

    return outputs, (variables,)


def cases(features: int) -> dict[str, tuple[Callable, tuple]]:
    """By name, a function of the mesh axis, of replicated arrays and of a sequence; and these arrays."""

    def recurrence(axis_name, x):
        return ranjax.linear_recurrence(jax.nn.sigmoid(x + 6), x, axis_name=axis_name)  # half-lives of some 170 steps

    key = jax.random.key(0)
    found = {"linear_recurrence": (recurrence, ())}
    return found | {f"RAN, {gates} gates": layer(gates, key, features) for gates in ranjax.cell.GATES}


def compiled(function: Callable, arrays: tuple, x: jax.Array, count: int) -> tuple[Callable, Callable]:
    """The compiled gradient over `count` devices, and a call of it."""
    mesh = jax.make_mesh((count,), ("time",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    over = jax.shard_map(partial(function, "time"), mesh=mesh, in_specs=(*(P() for _ in arrays), TIME), out_specs=TIME)
    gradient = jax.grad(lambda *a: jnp.sum(jnp.square(over(*a))), tuple(range(len(arrays) + 1)))
    placed = (
        *(jax.device_put(a, NamedSharding(mesh, P())) for a in arrays),
        jax.device_put(x, NamedSharding(mesh, TIME)),
    )
    program = jax.jit(gradient).lower(*placed).compile()
    return program, lambda: program(*placed)


def received(text: str) -> dict[str, int]:
    """Bytes that a device receives, by collective; those in a loop are counted once, not for each iteration."""
    total: dict[str, int] = {}
    for shapes, name in COLLECTIVE.findall(text):
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = 1
            for size in filter(None, sizes.split(",")):
                count *= int(size)
            total[name] = total.get(name, 0) + count * BYTES.get(kind, 4)
    return total


def deviation(found: tuple, expected: tuple) -> float:
    """The largest deviation of all gradients, each relative to its largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def measure(name: str, length: int, options: Options) -> list[dict]:
    """The rows of one case and length."""
    function, arrays = cases(options.features)[name]
    x = jax.random.normal(jax.random.key(1), (1, length, options.features))
    counts = [count for count in options.devices if count <= jax.device_count()]
    programs = {count: compiled(function, arrays, x, count) for count in counts}
    times = timing.alternate({count: call for count, (_, call) in programs.items()}, seconds=options.seconds)
    first = jax.device_get(programs[counts[0]][1]())
    rows = []
    for count, (program, call) in programs.items():
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        rows.append({
            "name": name, "devices": count, "time": length, "features": options.features,
            "gradient_ms": round(timing.summary(times[count])["median_ms"], 3),
            "mib_per_device": round(held / 2**20, 3),
            "arrays_of_the_whole": round(held / x.nbytes, 2),
            "received_bytes": received(program.as_text()),
            "deviation": deviation(jax.device_get(call()), first),
        })  # fmt: skip
    return rows


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Memory of one device against the length, one panel for each case."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = blank_figure(3.2 * len(names) + 1, 3.4)
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for count in dict.fromkeys(row["devices"] for row in rows):
            points = [(r["time"], r["mib_per_device"]) for r in rows if (r["name"], r["devices"]) == (name, count)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{count} devices")
        axes.set(xscale="log", yscale="log", xlabel="length", title=name)
        lengths = sorted({row["time"] for row in rows})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xticks([], minor=True)
    figure.supylabel("gradient, MiB a device")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    stamp, rows = timing.stamp(), []
    for case in cases(options.features):
        for length in options.lengths:
            found = measure(case, length, options)
            rows += found
            for row in found:
                print(
                    "{name:22} {time:6} steps, {devices} devices: {gradient_ms:9.1f} ms, {mib_per_device:8.2f} MiB a "
                    "device, receives {received_bytes}, deviation {deviation:.1e}".format(**row),
                    flush=True,
                )
            path = timing.write(options.out, "scaling", stamp, rows)
    draw(rows, path.with_suffix(".png"), f"{stamp['device']}, {stamp['date']}, jax {stamp['jax']}")


if __name__ == "__main__":
    cli.start(lambda: main(cli.options(Options, None, "python benchmarks/scaling.py")), huge_pages=True)
