"""What a trained model makes of a text: the sources of its states, half-lives, the next word; see `ranjax.explain`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranjax.errors import UserError, fitting

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

    from ranjax.evaluate import Run
    from ranjax.lm import LanguageModel
    from ranjax.data.vocabulary import Vocabulary

DRAWN = 1000  # tokens of a text whose pairs are all kept, to be drawn
PREDICTIONS = 5  # likeliest next words
HORIZON = 512  # steps that half-lives are followed for, at most
MACHINE, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # memory, as Linux tells: of all, of the control group


@dataclass(frozen=True)
class Layer:
    """What is shown of one layer.

    Attributes:
      own: the reduced weight of each step in its own state, `(time,)`.
      weights, sources: of the strongest earlier ones, `(time, top)`: the reduced weights, and their steps, -1 for none.
      lasting: how many steps each word keeps more than half of its weight, `(time,)`; that of the text or more where it
        does so to the end.
      half_lives: the median of each component's, `(features,)`; the explanation's `horizon` stands for that and more.
      pairs: what each step is to each state, `(time, time)`; None for a text too long to be drawn.
    """

    own: "np.ndarray"
    weights: "np.ndarray"
    sources: "np.ndarray"
    lasting: "np.ndarray"
    half_lives: "np.ndarray"
    pairs: "np.ndarray | None"


@dataclass(frozen=True)
class Prediction:
    """A likely next word, and what its logit is the sum of.

    Attributes:
      word: as it is shown.
      probability: that the model gives it.
      words: the share of each word read, `(time,)`.
      bias: the share of the biases.
    """

    word: str
    probability: float
    words: "np.ndarray"
    bias: float

    @property
    def logit(self) -> float:
        return float(self.words.sum()) + self.bias


@dataclass(frozen=True)
class Explanation:
    """A text as a model read it.

    Attributes:
      words: its tokens, as they are shown.
      separator: what stands between them.
      reduce: what one number for all components' weights is.
      horizon: steps that half-lives look ahead.
      layers: from the first to the last.
      predictions: of the word after the text, the likeliest first.
    """

    words: list[str]
    separator: str
    reduce: str
    horizon: int
    layers: list[Layer]
    predictions: list[Prediction]


def explain(run: "Run", text: str, *, reduce: str = "l2", top: int = 3) -> Explanation:
    """Reads a text with a trained model and finds what its states and its next word are made of.

    Args:
      run: what `ranjax.evaluate.load_run` returns.
      text: what to read.
      reduce: `"max"`, `"l1"`, `"l2"` or `"contribution"`; see `ranjax.weights`.
      top: sources of each state.

    Raises:
      UserError: for a model that is not a RAN, a text that is empty, has words that its vocabulary cannot tell, or is
        too long for the memory.
    """
    import jax

    if run.model.cell != "ran":
        raise UserError(
            f"this run is of the cell {run.model.cell!r}, whose states are not weighted sums of what it read. Give a "
            "run trained with --cell ran."
        )
    with fitting("the text"):
        ids = run.vocabulary.encode(text)
    if not len(ids):
        raise UserError("the text is empty; give --text or --file at least one word.")
    found = jax.jit(partial(_found, run.model, reduce=reduce, top=min(top, len(ids) - 1)))
    program = found.lower(run.params, ids).compile()
    _check_memory(program.memory_analysis(), len(ids))
    layers, probabilities, targets, shares = jax.device_get(program(run.params, ids))
    predictions = [
        Prediction(visible(piece(run.vocabulary, int(v))), float(p), words, float(bias))
        for v, p, words, bias in zip(targets, probabilities, shares.words, shares.bias, strict=True)
    ]
    words, shown = [piece(run.vocabulary, i) for i in ids], [Layer(**arrays) for arrays in layers]
    return Explanation(words, run.vocabulary.separator, reduce, _horizon(len(ids)), shown, predictions)


def _found(model: "LanguageModel", params: Any, ids: Any, *, reduce: str, top: int) -> Any:
    """The arrays of an explanation."""
    import jax
    import jax.numpy as jnp

    from ranjax import weights
    from ranjax.interpret.attribution import decompositions, shares_of
    from ranjax.cell import output
    from ranjax.interpret.decomposition import measure_of, scale_of

    made, layers, time = decompositions(model, params, ids), [], len(ids)
    horizon = _horizon(time)
    for layer in made:
        lives = weights.half_lives(layer, horizon)[: time - horizon + 1]  # those that are seen to the end
        own = measure_of(reduce)(layer.i * scale_of(layer, reduce))
        sources = _earlier(*weights.top(layer, top + 1, reduce))
        lasting = weights.spans(layer, reduce, most=time)
        pairs = weights.reduced(layer, reduce) if time <= DRAWN else None
        half_lives = jnp.quantile(lives, 0.5, axis=0, method="lower")
        layers.append({"own": own, "lasting": lasting, "half_lives": half_lives, "pairs": pairs, **sources})
    hidden = output(params[f"stack_{len(made) - 1}"]["cell"], made[-1].c[-1], model.activation)
    logits = jnp.asarray(model.apply({"params": params}, hidden, method="logits"))
    probabilities, targets = jax.lax.top_k(jax.nn.softmax(logits), min(PREDICTIONS, model.vocabulary))
    shares = jax.vmap(lambda target: shares_of(model, params, made, target, time - 1))(targets)
    return layers, probabilities, targets, shares


def _earlier(values: "Array", steps: "Array") -> "dict[str, Array]":
    """The strongest sources but for the step itself, which is among them or would be the next."""
    import jax.numpy as jnp

    order = jnp.argsort(steps == jnp.arange(len(steps))[:, None], axis=1, stable=True)[:, :-1]
    return {"weights": jnp.take_along_axis(values, order, 1), "sources": jnp.take_along_axis(steps, order, 1)}


def _horizon(time: int) -> int:
    """Steps that half-lives look ahead: half of the text, so that the words of its first half are seen to the end."""
    return min(time // 2 + 1, HORIZON)


def piece(vocabulary: "Vocabulary", token: int) -> str:
    """A token as it is shown: ends of lines, tabs and what else cannot be printed by their signs."""
    shown = vocabulary.decode([token]).replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def visible(word: str) -> str:
    """A token as it is shown by itself, where a space would not be seen."""
    return word if word.strip() else "␠" * len(word)


def _check_memory(needed: Any, time: int) -> None:
    """Refuses a text whose compiled program takes more memory than is free."""
    takes, free = needed.temp_size_in_bytes + needed.output_size_in_bytes, free_memory()
    if free is not None and takes > free:
        raise UserError(
            f"a text of {time:,} tokens takes {takes / 1e6:,.0f} MB of memory with this model, and "
            f"{free / 1e6:,.0f} MB are free, enough for about {time * free // takes:,} tokens. Give a part of it, or a "
            "smaller --top."
        )


def free_memory() -> int | None:
    """Bytes of memory that this process may still take, where Linux tells: of the machine, and of its control group."""
    try:
        lines = dict(line.split(":") for line in MACHINE.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:
        most, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        files = sum(int(kinds[name]) for name in ("inactive_file", "active_file"))  # cached: given up when asked for
    except (OSError, KeyError, ValueError):  # no group, or one without a limit
        return free
    return max(0, min(free, most - used + files))
