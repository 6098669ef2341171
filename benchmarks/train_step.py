"""Training steps of a RAN, an LSTM, flax's `nn.RNN` and PyTorch's LSTM and GRU: `python benchmarks/train_step.py`.

Language models of the same sizes, on the same batch, without dropout, with clipping by global norm, plain SGD and a
carried state: only the cell and the library differ. Steps alternate in blocks, so that disturbances affect all of them.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import timing

from ranjax import cli

RESULTS = Path(__file__).parent / "results"
SIZES = {  # features of both layers, batch, steps
    "small": (200, 20, 35),
    "medium": (650, 20, 35),
    "large": (1024, 64, 512),
    "long": (650, 16, 1024),
    "longest": (650, 2, 8192),
}
VOCABULARY = 10_000
BLOCK = 5  # steps timed together
WINDOWS = 4  # of text


@dataclasses.dataclass(frozen=True)
class Options:
    """Whole training steps against PyTorch's.

    Attributes:
      sizes: small and medium (2 x 200 and 2 x 650, batches of 20, 35 steps); for a GPU large (2 x 1024, 64, 512 steps),
        long (2 x 650, 16, 1024 steps) and longest (2 x 650, 2, 8192 steps), both with the fixed point solver too.
      seconds: time limit of the rounds of one size.
      out: folder of the results.
    """

    sizes: tuple[Literal["small", "medium", "large", "long", "longest"], ...] = ("small", "medium")
    seconds: float = 60.0
    out: Path = RESULTS


def ranjax_steps(features: int, batch: int, steps: int, **options):
    """A call that trains for BLOCK steps and returns the parameters, and one that returns the mean iterations."""
    import jax.numpy as jnp
    import numpy as np

    from ranjax.training.config import Config
    from ranjax.training.model import build_model
    from ranjax.training.optimizer import make_optimizer
    from ranjax.training.step import initial_state, make_step

    config = Config(
        features=(features,), batch_size=batch, steps=steps, dropout=0.0, tie=False, optimizer="sgd",
        learning_rate=0.1, schedule="constant", **options,
    )  # fmt: skip
    model = build_model(config, VOCABULARY)
    optimizer = make_optimizer(config, 1)
    text = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (batch, WINDOWS * steps + 1)), jnp.int32)
    step, state = make_step(model, optimizer, config, windows=WINDOWS), [initial_state(model, optimizer, config)]

    def run():
        for _ in range(BLOCK):
            state[0] = step(state[0], text)
        return state[0].params

    def iterations():
        """Mean over the layers and the epoch so far; 100 if every solve failed."""
        return float(state[0].iterations) / ((int(state[0].step) - 1) % WINDOWS + 1)

    return run, iterations


def torch_cells(steps: int) -> dict:
    """PyTorch's cells, and for short windows a RAN in PyTorch if it is installed (it loops in Python)."""
    import torch

    cells = {"PyTorch nn.LSTM": torch.nn.LSTM, "PyTorch nn.GRU": torch.nn.GRU}
    if steps > 100:
        return cells
    try:
        import torchrecurrent
    except ImportError:
        return cells
    return cells | {"torchrecurrent RAN": torchrecurrent.RAN}


def torch_steps(features: int, batch: int, steps: int, cell):
    """A call that trains a PyTorch model of the same sizes for BLOCK steps."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # as JAX's default on a GPU
    torch.manual_seed(0)
    embed = torch.nn.Embedding(VOCABULARY, features).to(device)
    stack = cell(features, features, num_layers=2).to(device)
    decode = torch.nn.Linear(features, VOCABULARY).to(device)
    parameters = [p for module in (embed, stack, decode) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    text = torch.randint(VOCABULARY, (WINDOWS * steps + 1, batch), device=device)
    state = [None, 0]

    def detached(carry):
        return tuple(c.detach() for c in carry) if isinstance(carry, tuple) else carry.detach()

    def run():
        for _ in range(BLOCK):
            first = state[1] % WINDOWS * steps
            window = text[first : first + steps + 1]
            hidden, carry = stack(embed(window[:-1]), state[0])
            logits = decode(hidden).reshape(-1, VOCABULARY)
            loss = torch.nn.functional.cross_entropy(logits, window[1:].reshape(-1), reduction="sum") / batch
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            state[:] = detached(carry), state[1] + 1
        return decode.weight

    return run


def measure(features: int, batch: int, steps: int, seconds: float) -> list[dict]:
    """The rows of one size."""
    from flax import linen as nn

    from ranjax.scan import unroll

    ours = {
        f"RAN, {gates} gates": ranjax_steps(features, batch, steps, gates=gates)
        for gates in ("recurrent", "diagonal", "input")
    }
    if steps > 1000:
        ours["RAN, recurrent gates, fixed point"] = ranjax_steps(features, batch, steps, solver="fixed_point")
    ours["LSTM"] = ranjax_steps(features, batch, steps, cell="lstm")
    with mock.patch("ranjax.lm.Stepwise", partial(nn.RNN, time_major=True, return_carry=True, unroll=unroll())):
        ours["flax nn.RNN(OptimizedLSTMCell)"] = ranjax_steps(features, batch, steps, cell="lstm")
        ours["flax nn.RNN(OptimizedLSTMCell)"][0]()  # traced here
    calls = {name: run for name, (run, _) in ours.items()}
    calls |= {name: torch_steps(features, batch, steps, cell) for name, cell in torch_cells(steps).items()}
    times = timing.alternate(calls, seconds=seconds)
    rows = []
    for name, found in times.items():
        found = timing.summary(found)
        rows.append(
            {
                "name": name,
                "features": features,
                "batch": batch,
                "steps": steps,
                "step_ms": round(found["median_ms"] / BLOCK, 3),
                "step_least_ms": round(found["least_ms"] / BLOCK, 3),
                "tokens_per_second": round(batch * steps * BLOCK / found["median_ms"] * 1e3),
                "rounds": found["rounds"],
                "mean_iterations": ours[name][1]() if name in ours else 0,
            }
        )
    lstm = next(row for row in rows if row["name"] == "PyTorch nn.LSTM")
    return [row | {"over_torch_lstm": round(lstm["step_ms"] / row["step_ms"], 2)} for row in rows]


def main(options: Options) -> None:
    import torch

    stamp, rows = timing.stamp() | {"torch": torch.__version__}, []
    for size in options.sizes:
        features, batch, steps = SIZES[size]
        found = measure(features, batch, steps, options.seconds)
        rows += found
        print(f"2 x {features}, batch {batch}, {steps} steps, vocabulary {VOCABULARY:,}")
        for row in found:
            print(
                "  {name:34} {step_ms:8.2f} ms a step (least {step_least_ms:.2f}), {tokens_per_second:9,} tokens/s, "
                "{over_torch_lstm:.2f} times PyTorch's LSTM, {mean_iterations:.1f} iterations".format(**row),
                flush=True,
            )
        timing.write(options.out, "train-step", stamp, rows)


if __name__ == "__main__":
    cli.start(lambda: main(cli.options(Options, None, "python benchmarks/train_step.py")), huge_pages=True)
