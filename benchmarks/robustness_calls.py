"""Wrong calls of `robustness.py`: command lines of the four programs, and calls from Python.

Each must be refused: a command line by exit code 1 and one line, a call by a ValueError or a TypeError; both name the
flag or the argument that is wrong. `{text}`, `{run}`, `{out}` and `{place}` in a command line stand for a text, a
trained run, the path of a run that is not there and a directory.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ranjax.errors import flag

HUGE, BEYOND = "2147483648", str(10**30)  # 2**31; more than any machine's integers
NO_NUMBER = "", "x", "\0", "1,5"
NO_WHOLE = *NO_NUMBER, "nan", "1e308", "1.5"
NO_SIZE = *NO_WHOLE, "-1", "0", HUGE, BEYOND
NO_COUNT = *NO_WHOLE, "-1", HUGE, BEYOND
NO_POSITIVE = *NO_NUMBER, "-1", "0", "nan", "inf", "1e308", "1e-50"
NO_RATE = *NO_NUMBER, "-1", "1", "1.5", "nan", "inf", "1e308"
NO_CHOICE = "", "x", "\0", "-1", "1", "RAN"
LONG = "a" * 5000

BASES = {
    "train": ("--dataset", "{text}", "--out", "{out}", "--features", "8"),
    "evaluate": ("--checkpoint", "{run}"),
    "generate": ("--checkpoint", "{run}", "--length", "3"),
    "explain": ("--checkpoint", "{run}", "--text", "the cat"),
}
NO_RUN = "", "x", "\0", LONG, "{place}", "{text}", "{text}/x", "/dev/null", "{out}"
# Of each program, the values that a flag must refuse; beside them, the flags without a value.
WRONG = {
    "train": {
        **dict.fromkeys(["--layers", "--features", "--embedding", "--projection", "--epochs"], NO_SIZE),
        "--conv-width": NO_SIZE,
        "--half-life": (*NO_POSITIVE, "0.5"),
        "--expansion": NO_POSITIVE,
        **dict.fromkeys(["--block", "--gate-init"], NO_CHOICE),
        **dict.fromkeys(["--batch-size", "--steps", "--streams"], NO_SIZE),
        **dict.fromkeys(["--decay-after", "--seed"], NO_COUNT),
        **dict.fromkeys(["--learning-rate", "--clip", "--decay", "--init-scale"], NO_POSITIVE),
        "--weight-decay": (*NO_NUMBER, "-1", "nan", "inf", "1e308"),
        "--dropout": NO_RATE,
        **dict.fromkeys(["--cell", "--gates", "--activation", "--optimizer", "--schedule"], NO_CHOICE),
        **dict.fromkeys(["--solver", "--tokenizer", "--preset", "--track"], NO_CHOICE),
        "--dataset": ("", "x", "\0", LONG, "{out}", "{place}/empty"),
        "--out": ("", "\0", LONG, "{run}", "{text}", "{text}/x", "/dev/null", "/dev/null/x", "/proc/x"),
        "--profile-dir": ("", "\0", LONG, "{run}", "{text}", "{text}/x", "/dev/null", "/dev/null/x", "/proc/x"),
    },
    "evaluate": {
        "--checkpoint": NO_RUN,
        "--split": (*NO_CHOICE, "TEST", "training"),
        "--dataset": ("", "x", "\0", LONG, "{out}", "{place}/empty"),
        "--data-dir": ("", "\0", "{out}", "{text}"),
        "--text": ("", "\0", LONG, "{out}", "{place}", "{text}/x"),
    },
    "generate": {
        "--checkpoint": NO_RUN,
        **dict.fromkeys(["--length", "--top-k"], (*NO_WHOLE, "-1", "0")),
        "--temperature": (*NO_NUMBER, "-1", "nan", "inf", "-inf"),
        "--top-p": (*NO_NUMBER, "-1", "0", "nan", "inf", "1.5", "1e308"),
        "--seed": NO_COUNT,
        "--prompt": ("Ω", "\udcff", "THE"),
    },
    "explain": {
        "--checkpoint": NO_RUN,
        "--layer": (*NO_WHOLE, "-1", "0", "2", HUGE, BEYOND),
        "--top": (*NO_WHOLE, "-1", "0"),
        "--reduce": (*NO_CHOICE, "L2"),
        "--text": ("", "Ω", "\udcff"),
        "--out": ("", "\0", "x", "x.pdf", ".html", "{place}", "/dev/null", "{out}/x.html", "{text}/x.png", LONG),
    },
}
# Flags that belong to nothing or contradict each other, and what the message names.
TOGETHER = {
    "train": [
        (("--schedule", "cosine", "--decay", "0.3"), "--decay"),
        (("--schedule", "constant", "--decay-after", "2"), "--decay-after"),
        (("--warmup", "5"), "--warmup"),
        (("--schedule", "cosine", "--warmup", "-1"), "--warmup"),
        (("--optimizer", "sgd", "--weight-decay", "0.1"), "--weight-decay"),
        (("--cell", "lstm", "--gates", "input"), "--gates"),
        (("--cell", "gru", "--projection", "4"), "--projection"),
        (("--cell", "rnn", "--activation", "identity"), "--activation"),
        (("--cell", "lstm", "--gate-init", "half-lives"), "--gate-init"),
        (("--conv-width", "3"), "--conv-width"),
        (("--expansion", "2"), "--expansion"),
        (("--block", "residual", "--expansion", "0.1"), "--expansion"),
        (("--preset", "ptb-small", "--block", "residual"), "--block"),
        (("--layers", "3", "--features", "8", "9"), "--features"),
        (("--embedding", "5"), "--embedding"),
        (("--batch-size", "100000"), "--batch-size"),
        (("--steps", "100000"), "--steps"),
        (("--resume",), "{out}"),
        (("--resume", "x"), "x"),
        (("--solver", "pallas", "--gates", "recurrent"), "solver"),
        (("--dataset", "ptb", "--data-dir", "{out}"), "--data-dir"),
        (("--dataset", "ptb", "--data-dir", "{text}"), "--data-dir"),
        (("--dataset", "copy-0"), "copy-0"),
        (("--dataset", "copy--1"), "copy--1"),
    ],
    "evaluate": [
        (("--dataset", "ptb", "--data-dir", "{out}"), "--data-dir"),
        (("--text", "{text}", "--split", "test"), "--split"),
        (("--text", "{text}", "--out", "{place}"), "--out"),
        (("--out", "{out}.jsonl"), "--text"),
    ],
    "generate": [(("--top-k", "1.0"), "--top-k")],
    "explain": [(("--file", "{text}"), "--file")],
}
# Sizes that no machine has the memory for: in a process of their own, which they might end.
ENORMOUS = [
    *[("--" + name, "2147483647") for name in ("features", "embedding", "projection", "batch-size", "steps")],
    ("--features", "2147483647", "2147483647"),
    ("--layers", "1000000000"),
    ("--layers", "2147483647"),
    ("--features", "3000000", "--gates", "input"),
    *[("--block", "residual", name, "2147483647") for name in ("--features", "--conv-width", "--expansion")],
]


class Call(NamedTuple):
    """A wrong command line.

    Attributes:
      program, argv: what is called.
      named: what the message must name.
      alone: in a process of its own.
    """

    program: str
    argv: tuple[str, ...]
    named: str
    alone: bool = False


def command_lines() -> Iterator[Call]:
    """The wrong command lines of all programs."""
    for program, base in BASES.items():
        for name, values in WRONG[program].items():
            for value in values:
                yield Call(program, (*_without(base, name), name, value), _named(name, value))
        for name in (name for name in WRONG[program] if name != "--track"):  # which takes none, too
            yield Call(program, (*_without(base, name), name), name)
        for more, named in TOGETHER[program]:
            yield Call(program, (*base, *more), named)
        for more in (("--bogus",), ("--bogus=1",), ("surplus",), ("-z",), ("--", "x"), ("--Seed", "1")):
            yield Call(program, (*base, *more), more[-1].split("=")[0])
    for program in ("evaluate", "generate", "explain"):
        yield Call(program, (), "--checkpoint")
    yield Call("explain", BASES["explain"][:2], "--text")
    for more in ENORMOUS:
        yield Call("train", (*_without(BASES["train"], more[0]), *more), "", alone=True)


def _without(base: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The flags of a base but for one."""
    at = base.index(name) if name in base else len(base)
    return base[:at] + base[at + 2 :]


