"""What the programs share: how they start and end, signals, messages, files written whole."""

import io
import os
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Annotated, Any, Union, get_args, get_origin

from ranjax.errors import UserError

TUNABLES = "glibc.malloc.hugetlb=1"
EXTRA = "pip install 'ranjax[train]'"
# Ctrl-C, the wish of a system or of a batch system to end the program, a terminal that is gone. Windows has no others.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def start(main: Callable[[], None], huge_pages: bool = False) -> None:
    """Runs a program as a process of its own: what stands below `if __name__ == "__main__"`.

    Ctrl-C ends it at once and without a word, from the imports to the exit, as it ends any program that has nothing to
    save; where there is something to save, `stopping` takes its place. For `python -m ranjax.PROGRAM` that holds from
    the import of `ranjax` on; what Python does before is its own.

    Args:
      huge_pages: on Linux, begin once more with an allocator that asks for huge pages. XLA on a CPU allocates the large
        arrays of a step at each step, and mapping them in pages of 4 KiB costs a fifth to a third of a training step
        (`benchmarks/README.md`). glibc reads the setting where a process begins, so that only a new beginning has it;
        the process keeps its number. Not where GLIBC_TUNABLES is set, be it to nothing, nor in a process that was
        begun for something else, such as a notebook, a debugger, or a script that runs the program.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if huge_pages and sys.platform == "linux":
        if "GLIBC_TUNABLES" not in os.environ and _is_the_process(main):
            _restart()
        elif os.environ.get("GLIBC_TUNABLES") == TUNABLES:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    main()


def _restart() -> None:
    """Begins the process once more; while Python starts, which would answer Ctrl-C by a traceback, it has to wait."""
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with suppress(OSError):  # the interpreter has been moved: it runs without huge pages
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _is_the_process(main: Callable[[], None]) -> bool:
    """Whether this process was begun by `python -m MODULE` or `python SCRIPT`, with flags alone before it, for the
    program that runs in it: whose function is the main module's own."""
    here = sys.modules["__main__"]
    spec, file = getattr(here, "__spec__", None), getattr(here, "__file__", None)
    given, before = sys.orig_argv[-len(sys.argv) :], sys.orig_argv[: -len(sys.argv)]
    flags = all(word.startswith("-") or previous in ("-X", "-W") for previous, word in pairwise(before))
    own = getattr(main, "__globals__", None) is vars(here)
    if given[1:] != sys.argv[1:] or file is None or not (flags and own):
        return False
    if before[-1:] == ["-m"]:
        return spec is not None and given[0] == spec.name
    return spec is None and os.path.exists(given[0]) and os.path.samefile(given[0], file)


def options(
    kind: type, argv: list[str] | None, program: str, default: Any = None, positional: bool = False, **how: Any
) -> Any:
    """Reads the flags of a program.

    Args:
      kind: a dataclass, whose fields are the flags.
      argv: the flags; None for those of the process.
      program: how it is called, for `--help`.
      default: values of the flags that are not given; None for those of `kind`.
      positional: whether fields without a default are given without a flag.
    """
    import tyro  # slow
    from tyro.constructors import ConstructorRegistry

    if default is not None:
        how["default"] = default
    if positional:
        how["config"] = (tyro.conf.PositionalRequiredArgs,)
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional_text)
    with registry, _readable_width():
        return tyro.cli(kind, args=argv, prog=program, **how)


