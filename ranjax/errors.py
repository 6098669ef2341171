"""What a user can mend: raised with a message that says how, shown by the programs without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input to a program or to a loader of data; the message says what was expected and how to mend it."""


class DivergedError(UserError):
    """A training whose loss, gradient or validation is no longer finite; the checkpoints before it are intact."""


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns a `UserError` into its message on standard error and exit code 1, as it is for a flag that is wrong.

    Ctrl-C, where a program does nothing else with it, and an output that is read no further, as by `| head`, end it
    without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python writes at its end
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells have it: 128 and the signal's number
    except SystemExit as error:  # tyro has said what is wrong with a flag
        raise SystemExit(1 if error.code == 2 else error.code) from None
