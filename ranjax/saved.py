"""The small files of a run: JSON objects, each with a schema, most with a checksum."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ranjax.cli import write_whole
from ranjax.errors import UserError, is_size

Schema = Mapping[str, Callable[[Any], bool]]  # of each name, what its value must be

MEND = "Restore it, or train again."


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return is_size(value, 0)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes an object with its checksum, all or not at all."""
    write_whole(path, json.dumps(content | {"sha256": _checksum(content)}, indent=2) + "\n")


def read_sealed(path: Path, schema: Schema) -> dict[str, Any]:
    """The object that `write_sealed` wrote, without its checksum.

    Raises:
      UserError: for a file that is missing, may not be read, or is not as it was written.
    """
    saved = read_json(path, {"sha256": is_text, **schema})
    if saved.pop("sha256") != _checksum(saved):
        raise UserError(f"{path} is damaged: its content does not fit its checksum. {MEND}")
    return saved


def read_json(path: Path, schema: Schema) -> dict[str, Any]:
    """The object in a file, with at least the names of the schema in it.

    Raises:
      UserError: for a file that is missing, may not be read, or is damaged.
    """
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}. {MEND}") from None
    try:
        return parse_object(content, schema)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {MEND}") from None


def parse_object(content: str, schema: Schema) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
      ValueError: for a text that is not one, or lacks a name of the schema, or has another kind of value there.
    """
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it must hold an object; got {found!r:.40}")
    for name, holds in schema.items():
        if name not in found:
            raise ValueError(f"it has no {name!r}")
        if not holds(found[name]):
            raise ValueError(f"its {name!r} is not valid; got {found[name]!a:.40}")
    return found


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
