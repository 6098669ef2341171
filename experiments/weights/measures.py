"""What is measured: spans by word, and how the rules of attribution compare with what a change does."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from ranjax.interpret.attribution import decompositions, integrated_gradients, shares
from ranjax.interpret.memory import Memory
from ranjax.interpret.weights import reduced

BANDS = (0, 10, 100, 1000, 10_000, 33_278)  # ranks by frequency in the training text
RARE = 20  # occurrences below which a word's mean says little


def by_frequency(layer: Memory, valid: np.ndarray, train: np.ndarray, vocabulary) -> list[dict]:
    """Spans of `<unk>`, of ends of lines, and of the words of each part of the frequency range."""
    ids, ranks = valid[: len(layer.spans)], np.empty(len(vocabulary), int)
    counts = np.bincount(train, minlength=len(vocabulary))
    signs = [vocabulary.ids[sign] for sign in ("<unk>", "<eos>") if sign in vocabulary.ids]
    counts[signs] = -1  # they are no words
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(vocabulary))
    groups = {
        f"{low + 1:,} to {high:,}": (low <= ranks) & (ranks < high) & (counts >= 0) for low, high in pairwise(BANDS)
    }
    groups |= {vocabulary.tokens[sign]: np.arange(len(vocabulary)) == sign for sign in signs}
    rows = []
    for name, members in groups.items():
        spans = layer.spans[members[ids]]
        if not len(spans):  # as of ranks beyond the vocabulary
            continue
        quantiles = {f"q{q}": int(np.quantile(spans, q / 100, method="nearest")) for q in (50, 90, 99)}
        rows.append({"ranks": name, "tokens": len(spans), "mean": round(float(spans.mean()), 2), **quantiles})
    return rows


def by_word(layer: Memory, valid: np.ndarray, decode) -> dict[str, list]:
    """The words with the longest and the shortest mean span."""
    ids = valid[: len(layer.spans)]
    counts = np.bincount(ids)
    means = np.bincount(ids, weights=layer.spans) / np.maximum(counts, 1)
    known = np.flatnonzero(counts >= RARE)
    order = known[np.argsort(means[known])]

    def show(i):
        return [decode([i]).replace("\n", "<eos>"), round(float(means[i]), 2), int(counts[i])]

    return {"longest": [show(i) for i in order[::-1][:25]], "shortest": [show(i) for i in order[:25]]}


def against_changes(run, ids: np.ndarray, contexts: int, length: int) -> dict:
    """Rank correlation of each rule with what the logit of the true next word loses when a word is changed."""
    model, params = run.model, run.params
    unk, rng = run.vocabulary.ids["<unk>"], np.random.default_rng(0)

    @jax.jit
    def study(tokens, target, others):
        every = jnp.where(jnp.eye(length, dtype=bool), others[:, None, None], tokens)  # (others, place, time)
        texts = jnp.concatenate([tokens[None], every.reshape(-1, length)])
        hidden, _ = model.apply({"params": params}, texts, deterministic=True, method="hidden")
        logits = model.apply({"params": params}, hidden[:, -1], method="logits")[:, target]
        loss = logits[0] - logits[1:].reshape(len(others), length)
        found = {
            rule.__name__: rule(model, params, tokens, target, length - 1) for rule in (shares, integrated_gradients)
        }
        errors = {rule: (f.total - logits[0]) / (logits[0] - f.bias) for rule, f in found.items()}
        rules = {rule: f.words for rule, f in found.items()}
        rules["weights of layer 1, l2"] = reduced(decompositions(model, params, tokens)[0])[-1]
        rules["nearness"] = jnp.arange(length)
        return {"<unk>": loss[0], "other words, mean": loss[1:].mean(0)}, rules, errors

    rows, worst = {}, {}
    for start in rng.choice(len(ids) - length - 1, contexts, replace=False):
        others = np.append(unk, rng.choice(ids, 8))
        changes, rules, errors = jax.device_get(study(ids[start : start + length], ids[start + length], others))
        for rule, words in rules.items():
            for change, loss in changes.items():
                rows.setdefault((rule, change), []).append(spearmanr(words, loss)[0])
        worst = {rule: max(abs(float(error)), worst.get(rule, 0)) for rule, error in errors.items()}
    correlations = [
        {"rule": rule, "change": change, "mean": round(float(np.mean(r)), 3), "sd": round(float(np.std(r)), 3)}
        for (rule, change), r in rows.items()
    ]
    return {"rank_correlation": correlations, "largest_completeness_error": worst}
