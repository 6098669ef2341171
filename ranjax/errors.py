"""What a user can mend: errors whose message says how, and the checks that raise them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any


class UserError(ValueError):
    """Bad input to a program or to a loader of data; the message says what was expected and how to mend it."""


class DivergedError(UserError):
    """A training whose loss, gradient or validation is no longer finite."""


def check_choice(name: str, value: Any, choices: Iterable[Any], why: str = "") -> None:
    """Raises a ValueError for an argument that is none of the choices; `why` follows what was got."""
    choices = tuple(choices)
    if not is_choice(value, choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}{why}.")


def is_choice(value: Any, choices: tuple) -> bool:
    """Whether it is one of them: 1 is not True."""
    return any(value is choice for choice in choices) or (isinstance(value, str) and value in choices)


def check_size(name: str, value: Any, optional: bool = False) -> None:
    """Raises a ValueError for an argument that is no size: a whole number, at least 1; or None, if it is optional."""
    if not (is_size(value) or (optional and value is None)):
        raise ValueError(f"`{name}` must be a whole number, at least 1{', or None' * optional}; got {value!r}.")


def is_size(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number, at least so large."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: Any) -> bool:
    """Whether it is a real number: True is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_rate(name: str, value: Any) -> None:
    """Raises a ValueError for an argument that is no rate of dropout."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"`{name}` must be a rate in [0, 1); got {value}.")


def check_seed(name: str, value: Any) -> None:
    """Raises a ValueError for an argument that seeds no random numbers."""
    if not (is_size(value, 0) and value < 2**31):
        raise ValueError(f"`{name}` must be a whole number in [0, 2**31); got {value!r}.")


def is_path(value: Any) -> bool:
    """Whether it can name a file or a directory."""
    return isinstance(value, str | os.PathLike) and bool(str(value)) and "\0" not in str(value)


def check_path(name: str, value: Any) -> None:
    """Raises a UserError for an argument that can name no file or directory."""
    if not is_path(value):
        raise UserError(f"`{name}` must be a path; got {value!r}.")


def flag(name: str) -> str:
    """The flag of a setting.

    Example:
      >>> from ranjax.errors import flag
      >>> flag("batch_size")
      '--batch-size'
    """
    return "--" + name.replace("_", "-")


@contextmanager
def in_flags(names: Sequence[str]) -> Iterator[None]:
    """Turns a ValueError about one of these arguments into a UserError in the words of a program.

    Example:
      >>> from ranjax.errors import check_size, in_flags
      >>> with in_flags(["top_k"]):
      ...     check_size("top_k", 0)
      Traceback (most recent call last):
      ranjax.errors.UserError: --top-k must be a whole number, at least 1; got 0.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in names:  # `tie` as --tie, cell='ran' as --cell ran
            message = re.sub(rf"\b{name}='?([\w-]+)'?", rf"{flag(name)} \1", message.replace(f"`{name}`", flag(name)))
        raise UserError(message) from None


@contextmanager
def fitting(where: str) -> Iterator[None]:
    """Names the text in which a vocabulary finds what it has no tokens for."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} does not fit the model: {error}") from None


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Says by which command a package comes that an import does not find.

    Example:
      >>> from ranjax.errors import needing
      >>> with needing("export"):
      ...     import no_such_package
      Traceback (most recent call last):
      ModuleNotFoundError: no_such_package is not installed. Install it: pip install 'ranjax[export]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed. Install it: pip install 'ranjax[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
