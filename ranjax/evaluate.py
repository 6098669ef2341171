"""Exact evaluation of a language model: `python -m ranjax.evaluate --checkpoint DIR`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.choices import Split
from ranjax.device import check_device

if TYPE_CHECKING:
    from ranjax.training.metrics import Evaluation as Evaluation
    from ranjax.training.metrics import make_evaluator as make_evaluator
    from ranjax.training.metrics import perplexity as perplexity
    from ranjax.training.model import Run as Run
    from ranjax.training.model import load_run as load_run
    from ranjax.training.run import load_text as load_text

METRICS, MODEL, RUN = "ranjax.training.metrics", "ranjax.training.model", "ranjax.training.run"
__getattr__ = cli.lazy(
    __name__,
    {
        "Evaluation": METRICS,
        "make_evaluator": METRICS,
        "perplexity": METRICS,
        "Run": MODEL,
        "load_run": MODEL,
        "load_text": RUN,
    },
)


@dataclass(frozen=True)
class Options:
    """Evaluates the best state of a run on a whole split, every prediction counted: one stream of text, or as many as
    the run's --streams."""

    checkpoint: str
    """The --out directory of a run, or a folder that ranjax.export wrote."""
    dataset: str | None = None
    """Another corpus; that of the run if not given. Its text is read with the run's vocabulary."""
    data_dir: str | None = None
    """Folder of the data set; that of the run if neither is given."""
    split: Split | None = None
    """Which part of the corpus; if not given, the test split, or the whole of another text that is one file."""


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        options = cli.options(Options, argv, "python -m ranjax.evaluate")
        check_device()
        from ranjax.data import load_split, split_of
        from ranjax.data.vocabulary import unknown
        from ranjax.training.metrics import finite, make_evaluator
        from ranjax.training.model import load_run
        from ranjax.training.run import load_text

        run = load_run(options.checkpoint)
        if options.dataset is None:
            split = options.split or "test"
            ids = load_text(run, options.checkpoint, split, options.data_dir)
        else:
            split = options.split or split_of(options.dataset)
            ids = load_split(options.dataset, split, run.vocabulary, options.data_dir)
        evaluation = finite(make_evaluator(run.model, run.config.streams)(run.params, ids))
        line = evaluation.line(run.vocabulary.unit, unknown(run.vocabulary, ids[1:]))
        print(f"{options.dataset or run.config.dataset} {split}: {line}")


if __name__ == "__main__":
    cli.start(main, huge_pages=True)
