"""The checkpoints of a run: which are kept, and which of them are whole."""

import hashlib
import json
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ranjax.cli import refusals, warn
from ranjax.errors import UserError
from ranjax.saved import parse_object
from ranjax.training.arrays import load_arrays, save_arrays, saved_shapes
from ranjax.training.folder import SameFolder

KEPT = {"latest": 2, "best": 1}  # how many of each kind
SUMS = "sha256.json"


class _DamagedError(Exception):
    """The files of a checkpoint are not those that were saved; the message says what is wrong."""


class Checkpoints:
    """The checkpoints of a run: its latest full training states, and the parameters that validated best.

    Each is a folder `checkpoints/KIND/NUMBER` with the arrays and the checksums of their files. It is written under
    another name and takes its own once it is complete, so that a kill at any moment leaves one to go on from.

    Args:
      directory: of the run; absolute.
    """

    def __init__(self, directory: Path):
        self.run, self.directory = directory, directory / "checkpoints"
        self.same = SameFolder(directory)
        self._damaged: set[Path] = set()  # as found on loading

    def save(self, kind: str, number: int, tree: Any) -> None:
        """Saves `tree` as the newest checkpoint of its kind, `"latest"` or `"best"`, and drops older ones.

        One of this number that is whole is left as it is: a run that goes on computes the same again.

        Raises:
          OSError: where the system refuses it, as on a disk that is full; what was saved before is intact.
          UserError: if the run's directory has been moved.
        """
        self.same.check()
        folder = self.directory / kind
        self.directory.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        self._drop(path for path in folder.iterdir() if path.name.startswith("."))  # of saves that were killed
        if not _is_whole(folder / str(number)):
            _write(folder / str(number), tree)
        older = [n for n in self._numbers(kind) if n < number and folder / str(n) not in self._damaged]
        kept = {str(n) for n in (number, *older[: KEPT[kind] - 1])}
        self._drop(path for path in folder.iterdir() if path.name not in kept)

    def load(self, kind: str, like: Any) -> Any:
        """Loads the newest checkpoint of a kind that is whole, also while a training saves newer ones.

        Args:
          kind: `"latest"` or `"best"`.
          like: a tree of arrays or of `jax.ShapeDtypeStruct`, as it was saved.

        Raises:
          UserError: if there is none, if all are damaged or may not be read, or if it is not a tree of these shapes.
        """
        while True:
            before = self._numbers(kind)
            try:
                return self._load(kind, before, like)
            except UserError:
                if self._numbers(kind) == before:
                    raise  # otherwise a training that goes on has put a newer one in its place

    def _load(self, kind: str, numbers: list[int], like: Any) -> Any:
        damaged: dict[Path, str] = {}
        for number in numbers:
            path = self.directory / kind / str(number)
            try:
                loaded = _load(path, like)
            except _DamagedError as error:
                damaged[path] = str(error)
                continue
            except OSError as error:
                raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from None
            for other, why in damaged.items():
                warn(f"{other} is damaged: {why}. The one before it is used: {path}")
            self._damaged |= damaged.keys()
            return loaded
        for path, why in damaged.items():
            raise UserError(f"{path} is damaged: {why}. Restore it, or train again.")
        out = shlex.quote(str(self.run))
        mend = {
            "best": f"no epoch of it has been validated. Go on with: python -m ranjax.train --out {out} --resume",
            "latest": "it had one from its beginning. Restore it, or train again.",
        }
        raise UserError(f"{self.run} has no {kind} checkpoint: {mend[kind]}")

    def _numbers(self, kind: str) -> list[int]:
        """The numbers of the checkpoints of a kind, newest first."""
        folder = self.directory / kind
        try:
            return sorted((int(name) for name in os.listdir(folder) if name.isdecimal()), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}.") from None

    def _drop(self, paths: Any) -> None:
        for path in list(paths):
            shutil.rmtree(path, ignore_errors=True)


class Saver:
    """Saves in a thread of its own: training goes on as soon as the arrays are copied to the host.

    One is written at a time, in the order of the calls. What the system refuses is raised by the next call.

    Args:
      checkpoints: that are written.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._thread, self._written = ThreadPoolExecutor(1), None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        error = None if self._written is None else self._written.exception()
        if error is not None:  # of a training that has ended by another error
            warn(f"the last checkpoint in {self.checkpoints.directory} could not be written: {error}")

    def save(self, kind: str, number: int, tree: Any) -> None:
        """Saves `tree`, whose arrays may be donated or overwritten after the call; see `Checkpoints.save`."""
        self.wait()
        copied = jax.tree.map(np.array, tree)
        self._written = self._thread.submit(self.checkpoints.save, kind, number, copied)

    def wait(self) -> None:
        """Returns once all is written.

        Raises:
          UserError: where it cannot be; what was saved before is intact.
        """
        written, self._written = self._written, None
        with refusals(self.checkpoints.directory):
            try:
                if written is not None:
                    written.result()
            except OSError:
                self.checkpoints.same.check()  # is it the directory that is gone?
                raise


def _load(path: Path, like: Any) -> Any:
    _verify(path)
    _check_shapes(path, like)
    try:
        return load_arrays(path, like)
    except (ValueError, FileNotFoundError) as error:  # of another version, or replaced just now
        raise _DamagedError(f"its arrays cannot be read: {error}") from None


def _write(path: Path, tree: Any) -> None:
    """Writes a checkpoint in the place of a damaged one or of none: whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.mkdir()
    try:
        (unfinished / SUMS).write_text(json.dumps(save_arrays(unfinished, tree), indent=0))
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _verify(path: Path) -> None:
    """Raises _DamagedError for a checkpoint that is not as it was saved, an OSError for one that may not be read."""
    try:
        saved = parse_object((path / SUMS).read_text("utf-8"), {})
    except (FileNotFoundError, NotADirectoryError):
        raise _DamagedError(f"{SUMS} is missing") from None
    except ValueError:
        raise _DamagedError(f"{SUMS} cannot be read") from None
    for name, checksum in saved.items():
        if _checksum(path / Path(name).name) != checksum:
            raise _DamagedError(f"{name} is not as it was saved")
    if not saved:
        raise _DamagedError(f"{SUMS} is empty")


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except (_DamagedError, OSError):
        return False
    return True


def _checksum(path: Path) -> str | None:
    """The SHA-256 of a file; None for one that is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _check_shapes(path: Path, like: Any) -> None:
    """Raises a UserError for a tree of other arrays than were saved."""
    have, want = sorted(saved_shapes(path)), sorted(a.shape for a in jax.tree.leaves(like))
    if have != want:
        raise UserError(
            f"{path} does not fit the configuration beside it: expected arrays of {want}, got {have}. "
            "Restore the config.json that the run began with."
        )