def _named(name: str, value: str) -> str:
    """What a message on this flag must name: a path, or a text, may stand for its flag."""
    return "" if name in ("--checkpoint", "--dataset", "--data-dir", "--prompt", "--text", "--out") else name


class PythonCall(NamedTuple):
    """A wrong call from Python: its text, the function without arguments, and what its error must name."""

    text: str
    call: Callable[[], Any]
    named: str


NAN, INF, FAR = float("nan"), float("inf"), 10**400
SIZES = True, -1, 0, NAN, 1.5, "x", "1", [], FAR, 2**31
COUNTS = True, -1, NAN, 1.5, "x", [], FAR, 2**31
POSITIVES = True, -1, 0, NAN, INF, 1e308, 1e-320, "x", "1", [], FAR
CHOICES = True, 1, "", "x", [], "RAN"
PATHS = 1, True, "", "\0", []
WEIGHTS = True, -1, NAN, INF, 1e308, "x", [], FAR
RATES = True, -1, 1, 1.5, NAN, INF, "x", []
SETTINGS = {
    **dict.fromkeys(["epochs", "batch_size", "steps", "streams", "patience", "accumulate", "remat"], (None, *SIZES)),
    **dict.fromkeys(["layers", "embedding", "projection"], SIZES),
    "conv_width": (None, *SIZES),
    "expansion": POSITIVES,
    "half_life": (None, *POSITIVES, 0.5),
    **dict.fromkeys(["block", "gate_init"], (None, *CHOICES)),
    "features": (None, 8, "x", (), (0,), (-1,), (1.5,), (True,), (2**31,), ("8",)),
    "vary_steps": (None, *COUNTS, 18),
    **dict.fromkeys(["warmup", "decay_after", "seed"], (None, *COUNTS)),
    **dict.fromkeys(["learning_rate", "decay", "clip"], (None, *POSITIVES)),
    "init_scale": POSITIVES,
    **dict.fromkeys(["weight_decay", "activation_penalty", "change_penalty"], (None, *WEIGHTS)),
    **dict.fromkeys(["dropout", "dropout_words", "dropout_weights"], (None, *RATES)),
    **dict.fromkeys(["dropout_input", "dropout_output"], RATES),
    **dict.fromkeys(["cell", "gates", "activation", "optimizer", "schedule", "solver"], (None, *CHOICES)),
    **dict.fromkeys(["softmax", "average", "precision"], (None, *CHOICES)),
    "tokenizer": CHOICES,
    "mesh": (*PATHS, "x", "data", "data=", "data=0", "rows=2", "data=3", "data=999"),
    "track": (None, "x", "wandb", ("x",), 1, True),
    "cutoffs": ("x", (), (0,), (1.5,), (True,), ("8",), (3,)),
    **dict.fromkeys(["tie", "resume", "locked"], (None, 1, 0, "x", "True", "AUTO", [])),
    "dataset": (None, *PATHS),
    **dict.fromkeys(["data_dir", "out", "profile_dir"], PATHS),
}


