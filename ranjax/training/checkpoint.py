"""Saving and loading of trees of arrays: the only file that knows orbax."""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from ranjax.errors import UserError


class Checkpoints:
    """The two checkpoints of a run: the latest full training state, and the parameters that validated best.

    Both are written beside the old one and replace it only when complete, so that a kill at any moment leaves
    one to go on from.

    Args:
      directory: of the run; absolute.
    """

    def __init__(self, directory: Path):
        self.run, self.directory = directory, directory / "checkpoints"

    def save(self, kind: str, number: int, tree: Any) -> None:
        """Saves `tree` as the newest checkpoint of its kind, `"latest"` or `"best"`, and drops the older ones.

        Raises:
          OSError: where the system refuses it, as on a disk that is full; what was saved before is intact.
        """
        # What a save that was killed has left goes, too: this one is by a training, of which a run has one at a time.
        with _refused_as_oserror(), self._open(kind, cleanup_tmp_directories=True) as checkpointer:
            if number not in [saved.step for saved in checkpointer.checkpoints]:
                checkpointer.save_checkpointables(number, {"tree": tree}, force=True)

    def load(self, kind: str, like: Any) -> Any:
        """Loads the newest checkpoint of a kind, also while a training saves newer ones.

        Args:
          kind: `"latest"` or `"best"`.
          like: a tree of arrays or of `jax.ShapeDtypeStruct`, as it was saved.

        Raises:
          UserError: if there is none, if it is damaged, or if it is not a tree of these shapes.
        """
        out = shlex.quote(str(self.run))
        why = {
            "best": f"no epoch of it has been validated. Go on with: python -m ranjax.train --out {out} --resume",
            "latest": "it had one from its beginning. Restore it, or train again.",
        }
        none = UserError(f"{self.run} has no {kind} checkpoint: {why[kind]}")
        folder = self.directory / kind
        if not folder.is_dir():
            raise none
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), like)
        while True:
            before = os.listdir(folder)
            try:
                with self._open(kind) as checkpointer:
                    if checkpointer.latest is None:
                        raise none
                    saved = checkpointer.checkpointables_metadata(checkpointer.latest).metadata["tree"]
                    _check_shapes(folder, jax.tree.leaves(saved), jax.tree.leaves(like))
                    return checkpointer.load_checkpointables(checkpointer.latest, {"tree": abstract})["tree"]
            except (ValueError, KeyError, FileNotFoundError, NotADirectoryError) as error:
                if set(os.listdir(folder)) != set(before):
                    continue  # a training that goes on has put a newer one in its place
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{folder} is damaged: its arrays cannot be read. Restore it, or train again."
                ) from None

    def _open(self, kind: str, **options: Any):
        from orbax.checkpoint import v1 as ocp

        keep: Any = ocp.training.preservation_policies.LatestN(1)
        return ocp.training.Checkpointer(str(self.directory / kind), preservation_policy=keep, **options)


@contextmanager
def _refused_as_oserror() -> Iterator[None]:
    """Orbax has a ValueError for what the system refuses, and logs it once more for each of its threads."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    finally:
        log.setLevel(level)


def _check_shapes(path: Path, saved: list, expected: list) -> None:
    """Orbax's own message for a tree that does not fit does not say what differs."""
    have, want = sorted(a.shape for a in saved), sorted(a.shape for a in expected)
    if not have:
        raise UserError(f"{path} is damaged: it holds no arrays. Restore it, or train again.")
    if have != want:
        raise UserError(
            f"{path} does not fit the configuration beside it: expected arrays of {want}, got {have}. "
            "Restore the config.json that the run began with."
        )
