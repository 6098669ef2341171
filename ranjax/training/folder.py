"""The directory of a run: one way from its name to its path, and whether it is still the same."""

import os
from pathlib import Path

from ranjax.errors import UserError


def absolute(path: str | os.PathLike) -> Path:
    """The path of a run, absolute, as training, evaluation and all others read it."""
    return Path(os.path.realpath(os.path.expanduser(path)))  # which, unlike Path.resolve, takes a loop of links


def is_empty(path: Path) -> bool:
    """Whether it is a directory with nothing in it.

    Raises:
      UserError: for a directory that may not be read.
    """
    try:
        return os.path.isdir(path) and not os.listdir(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


class SameFolder:
    """Knows a run's directory, so that one which was moved, removed or replaced is not written to.

    Args:
      directory: as it is now.
    """

    def __init__(self, directory: Path):
        self._directory, self._known = directory, _identity(directory)

    def check(self) -> None:
        """Raises a UserError where another directory, or none, has that path by now."""
        if _identity(self._directory) != self._known:
            raise UserError(
                f"{self._directory} is no longer the directory of this run: it was moved or removed while the run "
                "trained. What was saved is where it was moved to: --out THERE --resume goes on with it."
            )


def _identity(directory: Path) -> tuple[int, int, bool] | None:
    """Of a directory; a system may use the number of one that was removed again, but then its settings are gone."""
    try:
        status = os.stat(directory)
    except OSError:
        return None
    return status.st_dev, status.st_ino, os.path.lexists(directory / "config.json")
