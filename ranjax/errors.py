"""What a user can mend: errors whose message says how, and the checks that raise them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
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


def flag(name: str) -> str:
    """The flag of a setting.

    Example:
      >>> from ranjax.errors import flag
      >>> flag("batch_size")
      '--batch-size'
    """
    return "--" + name.replace("_", "-")


@contextmanager
def fitting(where: str) -> Iterator[None]:
    """Names the text in which a vocabulary finds what it has no tokens for."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} does not fit the model: {error}") from None
