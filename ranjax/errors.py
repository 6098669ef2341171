"""What a user can mend: raised with a message that says how, shown by the programs without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input to a program or to a loader of data; the message says what was expected and how to mend it."""


class DivergedError(UserError):
    """A training whose loss, gradient or validation is no longer finite; the checkpoints before it are intact."""


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turns a `UserError` into its message on standard error and exit code 1, as it is for a flag that is wrong."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as error:  # tyro has said what is wrong with a flag
        raise SystemExit(1 if error.code == 2 else error.code) from None
