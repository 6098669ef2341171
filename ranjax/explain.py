"""Which words a model remembers: `python -m ranjax.explain --checkpoint DIR --text "..."`.

From Python: `ranjax.explain.explain(run, text)` returns a `ranjax.explain.Explanation`.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.choices import Reduction
from ranjax.device import check_device
from ranjax.errors import UserError, check_size, in_flags

if TYPE_CHECKING:
    from ranjax.interpret.explanation import Explanation as Explanation
    from ranjax.interpret.explanation import explain as explain

EXPLANATION = "ranjax.interpret.explanation"
__getattr__ = cli.lazy(__name__, {"Explanation": EXPLANATION, "explain": EXPLANATION})


@dataclass(frozen=True)
class Options:
    """Shows which words a model remembers."""

    checkpoint: str
    """The --out directory of a run, or a folder that ranjax.export wrote."""
    text: str | None = None
    """The text to read. For a model of words: as its data set writes them, with spaces around punctuation."""
    file: str | None = None
    """A file with the text, in its place."""
    layer: int = 1
    """Layer whose states are shown, from 1: its sources are the words, those of later ones the outputs below."""
    reduce: Reduction = "l2"
    """One number for the weights of all components: the largest, their norm, or the L1 norm of weight times content."""
    top: int = 3
    """Sources shown of each word."""
    out: str | None = None
    """A page (.html) or a figure (.png) to write."""


def read_text(given: Options) -> str:
    """The text of --text or --file."""
    if (given.text is None) == (given.file is None):
        raise UserError("give the text by either --text or --file.")
    if given.text is not None:
        cli.check_utf8("--text", given.text)
        return given.text
    path = Path(os.path.expanduser(str(given.file)))
    try:
        return path.read_bytes().decode("utf-8-sig")  # as training does: "\r" stays, a byte order mark is dropped
    except OSError as error:
        raise UserError(f"--file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def checked_out(given: Options) -> Path | None:
    """The path of --out. Raises a UserError if it is neither a page nor a figure, or would overwrite the text."""
    if given.out is None:
        return None
    if Path(given.out).suffix.lower() not in (".html", ".png"):
        raise UserError(f"--out must end in .html (a page) or .png (a figure); got {given.out}.")
    out = Path(os.path.expanduser(given.out))
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out must be in a directory that exists; got {out}.")
    file = None if given.file is None else Path(os.path.expanduser(given.file))
    if file is not None and out.exists() and out.samefile(file):
        raise UserError(f"--out {out} is the text of --file, and is left as it is. Give another --out.")
    return out


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what prevents a page or a figure from being written into a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Glyph .* missing from font")
            yield
    except UserWarning as error:
        lacking = str(error).removesuffix(".")
        raise UserError(f"--out {path}: {lacking}. Write a page (.html), whose fonts are the browser's.") from None
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}.") from None


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        given = cli.options(Options, argv, "python -m ranjax.explain")
        text, out = read_text(given), checked_out(given)
        with in_flags(["top"]):
            check_size("top", given.top)
        check_device()
        from ranjax.interpret.explanation import DRAWN, explain
        from ranjax.interpret.render import draw_heat_map, print_sources, write_page
        from ranjax.training.model import load_run

        run = load_run(given.checkpoint)
        layers = len(run.model.sizes)
        if not 1 <= given.layer <= layers:
            raise UserError(f"--layer must be from 1 to {layers}, the layers of this run; got {given.layer}.")
        explanation = explain(run, text, reduce=given.reduce, top=given.top)
        if out is not None and len(explanation.words) > DRAWN:
            have = f"at most {DRAWN:,} tokens, and this text has {len(explanation.words):,}"
            raise UserError(f"--out shows {have}. Leave --out away, or give a part of it.")
        print_sources(explanation, given.layer)
        if out is not None:
            with writing(out):
                (write_page if out.suffix.lower() == ".html" else draw_heat_map)(explanation, given.layer, out)
            print(f"written: {out}")


if __name__ == "__main__":
    cli.start(main, huge_pages=True)
