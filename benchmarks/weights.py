"""The cost of interpretation: `python benchmarks/weights.py` writes results/ and prints a table.

The strongest sources of 100,000 states of 64 components, with gates that forget and with gates that never do: seconds,
temporary memory, and the largest relative deviation from float64 at some steps. Also the explanation of 500 tokens by
an untrained model of 2 x 650 with a vocabulary of 10,000: seconds from the text to the page, compilation included, and
the size of the page.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing

from ranjax import LanguageModel, cli, weights
from ranjax.data.vocabulary import Words
from ranjax.interpret.explanation import explain
from ranjax.interpret.render import write_page
from ranjax.training.config import Config
from ranjax.training.model import Run


@dataclasses.dataclass(frozen=True)
class Options:
    """The cost of interpretation.

    Attributes:
      time: steps of the long sequence.
      features: components of its states.
      out: folder of the results.
    """

    time: int = 100_000
    features: int = 64
    out: Path = Path(__file__).parent / "results"


def strongest(name: str, f: jax.Array, reduce: str) -> dict:
    """The row of one sequence and reduction: its 5 strongest sources."""
    keys = jax.random.split(jax.random.key(0), 2)
    parts = weights.Decomposition(jax.random.uniform(keys[0], f.shape), f, jax.random.normal(keys[1], f.shape), f, f[0])
    program = jax.jit(weights.top, static_argnums=(1, 2)).lower(parts, 5, reduce).compile()
    values = np.asarray(program(parts)[0])
    times = timing.alternate({name: lambda: program(parts)}, seconds=5, rounds=(3, 20))
    i, f = np.asarray(parts.i, np.float64), np.asarray(f, np.float64)
    worst = 0.0
    for t in (10, len(f) // 2, len(f) - 1):
        w = i[: t + 1] * np.append(np.cumprod(f[t:0:-1], axis=0)[::-1], np.ones((1, f.shape[1])), axis=0)
        expected = np.sort(w.max(1) if reduce == "max" else np.linalg.norm(w, axis=1))[::-1][:5]
        worst = max(worst, float(np.max(np.abs(values[t] - expected) / expected)))
    return {
        "name": f"top 5 by {reduce}, {name}", "time": len(f), "features": f.shape[1],
        "seconds": round(timing.summary(times[name])["median_ms"] / 1e3, 3),
        "temporary_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20), "deviation": worst,
    }  # fmt: skip


def read(tokens: int = 500) -> dict:
    """The row of the explanation of a text."""
    words = (*(f"w{n}" for n in range(9_998)), "<unk>", "<eos>")
    model, ids = LanguageModel(len(words), features=650), np.random.default_rng(0).integers(0, len(words), tokens)
    params = model.init(jax.random.key(0), ids[None, :2], deterministic=True)["params"]
    with tempfile.TemporaryDirectory() as folder:
        begin, page = time.perf_counter(), Path(folder) / "page.html"
        run, text = Run(Config(), Words(words), model, params), " ".join(words[i] for i in ids)
        write_page(explain(run, text), 1, page)
        seconds, size = time.perf_counter() - begin, page.stat().st_size
    return {"name": "explain, 2 x 650", "tokens": tokens, "seconds": round(seconds, 2), "page_mb": round(size / 1e6, 2)}


def main(options: Options) -> None:
    shape = options.time, options.features
    forgets = jax.nn.sigmoid(jax.random.normal(jax.random.key(2), shape) + jnp.linspace(-2, 4, shape[1]))
    rows = [read()]
    for name, f in (("gates forget", forgets), ("no gate ever does", jnp.ones(shape))):
        rows += [strongest(name, f, reduce) for reduce in ("l2", "max")]
    for row in rows:
        print(row, flush=True)
    timing.write(options.out, "weights", timing.stamp(), rows)


if __name__ == "__main__":
    cli.start(lambda: main(cli.options(Options, None, "python benchmarks/weights.py")), huge_pages=True)