def python_calls(run: Path, text: Path, out: Path) -> Iterator[PythonCall]:
    """The wrong calls from Python.

    Args:
      run: a trained run.
      text: a file.
      out: a path where nothing is.
    """
    yield from _of_settings(text, out)
    yield from _of_runs(run)
    yield from _of_data(text)
    yield from _of_layers()
    yield from _of_models()
    yield from _of_functions()


def _calls(name: str, function: Callable, argument: str, values: tuple, /, **others: Any) -> Iterator[PythonCall]:
    """One argument of a function, with each of these values."""
    for value in values:
        call = partial(function, **others, **{argument: value})
        yield PythonCall(f"{name}({argument}={value!r:.30})", call, argument)


def _of_settings(text: Path, out: Path) -> Iterator[PythonCall]:
    from ranjax.train import Config, train

    assert SETTINGS.keys() == {field.name for field in fields(Config)}
    base = {"dataset": str(text), "out": str(out), "features": (8,)}
    for name, values in SETTINGS.items():
        for value in values:
            settings = partial(Config, **base | {name: value})
            yield PythonCall(f"train(Config({name}={value!r:.30}))", lambda of=settings: train(of()), flag(name))


def _of_runs(directory: Path) -> Iterator[PythonCall]:
    from ranjax.evaluate import load_run, load_text, make_evaluator
    from ranjax.explain import explain
    from ranjax.generate import Sampling, generate

    run = load_run(directory)
    yield from _calls("load_run", load_run, "directory", (None, 1, "", "\0", b"x", [], "x"))
    yield from _calls("load_text", load_text, "split", ("x", None, 1, "TEST"), run=run, directory=directory)
    yield from _calls("make_evaluator", make_evaluator, "streams", (0, -1, 1.5, True, "x", None), model=run.model)
    evaluate = make_evaluator(run.model)
    wrong = [-1, 0], [0, 999], [0.5, 1.0], [[0, 1]], ["a", "b"], [True, False]
    yield from _calls("evaluate", evaluate, "ids", wrong, params=run.params)
    yield from _calls("evaluate", evaluate, "counted", ([True], [0, 1], "x"), params=run.params, ids=[0, 1])
    yield from _calls("Sampling", Sampling, "temperature", ("x", None, -1, NAN, INF, True, []))
    yield from _calls("Sampling", Sampling, "top_k", ("x", 0, -1, 1.5, True, []))
    yield from _calls("Sampling", Sampling, "top_p", ("x", None, 0, -1, 1.5, NAN, True, []))
    base = {"run": run, "prompt": [0], "length": 2, "sampling": Sampling(), "seed": 0}

    def tokens(**arguments: Any) -> list[int]:
        return list(generate(**base | arguments))

    yield from _calls("generate", tokens, "length", (0, -1, 1.5, "x", None, True))
    yield from _calls("generate", tokens, "seed", (-1, 1.5, "x", None, 2**31, 10**30, True))
    yield from _calls("generate", tokens, "prompt", ([], [-1], [999], [0.5], [[0]], ["a"]))
    yield from _calls("explain", explain, "top", (0, -1, 1.5, "x", None, True), run=run, text="the cat")
    yield from _calls("explain", explain, "reduce", ("x", "", None, 1), run=run, text="the cat")
    yield from _calls("explain", explain, "text", ("", "Ω"), run=run)
    yield from _calls("decode", run.vocabulary.decode, "ids", ([-1], [999], [0.5], ["x"]))


