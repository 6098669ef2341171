"""Trackers: programs beside a run that are given each row of its metrics, such as TensorBoard."""

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ranjax.cli import warn
from ranjax.errors import UserError
from ranjax.saved import is_number, is_text, read_sealed, write_sealed

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "ranjax"  # that runs belong to, where nothing else is asked for


def check_trackers(names: Sequence[str]) -> None:
    """Raises a UserError for a tracker whose package is not installed."""
    for name in names:
        try:
            import_module(PACKAGES[name])
        except ModuleNotFoundError as error:
            raise UserError(
                f"--track {name} needs {error.name}, which is not installed. Install it: pip install 'ranjax[{name}]'"
            ) from None


class Tracker(Protocol):
    """Follows a run from here on; it is opened with `(directory, identity, config)`: see `TensorBoard`."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes the figures of a step; each name comes once a step, and steps rise."""
        ...

    def close(self, step: int, result: dict[str, float]) -> None:
        """Ends it: after the last step with the figures of `result.json`, earlier without any."""
        ...


class TensorBoard:
    """Event files in the run's directory, one for each process of the run.

    They are written here and now: the writers that tensorboardX recommends do it in a thread, and wait for ever for one
    that a full disk has ended.

    Args:
      directory: of the run.
      identity: of the run, which the directory's name need not be.
      config: its settings.
    """

    def __init__(self, directory: Path, identity: str, config: dict[str, Any]):
        from tensorboardX import summary  # pyright: ignore[reportMissingImports]
        from tensorboardX.event_file_writer import EventsWriter  # pyright: ignore[reportMissingImports]
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        self._event, self._summary = Event, summary
        folder = directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")
        self._write(0, self._summary.text("config", f"    {json.dumps(config, indent=4)}".replace("\n", "\n    ")))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, self._summary.scalar(name, value))
        self._writer.flush()

    def close(self, step: int, result: dict[str, float]) -> None:
        self.log(step, {f"result/{name}": value for name, value in result.items()})
        self._writer.close()

    def _write(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))


class WeightsAndBiases:
    """A run of wandb, in the project `WANDB_PROJECT`; without a network with `WANDB_MODE=offline`."""

    def __init__(self, directory: Path, identity: str, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(directory), config=config, id=identity,
            name=directory.name, resume="allow", settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, step: int, result: dict[str, float]) -> None:
        self._run.summary.update(result)
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine, or where its own environment variables say."""

    def __init__(self, directory: Path, identity: str, config: dict[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        name = f"{directory.name}-{identity}"  # which identifies it there
        self._trackio = trackio
        self._run = trackio.init(project=PROJECT, name=name, config=config, resume="allow", embed=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, step: int, result: dict[str, float]) -> None:
        if result:
            self._run.log({f"result/{name}": value for name, value in result.items()}, step=step)
        self._trackio.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def failures(name: str) -> tuple[type[Exception], ...]:
    """What a tracker fails with where a disk, a network or a service is the reason: what its package documents."""
    if name == "wandb":
        return OSError, import_module("wandb").Error
    return (OSError, ValueError, sqlite3.Error) if name == "trackio" else (OSError,)


class Tracking:
    """All trackers of one process of a run. One that fails is left out from then on, with a warning.

    Args:
      names: of the trackers.
      directory: of the run.
      config: its settings.
      rows: what earlier processes have logged, those rows included that this one computes again.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: dict[str, Any], rows: list[dict[str, float]]):
        self._names, self._directory, self._config = tuple(dict.fromkeys(names)), directory, config
        self._open: dict[str, Tracker] = {}
        self._opened = False
        self._step, self._known = -1, set[str]()  # the last step that was logged, and the names that it has
        for row in rows:
            self._new(row)

    def open(self) -> None:
        """Opens them, once."""
        if self._opened or not self._names:
            return
        self._opened, path = True, self._directory / "track.json"
        try:
            if not path.exists():
                write_sealed(path, {"identity": secrets.token_hex(4)})
            identity = read_sealed(path, {"identity": is_text})["identity"]
        except (OSError, UserError) as error:
            warn(f"the run goes on without --track: {error}")
            return
        for name in self._names:
            with self._attempt(name):
                self._open[name] = TRACKERS[name](self._directory, identity, self._config)

    def row(self, row: dict[str, float]) -> None:
        """Logs what is new in a row of `metrics.jsonl`."""
        values = self._new(row)
        for name, tracker in list(self._open.items()) if values else ():
            with self._attempt(name):
                tracker.log(self._step, values)

    def close(self, result: dict[str, Any] | None = None) -> None:
        """Closes them, with the figures of the result if there is one."""
        figures = {name: value for name, value in (result or {}).items() if is_number(value)}
        for name, tracker in list(self._open.items()):
            with self._attempt(name):
                tracker.close(max(self._step, 0), figures)
        self._open = {}

    def _new(self, row: dict[str, float]) -> dict[str, float]:
        """What of a row has not been logged: a run that goes on computes some rows again, with the same values."""
        step = int(row["step"])
        if step > self._step:
            self._step, self._known = step, set()
        names = row.keys() - {"step"} - self._known if step == self._step else set()
        self._known |= names
        return {name: value for name, value in row.items() if name in names}

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        try:
            yield
        except failures(name) as error:
            self._open.pop(name, None)
            why = str(error).splitlines() or [type(error).__name__]
            warn(f"--track {name} has failed, and the run goes on without it: {why[0]}")
