"""Trains a language model: `python -m ranjax.train --dataset wikitext-2`."""

from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.device import check_device

if TYPE_CHECKING:
    from ranjax.training.config import PRESETS as PRESETS
    from ranjax.training.config import Config as Config
    from ranjax.training.run import train as train

__getattr__ = cli.lazy(
    __name__,
    {"Config": "ranjax.training.config", "PRESETS": "ranjax.training.config", "train": "ranjax.training.run"},
)


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        from ranjax.training.flags import parse, parse_cluster

        config, cluster = parse(argv), parse_cluster(argv)
        if not cluster.distributed:
            check_device()
            from ranjax.training.run import train

            train(config)
            return
        from ranjax.training.processes import ending, join

        join(cluster)
        with ending():
            from ranjax.training.run import train

            train(config)


if __name__ == "__main__":
    cli.start(main, huge_pages=True)