def _of_data(text: Path) -> Iterator[PythonCall]:
    from ranjax.data import columns, load_corpus, load_split

    base = {"ids": np.arange(100), "batch_size": 2, "steps": 5}

    def shaped(**arguments: Any) -> Any:
        return columns(**base | arguments)

    for name in ("batch_size", "steps"):
        yield from _calls("columns", shaped, name, (0, -1, 1.5, "x", None, True))
    corpus = load_corpus(text)
    for value in ("", "x", "\0", LONG, "copy-0"):
        yield PythonCall(f"load_corpus({value!r:.30})", lambda value=value: load_corpus(value), "")
    yield from _calls("load_corpus", load_corpus, "tokenizer", ("x", "", 1, True), name=text)
    rest = {"name": text, "vocabulary": corpus.vocabulary}
    yield from _calls("load_split", load_split, "split", ("x", "", None, 1), **rest)


def _of_layers() -> Iterator[PythonCall]:
    import jax

    import ranjax

    key, x = jax.random.key(0), jnp.ones((1, 3, 4))

    def cell(**options: Any) -> Any:
        return ranjax.RAN(ranjax.RANCell(**{"features": 4} | options)).init(key, x)

    def layer(**options: Any) -> Any:
        return ranjax.RAN(ranjax.RANCell(4), **options).init(key, x)

    def block(**options: Any) -> Any:
        return ranjax.ResidualBlock(ranjax.RANCell(4), **options).init(key, x)

    yield from _calls("RANCell", cell, "features", (0, -1, 1.5, "x", None, True))
    yield from _calls("RANCell", cell, "projection", (0, -1, 1.5, "x", True))
    yield from _calls("RANCell", cell, "gates", ("x", "", None, 1))
    yield from _calls("RANCell", cell, "activation", ("x", "", None, 1))
    yield from _calls("RAN", layer, "solver", ("x", "", None, 1))
    yield from _calls("ResidualBlock", block, "conv_width", (0, -1, 1.5, "x", None, True))
    yield from _calls("ResidualBlock", block, "expansion", (0, -1, NAN, "x", True, 0.1))
    yield from _calls("ResidualBlock", block, "dropout", (-1, 1.5, NAN, "x", None))
    yield from _calls("ResidualBlock", block, "solver", ("x", "", None, 1))


def _of_models() -> Iterator[PythonCall]:
    import jax

    import ranjax

    def model(**options: Any) -> Any:
        tokens = jnp.zeros((1, 2), int)
        return ranjax.LanguageModel(**{"vocabulary": 9} | options).init(jax.random.key(0), tokens, deterministic=True)

    yield from _calls("LanguageModel", model, "conv_width", (0, -1, 1.5, "x", None, True), block="residual")
    yield from _calls("LanguageModel", model, "expansion", (0, -1, NAN, "x", True), block="residual")
    yield from _calls("LanguageModel", model, "half_life", (0, -1, NAN, "x", None, True))
    for name in ("vocabulary", "layers", "features", "embedding", "projection"):
        yield from _calls("LanguageModel", model, name, (0, -1, 1.5, "x", True))
    for name in ("cell", "gates", "activation", "solver", "block", "gate_init"):
        yield from _calls("LanguageModel", model, name, ("x", "", None, 1))
    yield from _calls("LanguageModel", model, "dropout", (-1, 1.5, NAN, "x", None))


def _of_functions() -> Iterator[PythonCall]:
    import jax

    import ranjax

    key, x = jax.random.key(0), jnp.ones((1, 3, 4))
    yield from _calls("linear_recurrence", ranjax.linear_recurrence, "solver", ("x", "", None, 1), decay=x, inputs=x)
    yield from _calls("linear_recurrence", ranjax.linear_recurrence, "decay", (x[:, :2], x[..., :3], "x"), inputs=x)
    parts = ranjax.weights.decompose(ranjax.RAN(ranjax.RANCell(4, "input")).init(key, x)["params"]["cell"], x)
    yield from _calls("weights.top", ranjax.weights.top, "k", (0, -1, 1.5, "x", None, True), parts=parts)
    yield from _calls("weights.top", ranjax.weights.top, "reduce", ("x", "", None, 1), parts=parts, k=1)
    yield from _calls("weights.half_lives", ranjax.weights.half_lives, "most", (0, -1, 1.5, "x"), parts=parts)
