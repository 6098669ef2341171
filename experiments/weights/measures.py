"""The measures: spans of states by word, and attributions beside the effect of changing a word."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from ranjax.data.vocabulary import Words
from ranjax.interpret.attribution import decompositions, integrated_gradients, shares
from ranjax.interpret.memory import Memory
from ranjax.interpret.weights import reduced
from ranjax.training.model import Run

BANDS = (0, 10, 100, 1000, 10_000, 33_278)  # ranks by frequency in the training text
SIGNS = ("<unk>", "<eos>")  # tokens that are no words
RARE = 20  # occurrences, below which the mean of a word is not reported
EXTREME = 25  # words with the longest and the shortest spans
OTHERS = 8  # random words that a word is replaced by, besides <unk>
RULES = (shares, integrated_gradients)


def by_frequency(layer: Memory, valid: np.ndarray, train: np.ndarray, vocabulary: Words) -> list[dict[str, Any]]:
    """Spans of the words of each band of frequency, of `<unk>`, and of ends of lines."""
    counts = np.bincount(train, minlength=len(vocabulary))
    signs = [vocabulary.ids[sign] for sign in SIGNS if sign in vocabulary.ids]
    counts[signs] = -1
    ranks = np.empty(len(vocabulary), int)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(vocabulary))
    groups = {
        f"{low + 1:,} to {high:,}": (low <= ranks) & (ranks < high) & (counts >= 0) for low, high in pairwise(BANDS)
    }
    groups |= {vocabulary.tokens[sign]: np.arange(len(vocabulary)) == sign for sign in signs}
    ids, rows = valid[: len(layer.spans)], []
    for name, members in groups.items():
        spans = layer.spans[members[ids]]
        if not len(spans):  # as of ranks beyond the vocabulary
            continue
        quantiles = {f"q{q}": int(np.quantile(spans, q / 100, method="nearest")) for q in (50, 90, 99)}
        rows.append({"ranks": name, "tokens": len(spans), "mean": round(float(spans.mean()), 2), **quantiles})
    return rows


def by_word(layer: Memory, valid: np.ndarray, decode: Callable) -> dict[str, list]:
    """The words with the longest and the shortest mean span."""
    ids = valid[: len(layer.spans)]
    counts = np.bincount(ids)
    means = np.bincount(ids, weights=layer.spans) / np.maximum(counts, 1)
    known = np.flatnonzero(counts >= RARE)
    order = known[np.argsort(means[known])]

    def show(i):
        return [decode([i]).replace("\n", "<eos>"), round(float(means[i]), 2), int(counts[i])]

    return {"longest": [show(i) for i in order[::-1][:EXTREME]], "shortest": [show(i) for i in order[:EXTREME]]}


def against_changes(run: Run, ids: np.ndarray, contexts: int, length: int) -> dict[str, Any]:
    """Attributions beside the effect of changes.

    The effect of a change of a word is the loss in the logit of the true next word. The attributions are those of the
    rules in `RULES`, the weights of the first layer, and the nearness of a word.

    Args:
      run: a trained model on words.
      ids: the text.
      contexts: places in the text, drawn at random.
      length: words before each of them, all of which are changed, one at a time.

    Returns:
      Mean and deviation of the rank correlation of each rule with each kind of change, and the largest relative error
      of the sum of each rule.
    """
    compare = make_comparison(run, length)
    unk, rng = run.vocabulary.ids["<unk>"], np.random.default_rng(0)
    rows: dict[tuple[str, str], list[float]] = {}
    largest: dict[str, float] = {}
    for start in rng.choice(len(ids) - length - 1, contexts, replace=False):
        others = np.append(unk, rng.choice(ids, OTHERS))
        compared = compare(ids[start : start + length], ids[start + length], others)
        changes, attributions, errors = jax.device_get(compared)
        for rule, of_words in attributions.items():
            for change, loss in changes.items():
                rows.setdefault((rule, change), []).append(spearmanr(of_words, loss)[0])
        largest = {rule: max(abs(float(error)), largest.get(rule, 0)) for rule, error in errors.items()}
    correlations = [
        {"rule": rule, "change": change, "mean": round(float(np.mean(r)), 3), "sd": round(float(np.std(r)), 3)}
        for (rule, change), r in rows.items()
    ]
    return {"rank_correlation": correlations, "largest_completeness_error": largest}


def make_comparison(run: Run, length: int) -> Callable:
    """`compare(tokens, target, others) -> (changes, attributions, errors)` for texts of this length, jitted.

    `changes` are the losses in the logit of `target` if each of the tokens is replaced by the first of the others, or
    by the rest of them (the mean); `attributions` are the values of each rule, by token; `errors` are the relative
    errors of their sums.
    """
    model, params = run.model, run.params

    @jax.jit
    def compare(tokens, target, others):
        every = jnp.where(jnp.eye(length, dtype=bool), others[:, None, None], tokens)  # (others, place, time)
        texts = jnp.concatenate([tokens[None], every.reshape(-1, length)])
        hidden, _ = model.apply({"params": params}, texts, deterministic=True, method="hidden")
        logits = model.apply({"params": params}, hidden[:, -1], method="logits")[:, target]
        loss = logits[0] - logits[1:].reshape(len(others), length)
        found = {rule.__name__: rule(model, params, tokens, target, length - 1) for rule in RULES}
        errors = {rule: (f.total - logits[0]) / (logits[0] - f.bias) for rule, f in found.items()}
        attributions = {rule: f.words for rule, f in found.items()}
        attributions["weights of layer 1, l2"] = reduced(decompositions(model, params, tokens)[0])[-1]
        attributions["nearness"] = jnp.arange(length)
        return {"<unk>": loss[0], "other words, mean": loss[1:].mean(0)}, attributions, errors

    return compare
