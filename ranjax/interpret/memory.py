"""How long a trained model remembers, measured over a corpus: half-lives of components and spans of words."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ranjax.cell import Params
from ranjax.errors import UserError, check_size
from ranjax.interpret import weights
from ranjax.interpret.attribution import decompositions
from ranjax.lm import LanguageModel, checked_text, zero_state


class Memory(NamedTuple):
    """How long one layer remembers the steps of a corpus.

    Attributes:
      half_lives: histogram of `weights.half_lives` for each component, `(features, most)`: at `[component, n - 1]` the
        number of steps with a half-life of n. The last column counts half-lives of `most` or more.
      spans: `weights.spans` of each step, `(steps,)`.
    """

    half_lives: Int[np.ndarray, "features most"]
    spans: Int[np.ndarray, " steps"]

    def quantile(self, q: float) -> Int[np.ndarray, " features"]:
        """A quantile of the half-lives, over the steps.

        Args:
          q: above 0 and at most 1.

        Returns:
          For each component, `(features,)`, the smallest half-life in steps that a share `q` of all steps does not
          exceed.

        Raises:
          ValueError: for a `q` out of its range.

        Example:
          >>> import numpy as np
          >>> from ranjax.interpret.memory import Memory
          >>> Memory(np.array([[3, 0, 1]]), np.ones(4, int)).quantile(0.9).tolist()
          [3]
        """
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
    """Half-lives and spans of the steps of a text, in every layer.

    The text is read as one stream. Each step that is counted is followed for `most` steps, so the last `most` steps are
    read but not counted; neither are steps before them that do not fill a window.

    Args:
      model: a language model with `cell="ran"`.
      params: its parameters.
      ids: token ids of the text, `(tokens,)`.
      reduce: the measure of spans, as for `weights.spans`.
      share: where a span ends, as for `weights.spans`; the default 0.1 is a tenth of the initial weight.
      most: the longest half-life and span that is distinguished, in steps.
      window: steps that are counted at once; memory is proportional to `window` + `most`.

    Returns:
      One `Memory` for each layer.

    Raises:
      ValueError: for ids of another shape or out of the model's range, a `window` or `most` below 1, another `reduce`,
        a `share` out of its range, a model of another cell.
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
        found = []
        for parts in decompositions(model, params, tokens, state):
            lives = weights.half_lives(parts, most)[:window]
            counts = jax.vmap(lambda n: jnp.bincount(n - 1, length=most), in_axes=1)(lives)
            found.append((counts, weights.spans(parts, reduce, share, most)[:window]))
        state = jax.tree.map(lambda c: c[None], state)
        _, state = model.apply({"params": params}, tokens[None, :window], state, deterministic=True, method="hidden")
        return jax.tree.map(lambda c: c[0], state), found

    state, windows = jax.tree.map(lambda c: c[0], zero_state(model, params, batch_size=1)), []
    for start in range(0, len(ids) - window - most + 1, window):
        state, found = count(params, state, ids[start : start + window + most])
        windows.append(jax.device_get(found))
    return [
        Memory(np.sum([counts for counts, _ in layer], axis=0), np.concatenate([spans for _, spans in layer]))
        for layer in zip(*windows, strict=True)
    ]
