"""A trained model to share: `python -m ranjax.export --checkpoint RUN --out DIR`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.device import check_device

if TYPE_CHECKING:
    from ranjax.training.exported import export as export
    from ranjax.training.exported import functions as functions

EXPORTED = "ranjax.training.exported"
__getattr__ = cli.lazy(__name__, {"export": EXPORTED, "functions": EXPORTED})


@dataclass(frozen=True)
class Options:
    """Writes a finished run as a folder of plain files."""

    checkpoint: str
    """The --out directory of a run."""
    out: str
    """The folder to write, which must not exist yet."""
    push_to_hub: str | None = None
    """OWNER/NAME on the hub: the folder is uploaded there, too. Nothing is uploaded without it."""


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        options = cli.options(Options, argv, "python -m ranjax.export")
        check_device()
        from ranjax.training.exported import export
        from ranjax.training.hub import check_id, upload

        if options.push_to_hub is not None:
            check_id(options.push_to_hub)
        folder = export(options.checkpoint, options.out, options.push_to_hub)
        print(f"written: {folder}")
        if options.push_to_hub is not None:
            print(f"uploaded: {upload(folder, options.push_to_hub)}")


if __name__ == "__main__":
    cli.start(main)
