"""What a model gives each token of a text: log-probabilities, one row a token."""

import json
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from ranjax.data.vocabulary import Vocabulary
from ranjax.errors import UserError
from ranjax.lm import LanguageModel, checked_text, zero_state
from ranjax.training.metrics import WINDOW, Evaluation, finite


def log_probabilities(model: LanguageModel, params: Any, ids: np.ndarray) -> Iterator[np.ndarray]:
    r"""The log-probability of every token of a text but the first, given all tokens before it.

    .. math::
        \log p(w_t \mid w_1, \ldots, w_{t-1}), \qquad t = 2, \ldots, n

    The text is one stream, `WINDOW` tokens a call, and the state goes on from one call to the next.

    Args:
      model: what predicts.
      params: its parameters.
      ids: of the text, `(n,)`.

    Yields:
      Nats, float32, of the next tokens, `(WINDOW,)`, the last time fewer; n - 1 in all.

    Raises:
      ValueError: for ids that are not the model's.
      UserError: for fewer than 2 tokens.

    Example:
      >>> import jax, numpy as np, ranjax
      >>> from ranjax.evaluate import log_probabilities
      >>> model, ids = ranjax.LanguageModel(vocabulary=9, layers=1, features=4), np.arange(1000) % 9
      >>> params = model.init(jax.random.key(0), ids[None, :1], deterministic=True)["params"]
      >>> [len(part) for part in log_probabilities(model, params, ids)]
      [512, 487]
    """
    ids = checked_text("ids", ids, model.vocabulary)
    if len(ids) < 2:
        raise UserError(f"a text of at least 2 tokens is needed to predict one from another; got {len(ids)}.")

    @partial(jax.jit, donate_argnums=1)
    def window(params, state, tokens, targets):
        apply = partial(model.apply, {"params": params})
        hidden, state = apply(tokens, state, deterministic=True, method="hidden")
        return state, jnp.asarray(apply(hidden, targets, method="nats"))

    state = zero_state(model, params, 1)
    padded = np.pad(ids, (0, -(len(ids) - 1) % WINDOW))
    for first in range(0, len(ids) - 1, WINDOW):
        tokens, targets = (padded[None, at : at + WINDOW] for at in (first, first + 1))
        state, nats = window(params, state, tokens, targets)
        yield -np.asarray(nats).reshape(-1)[: len(ids) - 1 - first]


def score(
    model: LanguageModel, params: Any, vocabulary: Vocabulary, ids: np.ndarray, file: IO[bytes] | None
) -> Evaluation:
    """Evaluates a text as one stream, and writes a JSON object for each of its tokens to a file, if any, one a line.

    Its keys are `position` (from 0), `token` (its text), `id` and `log_probability` (nats; null for the first token,
    which has nothing before it and is not counted).

    Raises:
      DivergedError: for a model whose log-probabilities are not finite.
    """
    total, first = 0.0, 1
    if file is not None:
        file.write(_line(vocabulary, ids, 0, None))
    for part in log_probabilities(model, params, ids):
        total += float(np.sum(part, dtype=np.float64))
        finite(Evaluation(-total, len(ids) - 1))
        if file is not None:
            file.writelines(_line(vocabulary, ids, first + n, value) for n, value in enumerate(part.tolist()))
        first += len(part)
    return Evaluation(-total / (len(ids) - 1), len(ids) - 1)


def _line(vocabulary: Vocabulary, ids: np.ndarray, position: int, value: float | None) -> bytes:
    token = int(ids[position])
    row = {"position": position, "token": vocabulary.decode([token]), "id": token, "log_probability": value}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
