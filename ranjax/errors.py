"""What a user can mend: raised with a message that says how, shown by the programs without a traceback."""

import gc
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input to a program or to a loader of data; the message says what was expected and how to mend it."""


class DivergedError(UserError):
    """A training whose loss, gradient or validation is no longer finite."""


def check_choice(name: str, value: Any, choices: Iterable[Any], why: str = "") -> None:
    """Raises a ValueError for an argument that is none of the choices; `why` goes on after what was got."""
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


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def is_size(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number, at least so large."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_utf8(flag: str, text: str) -> None:
    """Raises a UserError for a flag whose bytes are not UTF-8: Python keeps each of them as half a character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{flag} is not UTF-8 text; got {text[:40]!a}. Give it in UTF-8.")


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """The object that a file of a run holds, with these names in it.

    Raises:
      UserError: for a file that is missing or damaged.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # neither JSON nor UTF-8 is a ValueError
        raise UserError(f"{path} cannot be read: {error}. Restore it, or train anew.") from None
    if not isinstance(saved, dict) or not saved.keys() >= set(names):
        expected = " and ".join(("an object", *map(repr, names)))
        raise UserError(f"{path} must hold {expected}; got {saved!r:.40}. Restore it, or train anew.")
    return saved


def write_whole(path: Path, text: str) -> None:
    """Writes a file all or not at all: until the new one is complete the old one is there."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, "utf-8")
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def refusals(path: Path, mend: str = "--resume goes on with the run") -> Iterator[None]:
    """Turns what the system refuses to write there into a UserError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. What was saved before is intact: {mend} once that "
            "is mended."
        ) from None


@contextmanager
def fitting(where: str) -> Iterator[None]:
    """Names the text in which a vocabulary finds what it has no tokens for."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where} does not fit the model: {error}") from None


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns a `UserError`, or what the system refuses, into its message on standard error and exit code 1, as it is for
    a flag that is wrong.

    Ctrl-C, where a program does nothing else with it, and an output that is read no further, as by `| head`, end it
    without a word. What the terminal has no character for is written as its code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _interrupts_until_heard():
            yield
            print(end="", flush=True)  # which, unlike sys.stdout, may be closed from the beginning
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python writes at its end
        raise SystemExit(1) from None
    except OSError as error:  # a disk that is full, a name that is too long, a directory that may not be written
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:  # of XLA, where the memory of a device does not suffice
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = f"error: {str(error).splitlines()[0]} Take less: in training by --features, --batch-size or --steps."
        print(message, file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells have it: 128 and the signal's number
    except SystemExit as error:  # tyro has said what is wrong with a flag
        raise SystemExit(1 if error.code == 2 else error.code) from None


@contextmanager
def _interrupts_until_heard() -> Iterator[None]:
    """Ctrl-C is not raised in a callback of the garbage collector (JAX has one), where every exception is lost, but
    soon after; and again a second later where it was lost elsewhere, as in a `__del__`."""
    main = threading.current_thread() is threading.main_thread()  # others have no signals
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored in the background
        yield
        return
    again: list[threading.Timer] = []

    def interrupt(number, frame):
        callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        lost = any(outer.f_code in callbacks for outer, _ in traceback.walk_stack(frame))
        again.append(threading.Timer(0.1 if lost else 1.0, signal.raise_signal, (number,)))
        again[-1].daemon = True
        again[-1].start()
        if not lost:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for timer in again:
            timer.cancel()
