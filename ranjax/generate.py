"""Text from a language model: `python -m ranjax.generate --checkpoint DIR --prompt "..."`."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ranjax import cli
from ranjax.device import check_device
from ranjax.errors import check_seed, check_size, in_flags

if TYPE_CHECKING:
    from ranjax.sampling import Sampling as Sampling
    from ranjax.sampling import generate as generate
    from ranjax.sampling import prompt_ids as prompt_ids
    from ranjax.sampling import sample as sample
    from ranjax.sampling import stream as stream

__getattr__ = cli.lazy(
    __name__, dict.fromkeys(("Sampling", "generate", "prompt_ids", "sample", "stream"), "ranjax.sampling")
)


@dataclass(frozen=True)
class Options:
    """Writes text that follows a prompt, token by token."""

    checkpoint: str
    """The --out directory of a run, or a folder that ranjax.export wrote."""
    prompt: str = ""
    """What the text begins with; the beginning of a line if not given."""
    length: int = 200
    """Number of tokens to write."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from that many likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws."""


def main(argv: list[str] | None = None) -> None:
    """The program."""
    with cli.exit_with_message():
        options = cli.options(Options, argv, "python -m ranjax.generate")
        cli.check_utf8("--prompt", options.prompt)
        check_device()
        from ranjax.sampling import Sampling, generate, prompt_ids, stream
        from ranjax.training.model import load_run

        with in_flags(("seed", "length", "temperature", "top_k", "top_p")):
            check_seed("seed", options.seed)
            check_size("length", options.length)
            sampling = Sampling(options.temperature, options.top_k, options.top_p)
        run = load_run(options.checkpoint)
        prompt = prompt_ids(run.vocabulary, options.prompt)
        write = cli.write_visible if cli.on_terminal() else partial(print, end="", flush=True)
        write(options.prompt)
        ids = generate(run, prompt, options.length, sampling, options.seed)
        stream(run.vocabulary, ids, write, options.prompt)
        write("\n")


if __name__ == "__main__":
    cli.start(main)
