"""The one clock of the benchmarks.

A time runs from the call until the value that the call returned is there. Functions that are compared are called in
turn, round after round, so that whatever else the machine does falls on all of them.
"""

import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def alternate(calls: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: tuple[int, int] = (5, 200)) -> dict:
    """Times every call once a round, for about so many seconds in all: the list of its times, in seconds, by name.

    The order is drawn anew each round: what a call leaves behind, in caches and threads, falls on all the others.

    Args:
      calls: functions without arguments. What they return is waited for.
      seconds: after which no further round begins.
      rounds: the least and the most of them. One round before them is not counted: it compiles and warms up.
    """
    for call in calls.values():
        _wait(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, order, shuffle = time.perf_counter(), list(calls), random.Random(0).shuffle
    for n in range(rounds[1]):
        if n >= rounds[0] and time.perf_counter() - begin > seconds:
            break
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            _wait(calls[name]())
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and least, in milliseconds, and of how many."""
    return {"median_ms": statistics.median(times) * 1e3, "least_ms": min(times) * 1e3, "rounds": len(times)}


def device() -> str:
    """The accelerator, or the processor and its cores as this process may use them."""
    import jax

    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def stamp() -> dict[str, str]:
    """What a result file says of where and when it was made."""
    import jax

    return {
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _wait(value: Any) -> None:
    """Until a value is there, be it JAX's or PyTorch's."""
    import jax

    jax.block_until_ready(value)
    if any(type(leaf).__module__.startswith("torch") and leaf.is_cuda for leaf in jax.tree.leaves(value)):
        import torch

        torch.cuda.synchronize()
