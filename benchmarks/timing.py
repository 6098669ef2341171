"""Timing for the benchmarks.

Timings include `block_until_ready`. Functions that are compared are called in turn, round after round, so that
disturbances affect all of them.
"""

import datetime
import json
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # otherwise idle threads of one library spin while another runs


def alternate(calls: Mapping[str, Callable[[], Any]], *, seconds: float, rounds: tuple[int, int] = (5, 200)) -> dict:
    """Times every call once a round.

    The order is random in each round, so that the effects of a call on caches and threads are spread over all others.

    Args:
      calls: functions without arguments. Their results are waited for.
      seconds: time limit, after which no further round begins.
      rounds: the smallest and the largest number of rounds. One round more, for compilation, is not counted.

    Returns:
      The times of each call, in seconds, by name.
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


def repeated(call: Callable, arguments: tuple) -> tuple[Callable[[], Any], int]:
    """The function to time for a function of JAX, and the number of calls that it runs.

    On a CPU it is one call. On an accelerator calls are queued, and several calls below 0.2 ms are one program, in
    sequence and each on arrays of its own. Neither launches from Python nor warm caches are then timed.
    """
    import jax

    once = jax.jit(call)
    _wait(once(*arguments))
    if jax.default_backend() == "cpu":
        return (lambda: once(*arguments)), 1
    copies = _copies(_seconds(lambda: once(*arguments)), (arguments, once(*arguments)))
    if copies == 1:
        return _queued(lambda: once(*arguments), 1)

    @jax.jit
    def program(sets):
        results = []
        for each in sets:
            each, *_ = jax.lax.optimization_barrier((each, results[-1:]))
            results.append(call(*each))
        return results

    sets = [jax.tree.map(jax.numpy.copy, arguments) for _ in range(copies)]
    return _queued(lambda: program(sets), copies)


def repeated_torch(call: Callable, sets: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
    """`repeated` for PyTorch; `sets` returns new arguments. Launches that take longer than the work are timed."""
    import torch

    arguments = sets()
    if not torch.cuda.is_available():
        return (lambda: call(*arguments)), 1
    copies = _copies(_seconds(lambda: call(*arguments)), (arguments, call(*arguments)))
    every = [arguments, *(sets() for _ in range(copies - 1))]
    return _queued(lambda: [call(*arguments) for arguments in every], copies)


def _seconds(run: Callable[[], Any], calls: int = 5) -> float:
    """The approximate time of one of several queued calls."""
    _wait(run())
    start = time.perf_counter()
    _wait([run() for _ in range(calls)][-1])
    return (time.perf_counter() - start) / calls


def _copies(seconds: float, arrays: Any) -> int:
    """The number of calls that take 0.2 ms, as far as their arrays fit into 2 GiB."""
    import jax

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    return max(1, min(8, math.ceil(2e-4 / seconds), 2**31 // size))


def _queued(run: Callable[[], Any], copies: int) -> tuple[Callable[[], Any], int]:
    """A queue of calls that takes about 5 ms, and their number."""
    length = max(1, min(100, int(5e-3 / _seconds(run))))

    def runs():
        for _ in range(length):
            found = run()
        return found

    return runs, copies * length


def summary(times: list[float], count: int = 1) -> dict[str, float]:
    """Median and minimum of one call in milliseconds, for times of `count` calls each, and the number of times."""
    return {
        "median_ms": statistics.median(times) * 1e3 / count,
        "least_ms": min(times) * 1e3 / count,
        "rounds": len(times),
    }


def device() -> str:
    """The accelerator; or the processor and the number of cores available to this process."""
    import jax

    first = jax.devices()[0]
    if first.platform != "cpu":
        return first.device_kind
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores"


def stamp() -> dict[str, str]:
    """Device, date and versions of a result file."""
    import jax

    return {
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
    }


def write(out: Path, program: str, stamp: Mapping[str, Any], rows: list[dict]) -> Path:
    """Writes the rows of a program to its file in the folder `out`, named by device; returns the file."""
    name = re.sub(r"\W+", "-", stamp["device"].lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{program}-{name}.json"
    path.write_text(json.dumps({**stamp, "rows": rows}, indent=1))
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _wait(value: Any) -> None:
    """Waits for a value of JAX or of PyTorch."""
    import jax

    jax.block_until_ready(value)
    if any(type(leaf).__module__.startswith("torch") and leaf.is_cuda for leaf in jax.tree.leaves(value)):
        import torch

        torch.cuda.synchronize()
