"""What a trained model remembers: `python experiments/weights/run.py --checkpoint RUN --data-dir DIR`.

On the validation text of a run of ranjax.train: half-lives of the components, which words are kept longest, and how the
shares of a logit compare with what becomes of it when a word is changed. Figures go to results.json, pictures beside.
"""

import datetime
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from ranjax import views
from ranjax.attribution import decompositions, integrated_gradients, shares
from ranjax.data import load_corpus
from ranjax.evaluate import load_run
from ranjax.explanation import explain
from ranjax.memory import Memory, memory
from ranjax.weights import reduced

HERE = Path(__file__).parent
BANDS = (0, 10, 100, 1000, 10_000, 33_278)  # ranks by frequency in the training text
QUANTILES = (0.5, 0.9, 0.99)
RARE = 20  # occurrences below which a word's mean says little


@dataclass(frozen=True)
class Options:
    """Measures a trained model's memory."""

    checkpoint: str
    """The --out directory of a run on words."""
    data_dir: str | None = None
    """Folder of the data set."""
    contexts: int = 200
    """Places in the text whose next word is explained."""
    length: int = 50
    """Words before each of them."""
    most: int = 512
    """Steps that half-lives and spans are followed for."""
    passage: int = 49_030
    """First token of the passage whose heat map is drawn."""
    out: str = str(HERE)
    """Folder of the results."""


def by_frequency(layer: Memory, valid: np.ndarray, train: np.ndarray, vocabulary) -> list[dict]:
    """Spans of `<unk>`, of ends of lines, and of the words of each part of the frequency range."""
    ids, ranks = valid[: len(layer.spans)], np.empty(len(vocabulary), int)
    counts = np.bincount(train, minlength=len(vocabulary))
    signs = [vocabulary.ids[sign] for sign in ("<unk>", "<eos>")]
    counts[signs] = -1  # they are no words
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(vocabulary))
    groups = {
        f"{low + 1:,} to {high:,}": (low <= ranks) & (ranks < high) & (counts >= 0) for low, high in pairwise(BANDS)
    }
    groups |= {vocabulary.tokens[sign]: np.arange(len(vocabulary)) == sign for sign in signs}
    rows = []
    for name, members in groups.items():
        spans = layer.spans[members[ids]]
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


def against_changes(run, ids: np.ndarray, options: Options) -> dict:
    """Rank correlation of each rule with what the logit of the true next word loses when a word is changed."""
    model, params, length = run.model, run.params, options.length
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
    for start in rng.choice(len(ids) - length - 1, options.contexts, replace=False):
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


def draw(layers: list[Memory], path: Path) -> None:
    """Half-lives of the components in each layer, sorted by their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(layers), 3.6), layout="constrained")
    for n, (axes, layer) in enumerate(
        zip(figure.subplots(1, len(layers), sharey=True, squeeze=False)[0], layers, strict=True)
    ):
        order = np.argsort(layer.quantile(0.9) + layer.quantile(0.5) * layer.half_lives.shape[1])
        for q in QUANTILES:
            axes.plot(layer.quantile(q)[order], label=f"{q:.0%} of the steps at most")
        axes.set(title=f"layer {n + 1}", xlabel="component", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.supylabel("half-life, steps")
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    run, out = load_run(options.checkpoint), Path(options.out)
    corpus = load_corpus(run.config.dataset, options.data_dir or run.config.data_dir, run.config.tokenizer)
    layers = memory(run.model, run.params, corpus.valid, most=options.most)
    draw(layers, out / "half-lives.png")
    passage = run.vocabulary.decode(corpus.valid[options.passage : options.passage + 45])
    for number in range(1, len(layers) + 1):
        views.draw_pairs(explain(run, passage), number, out / f"layer-{number}.png")
    shares_of_components = (0, 0.25, 0.5, 0.75, 0.9, 1)
    results = {
        "run": {"dataset": run.config.dataset, "features": run.model.sizes, "gates": run.model.gates},
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "passage": passage,
        "half_lives": [
            {
                f"q{100 * q:g}": np.quantile(m.quantile(q), shares_of_components, method="nearest").tolist()
                for q in QUANTILES
            }
            for m in layers
        ],
        "components_of_half_life": [
            {f"at least {n}": int(np.sum(m.quantile(0.5) >= n)) for n in (1, 2, 5, 10, 20)} for m in layers
        ],
        "by_frequency": [by_frequency(m, corpus.valid, corpus.train, run.vocabulary) for m in layers],
        "by_word": [by_word(m, corpus.valid, run.vocabulary.decode) for m in layers],
        "attribution": against_changes(run, corpus.valid, options),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
