"""A run of several processes: each computes on devices of its own, the first one reads and writes the directory.

What one of them finds out, a wish to stop, the time, an error, all of them must act on at the same step, since a step
waits for all. With one process every function here returns what it is given.
"""

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from ranjax.errors import UserError
from ranjax.training.flags import Cluster

T = TypeVar("T")


def join(cluster: Cluster) -> None:
    """Makes this process one of several; before anything else is asked of JAX.

    Raises:
      UserError: where the others are not found.
    """
    try:
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"--distributed: {why}. Start all processes within five minutes; where neither a TPU pod nor SLURM says "
            "which they are, give --coordinator HOST:PORT, --processes and --process."
        ) from None


@contextmanager
def ending(seconds: float = 10.0) -> Iterator[None]:
    """Ends this process some time after an error, also if others do not end: JAX would wait for them first.

    They wait for this one, too, at their next step or exchange; once it is gone, JAX ends them.
    """
    try:
        yield
    except BaseException:
        if not alone():
            timer = threading.Timer(seconds, os._exit, (1,))
            timer.daemon = True
            timer.start()
        raise


def alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that reads and writes the run's directory."""
    return jax.process_index() == 0


def agree(settings: Any) -> None:
    """Raises a UserError in all processes if they have different settings, or different texts."""
    if alone():
        return
    sums = process_allgather(np.uint32(zlib.crc32(repr(settings).encode())))
    if len(set(sums.tolist())) > 1:
        differ = [n for n, one in enumerate(sums.tolist()) if one != sums[0]]
        raise UserError(
            f"processes {', '.join(map(str, differ))} have other settings, or another text, than process 0. Start all "
            "with the same flags and the same data."
        )


def say(*lines: str) -> None:
    """Prints sentences, in the first process only."""
    if is_first():
        print(*(f"{line}." for line in lines), sep="\n", flush=True)


def on_first(call: Callable[[], T], otherwise: T) -> T:
    """What `call` returns, in the first process; `otherwise`, without a call, in the others.

    Raises:
      UserError: in all processes, if the call did.
    """
    if alone():
        return call()
    result, error = otherwise, None
    if is_first():
        try:
            result = call()
        except UserError as refused:
            error = refused
    failed = bool(broadcast_one_to_all(np.int32(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise UserError("process 0 has refused to go on; it says why.")
    return result


def from_first(tree: Any) -> Any:
    """The arrays that the first process has, in all of them."""
    return tree if alone() else broadcast_one_to_all(jax.tree.map(np.asarray, tree))


def decided(seconds: float, signal: int | None, due: bool) -> tuple[float, int | None, bool]:
    """What all processes go by after a burst of steps.

    Args:
      seconds: that it took; the first one's clock counts.
      signal: that asks to stop; any one's counts.
      due: whether it is time to save; the first one's counts.
    """
    if alone():
        return seconds, signal, due
    found = process_allgather(np.array([seconds, signal or 0, due], np.float64))
    signals = int(found[:, 1].max())
    return float(found[0, 0]), signals or None, bool(found[0, 2])


def whole(tree: Any) -> Any:
    """The arrays in full, also those whose parts are on devices of other processes. All processes must call it."""

    def one(a):
        if a.is_fully_addressable:
            return a
        return a.addressable_data(0) if a.is_fully_replicated else process_allgather(a, tiled=True)

    return tree if alone() else jax.tree.map(one, tree)
