"""Which words a model remembers: `python -m ranjax.explain --checkpoint DIR --text "..."`."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ranjax.errors import UserError, check_utf8, exit_with_message
from ranjax.cli import restart_with_huge_pages

if TYPE_CHECKING:
    from ranjax.interpret.explanation import Explanation


@dataclass(frozen=True)
class Options:
    """Shows which words a model remembers: the strongest sources of every state, and of the word it expects next."""

    checkpoint: str
    """The --out directory of a run."""
    text: str | None = None
    """The text to read; for a model of words as its data set writes them, that is with spaces around punctuation."""
    file: str | None = None
    """A file with the text, in its place."""
    layer: int = 1
    """Layer whose states are shown, from 1: its sources are the words, those of later ones the outputs below."""
    reduce: Literal["max", "l1", "l2", "contribution"] = "l2"
    """One number for the weights of all components: the largest, their norm, or the L1 norm of weight times content."""
    top: int = 3
    """Sources shown of each word."""
    out: str | None = None
    """A page (.html) or a figure (.png) to write."""


def read_text(options: Options) -> str:
    """The text that was given."""
    if (options.text is None) == (options.file is None):
        raise UserError("give the text by either --text or --file.")
    if options.text is not None:
        check_utf8("--text", options.text)
        return options.text
    path = Path(os.path.expanduser(str(options.file)))
    try:
        return path.read_bytes().decode("utf-8-sig")  # as training reads it: "\r" stays, a mark of the byte order not
    except OSError as error:
        raise UserError(f"--file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def check(options: Options, layers: int) -> None:
    """Raises a UserError for an option out of its range."""
    if not 1 <= options.layer <= layers:
        raise UserError(f"--layer must be from 1 to {layers}, the layers of this run; got {options.layer}.")
    if options.top < 1:
        raise UserError(f"--top must be at least 1; got {options.top}.")
    if options.out is not None and Path(options.out).suffix.lower() not in (".html", ".png"):
        raise UserError(f"--out must end in .html (a page) or .png (a figure); got {options.out}.")
    out = None if options.out is None else Path(os.path.expanduser(options.out))
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out must be in a directory that exists; got {out}.")
    file = None if options.file is None else Path(os.path.expanduser(options.file))
    if out is not None and file is not None and out.exists() and out.samefile(file):
        raise UserError(f"--out {out} is the text of --file, and is left as it is. Give another --out.")


def main(argv: list[str] | None = None) -> None:
    """The program."""
    import tyro

    from ranjax import views
    from ranjax.evaluate import load_run
    from ranjax.interpret.explanation import DRAWN, explain

    with exit_with_message():
        options = tyro.cli(Options, args=argv, prog="python -m ranjax.explain")
        text, run = read_text(options), load_run(options.checkpoint)
        check(options, len(run.model.sizes))
        explanation = explain(run, text, reduce=options.reduce, top=options.top)
        if options.out is not None and len(explanation.words) > DRAWN:
            have = f"at most {DRAWN:,} tokens, and this text has {len(explanation.words):,}"
            raise UserError(f"--out shows {have}. Leave --out away, or give a part of it.")
        views.print_sources(explanation, options.layer)
        if options.out is not None:
            write(explanation, options.layer, Path(os.path.expanduser(options.out)))


def write(explanation: "Explanation", layer: int, path: Path) -> None:
    """Writes a page or a figure, as the name of the file says."""
    from ranjax import views

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Glyph .* missing from font")
            (views.write_page if path.suffix.lower() == ".html" else views.draw_pairs)(explanation, layer, path)
    except UserWarning as error:
        lacking = str(error).removesuffix(".")
        raise UserError(f"--out {path}: {lacking}. Write a page (.html), whose fonts are the browser's.") from None
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}.") from None
    print(f"written: {path}")


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
