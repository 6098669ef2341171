"""Trees of arrays as files: the only module that knows orbax."""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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

    with _plain(folder) as path, _refused_as_oserror():
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
    """Orbax has a ValueError for what the system refuses, and its threads report it once more each."""
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    except BaseException as error:
        _hide_late_threads()
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if isinstance(error, OSError) or code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _hide_late_threads() -> None:
    """Threads of tensorstore outlive a save that has failed, and each reports that the event loop is gone by then."""
    previous = sys.unraisablehook
    if getattr(previous, "of_ranjax", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    hook.of_ranjax = True
    sys.unraisablehook = hook