@contextmanager
def _readable_width(least: int = 20) -> Iterator[None]:
    """A terminal of so many columns, for tyro, which on one of six fills the memory with its lines."""
    columns = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < least:
        os.environ["COLUMNS"] = str(least)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _optional_text(info: Any) -> Any:
    """How a flag of text that may be left out is read: whatever is given, the word None too, is the text."""
    from tyro.constructors import PrimitiveConstructorSpec

    kinds = {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in get_args(info.type)}
    if info.type_origin not in (Union, UnionType) or kinds != {str, NoneType}:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns an error that a user can mend into one message on standard error and exit code 1.

    So for a `UserError`, a wrong flag, what the system refuses, a device whose memory does not suffice, a package that
    is not installed. An output that is read no further, as by `| head`, ends the program without a word. What the
    terminal has no character for is written as its code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        print(end="", flush=True)  # which, unlike sys.stdout, may be closed from the beginning
    except UserError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "ranjax":
            raise
        _fail(f"{error.name} is not installed, which the programs need. Install it: {EXTRA}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python writes at its end
        raise SystemExit(1) from None
    except OSError as error:  # a disk that is full, a name that is too long, a directory that may not be written
        where = error.filename or "what the program reads, or prints to a file or a terminal,"
        _fail(f"{where} cannot be read or written: {error.strerror or error}.")
    except RuntimeError as error:  # of XLA, where the memory of a device does not suffice
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        _fail(f"{first} Take less: in training by --features, --batch-size or --steps.")
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells have it: 128 and the signal's number
    except SystemExit as error:  # tyro has said what is wrong with a flag
        raise SystemExit(1 if error.code == 2 else error.code) from None


def _fail(message: str) -> None:
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(1) from None


def printable(text: str, keep: str = "") -> str:
    """A text whose control characters, but for those kept, are their codes: on a terminal they would steer it.

    Example:
      >>> from ranjax.cli import printable
      >>> print(printable("\\x1b[2J red"))
      \\x1b[2J red
    """
    control = "Cc", "Cs"  # half characters, too, which cannot be written
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in control and c not in keep else c for c in text
    )


def write_visible(text: str) -> None:
    """Writes a part of a text on a terminal."""
    print(printable(text, keep="\n\t"), end="", flush=True)


def on_terminal() -> bool:
    """Whether standard output is a terminal; what FORCE_COLOR says is no answer to that."""
    return sys.stdout is not None and sys.stdout.isatty()


def warn(message: str) -> None:
    """Says something on standard error that the user should know and the program can go on with."""
    print(f"warning: {message}", file=sys.stderr)


class Stopped(SystemExit):
    """Ends a program that was asked to stop, all that it had to save being saved."""


class Stop:
    """A request to stop, by a signal or because time is over, which the training loop reads.

    Attributes:
      signal: the signal that asked for it, or SIGTERM once the time is over; None as long as nothing has.
    """

    def __init__(self, minutes: float | None = None):
        self._signal: int | None = None
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def signal(self) -> int | None:
        over = self._end is not None and time.monotonic() > self._end
        return signal.SIGTERM if over and self._signal is None else self._signal

    def ask(self, number: int) -> None:
        """Notes the signal."""
        self._signal = number

    def check(self) -> None:
        """Ends the program if that is asked for.

        Raises:
          Stopped: with 128 and the signal's number as the exit code.
        """
        if self.signal is not None:
            raise Stopped(128 + self.signal)


@contextmanager
def stopping(minutes: float | None = None) -> Iterator[Stop]:
    """Within it the first signal of each of `SIGNALS` sets a flag, the `Stop`; the second acts as before.

    Args:
      minutes: after so many the flag is set, too.
    """
    stop = Stop(minutes)
    if threading.current_thread() is not threading.main_thread():  # others have no signals
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        stop.ask(number)
        signal.signal(number, previous[number])
        with suppress(OSError):  # of a terminal that is gone
            if sys.stdout is not None and sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the cursor, which a progress bar hides

    previous = {}
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_utf8(flag: str, text: str) -> None:
    """Raises a UserError for a flag whose bytes are not UTF-8: Python keeps each of them as half a character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{flag} is not UTF-8 text; got {text[:40]!a}. Give it in UTF-8.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file all or not at all: until the new one is complete the old one stays."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to in parts, which takes its name once all of them are there."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            yield file
        new.replace(path)
    except BaseException:
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


def lazy(module: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module some of whose names live in others, which are imported when first asked for."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return find
