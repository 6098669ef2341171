"""How long a trained model remembers, over a corpus: half-lives of components and spans of words."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ranjax.interpret import weights
from ranjax.interpret.attribution import decompositions
from ranjax.cell import Params
from ranjax.errors import UserError, check_size
from ranjax.evaluate import checked_text
from ranjax.lm import LanguageModel, zero_state


class Memory(NamedTuple):
    """How long one layer remembers the steps of a corpus.

    Attributes:
      half_lives: how many steps have a half-life of n in a component, at `[component, n - 1]`; the last column counts
        those of `most` and more, `(features, most)`.
      spans: `weights.spans` of each step, `(steps,)`.
    """

    half_lives: Int[np.ndarray, "features most"]
    spans: Int[np.ndarray, " steps"]

    def quantile(self, q: float) -> Int[np.ndarray, " features"]:
        """The half-life that a share `q` of the steps does not exceed, of each component."""
        if not 0 < q <= 1:
            raise ValueError(f"`q` must be above 0 and at most 1; got {q!r}.")
        share = np.cumsum(self.half_lives, axis=1) / self.half_lives.sum(axis=1, keepdims=True)
        return 1 + np.argmax(share >= q, axis=1)


def memory(
    model: LanguageModel,
    params: Params,
    ids: Int[np.ndarray, " tokens"],
    *,
    reduce: str = "l2",
    share: float = 0.1,
    most: int = 512,
    window: int = 4096,
) -> list[Memory]:
    """Half-lives and spans in every layer, over a text read as one stream.

    The last `most` steps, and what does not fill a window before them, are read but not counted: every step counted
    is seen for `most` steps.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      ids: the text.
      reduce, share: as for `weights.spans`, but that a span ends where a tenth is left, not half: the word is all but
        forgotten.
      most: steps that are looked ahead.
      window: steps counted at once; memory grows with `window` + `most`.

    Returns:
      One `Memory` for each layer.

    Raises:
      ValueError: for ids of another shape or not the model's, a window or `most` below 1, another `reduce`, a share out
        of its range.
      UserError: for a text of fewer than `window` + `most` tokens.

    Example:
      >>> import jax, numpy as np, ranjax
      >>> from ranjax.interpret.memory import memory
      >>> model, ids = ranjax.LanguageModel(vocabulary=9, features=4, layers=1), np.arange(60) % 9
      >>> params = model.init(jax.random.key(0), ids[None], deterministic=True)["params"]
      >>> (layer,) = memory(model, params, ids, most=16, window=20)
      >>> layer.half_lives.shape, layer.quantile(0.5).shape, layer.spans.shape
      ((4, 16), (4,), (40,))
    """
    check_size("window", window)
    check_size("most", most)
    ids = checked_text("ids", ids, model.vocabulary)
    if len(ids) < window + most:
        raise UserError(
            f"the text must have at least {window + most:,} tokens, a window of {window:,} and the {most:,} after it; "
            f"got {len(ids):,}. Give a longer text, or lower `window` or `most`."
        )

    @jax.jit
    def count(params, state, tokens):
        found, state_after = [], []
        for made in decompositions(model, params, tokens, state):
            lives = weights.half_lives(made, most)[:window]
            counts = jax.vmap(lambda n: jnp.bincount(n - 1, length=most), in_axes=1)(lives)
            found.append((counts, weights.spans(made, reduce, share, most)[:window]))
            state_after.append(made.c[window - 1])
        return tuple(state_after), found

    state, windows = jax.tree.map(lambda c: c[0], zero_state(model, params, batch_size=1)), []
    for start in range(0, len(ids) - window - most + 1, window):
        state, found = count(params, state, ids[start : start + window + most])
        windows.append(jax.device_get(found))
    return [
        Memory(np.sum([counts for counts, _ in layer], axis=0), np.concatenate([spans for _, spans in layer]))
        for layer in zip(*windows, strict=True)
    ]
