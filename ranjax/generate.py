"""Text from a language model: `python -m ranjax.generate --checkpoint DIR --prompt "..."`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ranjax.errors import UserError, check_size, check_utf8, exit_with_message, fitting, is_size

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jax.typing import ArrayLike

    from ranjax.evaluate import Run
    from ranjax.lm import LanguageModel
    from ranjax.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a model's logits.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only that many likeliest tokens; None: all.
      top_p: only the likeliest tokens whose probabilities reach that sum together; 1.0: all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature must be finite and at least 0; got {self.temperature}.")
        if self.top_k is not None and not is_size(self.top_k):
            raise UserError(f"--top-k must be a whole number, at least 1; got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be in (0, 1]; got {self.top_p}.")


def sample(key: "Array", logits: "Array", sampling: Sampling) -> "Array":
    """Draws one token id from logits `(vocabulary,)`."""
    import jax
    import jax.numpy as jnp

    if sampling.temperature < 1e-6:  # as good as 0, and a quotient could overflow
        return jnp.argmax(logits)
    logits = logits / min(sampling.temperature, 1e30)  # float32 has no 1e39
    order = jnp.argsort(-logits)  # of equal ones the first comes first, as in argmax
    kept = jnp.arange(len(logits)) < min(sampling.top_k or len(logits), len(logits))
    if sampling.top_p < 1:
        sums = jnp.cumsum(jax.nn.softmax(jnp.where(kept, logits[order], -jnp.inf)))
        kept &= jnp.concatenate([jnp.zeros(1), sums[:-1]]) < sampling.top_p  # a token counts if those above fall short
        kept = kept.at[0].set(True)  # whatever float32 makes of the sum
    return jax.random.categorical(key, jnp.where(kept[jnp.argsort(order)], logits, -jnp.inf))


def generate(run: "Run", prompt: "ArrayLike", length: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """Token ids that follow those of a prompt, one after another; the memory does not grow with their number.

    Compiled once for a model, a way of sampling and a length of the prompt.

    Args:
      run: a trained model, as `ranjax.evaluate.load_run` gives it.
      prompt: ids, at least one; `prompt_ids` makes them from text.
      length: how many are to follow.
      sampling: how each is drawn.
      seed: of the draws.

    Raises:
      ValueError: for a prompt without ids, or with others than the model's; for a length that is no size.
    """
    from ranjax.evaluate import checked_text

    check_size("length", length)
    ids = checked_text("prompt", prompt, run.model.vocabulary)
    if not len(ids):
        raise ValueError("`prompt` must have at least one id; got none. `prompt_ids` makes some of any text.")
    return _drawn(run, ids, length, sampling, seed)


def _drawn(run: "Run", prompt: "np.ndarray", length: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """One token after another."""
    import jax
    import jax.numpy as jnp

    from ranjax.lm import zero_state

    advance = _advance(run.model, sampling)  # pyright: ignore[reportArgumentType]  # flax hashes a model's fields
    ids, state, key = jnp.asarray(prompt), zero_state(run.model, run.params, batch_size=1), jax.random.key(seed)
    for n in range(length):
        ids, state = advance(run.params, state, ids, jax.random.fold_in(key, n))
        yield int(ids[0])


@lru_cache(maxsize=8)  # for one model and one way of sampling a second text is not compiled for again
def _advance(model: "LanguageModel", sampling: Sampling) -> Callable:
    """`advance(params, state, tokens, key) -> (next token, state)`."""
    import jax
    import jax.numpy as jnp

    @partial(jax.jit, donate_argnums=1)
    def advance(params, state, tokens, key):
        apply = partial(model.apply, {"params": params})
        hidden, state = apply(tokens[None], state, deterministic=True, method="hidden")
        logits = jnp.asarray(apply(hidden[0, -1], method="logits"))  # of the last token alone: a prompt may be long
        return sample(key, logits, sampling)[None], state

    return advance


def prompt_ids(vocabulary: "Vocabulary", prompt: str) -> Any:
    """The ids of a prompt; an empty one is the beginning of a line, or the first token where there are no lines."""
    import numpy as np

    with fitting("the prompt"):
        ids = vocabulary.encode(prompt)
    if len(ids):
        return ids
    try:
        return vocabulary.encode("\n")
    except UserError:
        return np.zeros(1, np.int32)


def stream(vocabulary: "Vocabulary", ids: Iterator[int], write: Callable[[str], Any], begun: str) -> None:
    """Writes tokens as text as soon as they make whole characters; `begun` is what stands before them."""
    pending: list[int] = []
    end = begun[-1:] or "\n"
    for token in ids:
        pending.append(token)
        text = vocabulary.decode(pending)
        if not vocabulary.separator and text.endswith("\ufffd") and len(pending) < 8:  # more bytes complete it
            continue
        if vocabulary.separator and not end.isspace() and text != "\n":
            text = vocabulary.separator + text
        write(text)
        pending, end = [], text[-1:] or end
    write(vocabulary.decode(pending))


@dataclass(frozen=True)
class Options:
    """Writes text that follows a prompt, token by token."""

    checkpoint: str
    """The --out directory of a run."""
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
    import tyro

    from ranjax.evaluate import load_run

    with exit_with_message():
        options = tyro.cli(Options, args=argv, prog="python -m ranjax.generate")
        check_utf8("--prompt", options.prompt)
        if not 0 <= options.seed < 2**31:
            raise UserError(f"--seed must be a whole number in [0, 2**31); got {options.seed}.")
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        run = load_run(options.checkpoint)
        write = partial(print, end="", flush=True)
        if options.length < 1:
            raise UserError(f"--length must be at least 1; got {options.length}.")
        prompt = prompt_ids(run.vocabulary, options.prompt)
        write(options.prompt)
        ids = generate(run, prompt, options.length, sampling, options.seed)
        stream(run.vocabulary, ids, write, options.prompt)
        write("\n")


if __name__ == "__main__":
    main()
