"""Trees of arrays as files: the only module that knows orbax."""

import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

PLAIN = re.compile(r"[\w./ -]*", re.ASCII)


def save_arrays(folder: Path, name: str, tree: Any) -> None:
    """Writes a tree of arrays to a folder's sub-folder `name`, which is not there yet.

    Raises:
      OSError: where the system refuses it, as on a disk that is full.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False  # threads would wait for one that is refused
    with _plain(folder) as path, _refused_as_oserror(), context:
        ocp.save_checkpointables(f"{path}/{name}", {"tree": tree})


def saved_shapes(folder: Path, name: str) -> list[tuple[int, ...]]:
    """The shapes of the arrays that `save_arrays` wrote."""
    from orbax.checkpoint import v1 as ocp

    with _plain(folder) as path:
        tree = ocp.checkpointables_metadata(f"{path}/{name}").metadata["tree"]
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def load_arrays(folder: Path, name: str, like: Any) -> Any:
    """The tree that `save_arrays` wrote, on the first device.

    Args:
      folder, name: as they were given to `save_arrays`.
      like: a tree of arrays or of `jax.ShapeDtypeStruct`, as it was saved.
    """
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
    with _plain(folder) as path:
        return ocp.load_checkpointables(f"{path}/{name}", {"tree": abstract})["tree"]


@contextmanager
def _plain(folder: Path) -> Iterator[str]:
    """A path of the folder without special characters: orbax reads it as a pattern, tensorstore as UTF-8."""
    if PLAIN.fullmatch(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = os.path.join(place, "folder")
        os.symlink(folder, link, target_is_directory=True)
        yield link


@contextmanager
def _refused_as_oserror() -> Iterator[None]:
    """Orbax has a ValueError for what the system refuses, and its threads report it once more each.

    They outlive a save that has failed and go on writing, so they are waited for. Those of tensorstore cannot be: what
    hides their reports stays then.
    """
    before = set(threading.enumerate())
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [log.level for log in logs], sys.unraisablehook
    for log in logs:
        log.setLevel(logging.CRITICAL)
    if not isinstance(hook, _WithoutLateThreads):
        sys.unraisablehook = _WithoutLateThreads(hook)
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        _join(set(threading.enumerate()) - before)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _join(threads: set[threading.Thread]) -> None:
    """Waits for those of orbax, some seconds at most."""
    end = time.monotonic() + 5
    for thread in threads:
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # its own, once more
                thread.join(max(0, end - time.monotonic()))


@dataclass(frozen=True)
class _WithoutLateThreads:
    """A `sys.unraisablehook` without the reports of threads of tensorstore that the event loop is gone."""

    previous: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.previous(unraisable)
