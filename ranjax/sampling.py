"""Text from a language model: how a token is drawn, and one token after another."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ranjax.errors import UserError, check_seed, check_size, fitting, is_number
from ranjax.lm import LanguageModel, Trained, checked_text, zero_state


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a model's logits.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only that many likeliest tokens; None: all.
      top_p: only the likeliest tokens whose probabilities reach that sum together; 1.0: all.

    Raises:
      ValueError: for a temperature that is not finite or below 0, a `top_k` that is no size, a `top_p` out of (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"`temperature` must be finite and at least 0; got {self.temperature!r}.")
        check_size("top_k", self.top_k, optional=True)
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must be in (0, 1]; got {self.top_p!r}.")


def sample(key: Array, logits: Array, sampling: Sampling) -> Array:
    """Draws one token id from logits `(vocabulary,)`."""
    if sampling.temperature < 1e-6:  # as good as 0, and a quotient could overflow
        return jnp.argmax(logits)
    logits = logits / min(sampling.temperature, 1e30)  # float32 has no 1e39
    order = jnp.argsort(-logits)  # of equal ones the first comes first, as in argmax
    never = jnp.finfo(logits.dtype).min  # finite, for JAX_DEBUG_INFS
    kept = jnp.arange(len(logits)) < min(sampling.top_k or len(logits), len(logits))
    if sampling.top_p < 1:
        sums = jnp.cumsum(jax.nn.softmax(jnp.where(kept, logits[order], never)))
        kept &= jnp.concatenate([jnp.zeros(1), sums[:-1]]) < sampling.top_p  # a token counts if those above fall short
        kept = kept.at[0].set(True)  # however float32 rounds the sum
    return jax.random.categorical(key, jnp.where(kept[jnp.argsort(order)], logits, never))


def generate(
    run: Trained, prompt: ArrayLike | Sequence[int], length: int, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Token ids that follow those of a prompt, one after another; the memory does not grow with their number.

    Compiled once for a model, a way of sampling and a length of the prompt.

    Args:
      run: a trained model, as `ranjax.evaluate.load_run` returns it.
      prompt: ids, at least one; `prompt_ids` returns those of a text.
      length: how many are to follow.
      sampling: how each is drawn.
      seed: of the draws, a whole number in [0, 2**31).

    Raises:
      ValueError: for a prompt without ids, or with others than the model's; for a length that is no size, or a seed
        out of its range.
    """
    check_size("length", length)
    check_seed("seed", seed)
    ids = checked_text("prompt", prompt, run.model.vocabulary)
    if not len(ids):
        raise ValueError("`prompt` must have at least one id; got none. `prompt_ids` returns some for any text.")
    return _tokens(run, ids, length, sampling, seed)


def _tokens(run: Trained, prompt: np.ndarray, length: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """One token after another."""
    advance = _advance(run.model, sampling)  # pyright: ignore[reportArgumentType]  # flax hashes a model's fields
    ids, state, key = jnp.asarray(prompt), zero_state(run.model, run.params, batch_size=1), jax.random.key(seed)
    for n in range(length):
        ids, state = advance(run.params, state, ids, jax.random.fold_in(key, n))
        yield int(ids[0])


@lru_cache(maxsize=8)  # for one model and one way of sampling a second text is not compiled for again
def _advance(model: LanguageModel, sampling: Sampling) -> Callable:
    """`advance(params, state, tokens, key) -> (next token, state)`."""

    @partial(jax.jit, donate_argnums=1)
    def advance(params, state, tokens, key):
        apply = partial(model.apply, {"params": params})
        hidden, state = apply(tokens[None], state, deterministic=True, method="hidden")
        logits = jnp.asarray(apply(hidden[0, -1], method="logits"))  # of the last token alone: a prompt may be long
        return sample(key, logits, sampling)[None], state

    return advance


def prompt_ids(vocabulary: Any, prompt: str) -> Any:
    """The ids of a prompt; an empty one is the beginning of a line, or the first token where there are no lines."""
    with fitting("the prompt"):
        ids = vocabulary.encode(prompt)
    if len(ids):
        return ids
    try:
        return vocabulary.encode("\n")
    except UserError:
        return np.zeros(1, np.int32)


def stream(vocabulary: Any, ids: Iterator[int], write: Callable[[str], Any], begun: str) -> None:
    """Writes tokens as text as soon as their characters are whole; `begun` is the text before them."""
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
