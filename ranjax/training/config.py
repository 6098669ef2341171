"""The settings of a training run: defaults, the papers' presets, recipes; how they are checked, saved and read."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ranjax.choices import (
    Activation,
    Average,
    Block,
    Cell,
    GateInit,
    Gates,
    Optimizer,
    Precision,
    Resume,
    Softmax,
    Solver,
    Tokenizer,
    Tracker,
)
from ranjax.data import is_named
from ranjax.errors import UserError, flag, is_choice, is_number, is_path, is_size
from ranjax.saved import MEND, read_sealed, write_sealed
from ranjax.training.folder import absolute, is_empty

ITERATING = "fixed_point", "newton"  # solvers that iterate over all steps until they agree


class Rule(NamedTuple):
    """What a setting must be, beside its type.

    Attributes:
      holds: whether a value is.
      expected: the same in words.
    """

    holds: Callable[[Any], Any]
    expected: str


def _whole(least: int) -> Rule:
    return Rule(lambda v: is_size(v, least) and v < 2**31, f"a whole number, at least {least} and below 2**31")


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def mesh_sizes(mesh: str | None) -> dict[str, int]:
    """The sizes of the axes that a mesh names.

    Raises:
      ValueError: for another axis, one that is named twice, a size that is no number above 0.

    Example:
      >>> from ranjax.training.config import mesh_sizes
      >>> mesh_sizes("data=4,model=2")
      {'data': 4, 'model': 2}
    """
    pairs = [part.split("=") for part in mesh.split(",")] if mesh else []
    sizes = {axis: int(size) for axis, size in pairs}
    if len(sizes) < len(pairs) or not all(axis in MESH_AXES and size > 0 for axis, size in sizes.items()):
        raise ValueError(f"{mesh!a} is no mesh of {', '.join(MESH_AXES)}")
    return sizes


MESH_AXES = "data", "model", "time"
MOST_LAYERS = 1000  # each is compiled


Size = Annotated[int, _whole(1)]
Count = Annotated[int, _whole(0)]
Layers = Annotated[
    int, Rule(lambda v: is_size(v) and v <= MOST_LAYERS, f"a whole number, at least 1 and at most {MOST_LAYERS:,}")
]
Sizes = Annotated[
    tuple[int, ...],
    Rule(lambda v: v and all(map(_whole(1).holds, v)), "one or more whole numbers, each at least 1 and below 2**31"),
    Rule(lambda v: len(v) <= MOST_LAYERS, f"at most {MOST_LAYERS:,} sizes"),
]
# Settings are used as float32, in which numbers below are 0 and those above infinite.
_Float32 = Rule(lambda v: v == 0 or 2.0**-126 <= v < 2.0**128, "between 1.2e-38 and 3.4e38, the range of float32")
Positive = Annotated[float, Rule(lambda v: _is_finite(v) and v > 0, "finite and above 0"), _Float32]
NotNegative = Annotated[float, Rule(lambda v: _is_finite(v) and v >= 0, "finite and at least 0"), _Float32]
HalfLife = Annotated[float, Rule(lambda v: _is_finite(v) and v >= 1, "finite and at least 1"), _Float32]
Rate = Annotated[float, Rule(lambda v: _is_finite(v) and 0 <= v < 1 - 2.0**-25, "in [0, 1)")]
Mesh = Annotated[
    str,
    Rule(
        lambda v: is_path(v) and mesh_sizes(v), "axes of data, model and time with their sizes, such as data=4,model=2"
    ),
]
Trackers = Annotated[
    tuple[Tracker, ...],
    Rule(
        lambda v: isinstance(v, tuple | list) and all(is_choice(one, get_args(Tracker)) for one in v),
        "any of " + ", ".join(get_args(Tracker)),
    ),
]
Text = Annotated[str, Rule(is_path, "a name or a path")]
Folder = Annotated[str, Rule(is_path, "a path")]


@dataclass(frozen=True)
class Config:
    """Trains a language model. Defaults depend on --dataset."""

    dataset: Text = "python-docs"
    """Name of a corpus (python-docs, markov, wikitext-2, ptb, text8, enwik8, ...), or a path to text."""
    data_dir: Folder | None = None
    """Folder that holds the data set's folder, or that folder itself; without it WikiText and text8 are downloaded."""
    tokenizer: Tokenizer | None = None
    """How text becomes tokens. If not given, the data set's usual way; characters for a file, words for a folder."""
    out: Folder | None = None
    """Directory of the run, which must be empty or not exist yet; runs/DATASET-CELL if not given."""
    resume: Resume = False
    """Alone: go on with the run in --out, up to --epochs. auto: if there is one, else begin it (for schedulers)."""
    cell: Cell = "ran"
    """The recurrent cell."""
    gates: Gates = "recurrent"
    """What a RAN's gates see: the whole last output, their own feature of it, or the input only."""
    activation: Activation = "tanh"
    """A RAN's output h = g(c). With recurrent gates the identity diverges with some seeds at the default settings."""
    gate_init: GateInit = "zeros"
    """Biases of a RAN's gates at first: zeros; by half-lives of 1 to --half-life steps; input gates to match."""
    half_life: HalfLife = 64.0
    """The longest of these half-lives, in steps."""
    block: Block = "plain"
    """Layers in sequence; or each in a residual block, as wide as the embedding, with a convolution and an MLP."""
    conv_width: Size = 4
    """Steps that the convolution of a residual block sees, the current one included; 1: no convolution."""
    expansion: Positive | None = 1.5
    """Units of a residual block's MLP for each feature; None: no MLP."""
    layers: Layers | None = None
    """Number of recurrent layers; that of the sizes in --features, or 2 for a single one, if not given."""
    features: Sizes = (200,)
    """Size of the state: one number, or one for each layer."""
    embedding: Size | None = None
    """Size of the embedding; that of the first layer, or of a tied output, if not given."""
    projection: Size | None = None
    """Size of a RAN's projected output."""
    dropout: Rate = 0.2
    """Rate on the embedding and on every layer's output."""
    dropout_input: Rate | None = None
    """Rate on the embedding; --dropout if not given."""
    dropout_output: Rate | None = None
    """Rate on what the output layer reads; --dropout if not given."""
    dropout_words: Rate = 0.0
    """Rate at which words are dropped, each in all places of a window, or of a part of it (--remat)."""
    dropout_weights: Rate = 0.0
    """Rate on the weights that read the last output: one mask for a window, or for a part (--accumulate)."""
    locked: bool = False
    """One mask of dropout for all steps of a window, in place of one for each step."""
    activation_penalty: NotNegative = 0.0
    """Weight of the mean square of the last layer's outputs in the loss."""
    change_penalty: NotNegative = 0.0
    """Weight of the mean square of their change from step to step."""
    tie: bool = True
    """Output layer = the embedding transposed."""
    softmax: Softmax = "full"
    """The output layer: full; or adaptive, for words: rare ones cost little and, with --tie, have fewer features."""
    cutoffs: Sizes | None = None
    """First ids of the clusters of an adaptive softmax; if not given, 2000, or by the size of the vocabulary."""
    epochs: Size = 3
    """Passes over the training text."""
    batch_size: Size = 20
    """Streams of text trained on in parallel."""
    steps: Size = 35
    """Truncation length: tokens that a gradient reaches back at most."""
    vary_steps: Count = 0
    """Each boundary between windows is moved by so many tokens, back, forth or not at all, in each epoch otherwise."""
    optimizer: Optimizer = "adamw"
    """The update rule. muon: for the matrices of the layers, adamw for all else; schedule_free: adamw on averages."""
    average: Average = "never"
    """non-monotone: average parameters once a validation is worse than the best of --patience epochs ago."""
    patience: Size = 5
    """Validations that the trigger of --average leaves out."""
    learning_rate: Positive = 2e-3
    """Learning rate at its highest."""
    weight_decay: NotNegative = 0.0
    """Decay of the weights: decoupled from the gradient, but for sgd."""
    schedule: Literal["constant", "cosine", "decay"] = "decay"
    """constant; cosine: down to a hundredth over --epochs; decay: times --decay each epoch after --decay-after."""
    warmup: Count = 200
    """Steps of linear warm-up: for cosine at most half of all; for --optimizer schedule_free."""
    decay: Positive = 0.5
    """Factor per epoch (decay)."""
    decay_after: Count = 1
    """Epochs at the full rate (decay)."""
    clip: Positive = 5.0
    """Largest global norm of the gradient."""
    init_scale: Positive | None = None
    """All weights uniform in +- this; the cells' own initialisers if not given."""
    precision: Precision = "float32"
    """Of the products. Parameters, states, the softmax and the optimizer are float32 in either."""
    accumulate: Size = 1
    """Parts of a batch that are computed one after another, for less memory."""
    remat: Size = 1
    """Parts of a window whose activations are computed again in the backward pass, for less memory."""
    solver: Solver = "auto"
    """How a RAN layer solves its recurrence."""
    mesh: Mesh | None = None
    """Devices for batch (data), parameters (model) and time: data=4,model=2; all that divide the batch if not given."""
    streams: Size = 1
    """Validation and test text are read as so many streams: faster for long texts, at so many times the memory."""
    seed: Count = 0
    """Seed of the weights and of dropout."""
    track: Trackers = ()
    """Trackers of the rows of metrics.jsonl, one or more; each needs its package: pip install 'ranjax[NAME]'."""
    profile_dir: Folder | None = None
    """Directory, empty or not there yet, for a trace of 5 steps after a warm-up of 10, by JAX's profiler."""

    @property
    def directory(self) -> Path:
        """Where the run is kept, absolute."""
        out = self.out or f"runs/{Path(self.dataset).stem}-{self.cell}"
        return absolute(out)


def check(config: Config) -> None:
    """Raises a UserError for a setting that is not what its field allows."""
    for name, (choices, rules) in _ALLOWED.items():
        value = getattr(config, name)
        if value is None and None in choices:
            continue
        if choices not in ((), (None,)) and not is_choice(value, choices):
            raise UserError(f"{flag(name)} must be one of {', '.join(map(str, choices))}; got {value!r}.")
        for rule in rules:
            if not _holds(rule.holds, value):
                raise UserError(f"{flag(name)} must be {rule.expected}; got {value!r}.")
    _check_parts(config)
    _check_mesh(config)
    if config.dropout_weights and config.cell == "ran" and config.gates == "input":
        raise UserError(
            f"--dropout-weights is for cells that read their last output; got {config.dropout_weights} with --gates "
            "input."
        )
    if config.optimizer == "schedule_free" and config.average != "never":
        raise UserError("--optimizer schedule_free evaluates averages of its own. Give --average never.")
    if config.optimizer == "schedule_free" and config.schedule != "constant":
        raise UserError(
            f"--optimizer schedule_free takes the place of a schedule; got it with --schedule {config.schedule}. Give "
            "--schedule constant."
        )


def _check_parts(config: Config) -> None:
    """Raises a UserError for parts of a batch or of a window that do not divide it, windows that vary too much."""
    for name, whole in (("accumulate", "batch_size"), ("remat", "steps")):
        part, of = getattr(config, name), getattr(config, whole)
        if of % part:
            raise UserError(f"{flag(name)} must divide {flag(whole)} {of}; got {part}.")
    if 2 * config.vary_steps >= config.steps or (config.vary_steps and config.remat > 1):
        raise UserError(
            f"--vary-steps must be below half of --steps {config.steps}, and 0 with --remat; got {config.vary_steps} "
            f"with --remat {config.remat}."
        )


def _check_mesh(config: Config) -> None:
    """Raises a UserError for a mesh that does not divide what it splits."""
    sizes = mesh_sizes(config.mesh)
    split = {
        "data": {"--batch-size / --accumulate": config.batch_size // config.accumulate},
        "model": {flag(name): getattr(config, name) for name in ("embedding", "projection")},
        "time": {"--steps / --remat": config.steps // config.remat},
    }
    for axis, parts in sizes.items():
        features = [("--features", size) for size in config.features if axis == "model"]
        for name, size in [*split[axis].items(), *features]:
            if size is not None and size % parts:
                raise UserError(f"--mesh {config.mesh}: {axis} must divide {name}, which is {size}; got {parts}.")
    if sizes.get("time", 1) > 1:
        random = ("dropout", "dropout_input", "dropout_output", "dropout_words", "dropout_weights")
        taken = [getattr(config, name) for name in (*random, "activation_penalty", "change_penalty", "vary_steps")]
        if any(taken) or sizes.get("model", 1) > 1 or config.cell != "ran" or config.solver == "pallas":
            raise UserError(
                f"--mesh {config.mesh}: time is split for --cell ran only, without a split of model or --solver pallas "
                f"and with all of these at 0: {', '.join(map(flag, random))}, penalties and --vary-steps. Split data "
                "instead."
            )


def _allowed(kind: Any) -> tuple[tuple, list[Rule]]:
    """Of a field's type: the values that it lists, None among them where the field may be left out; and its rules."""
    if kind is bool:
        return (True, False), []
    if kind is type(None):
        return (None,), []
    if get_origin(kind) is Literal:
        return get_args(kind), []
    if get_origin(kind) is Annotated:
        return (), [rule for rule in get_args(kind) if isinstance(rule, Rule)]
    parts = [_allowed(part) for part in get_args(kind)]  # of a union
    return tuple(value for values, _ in parts for value in values), [rule for _, rules in parts for rule in rules]


_ALLOWED = {name: _allowed(kind) for name, kind in get_type_hints(Config, include_extras=True).items()}


def _holds(condition: Callable[[Any], Any], value: Any) -> bool:
    try:
        return bool(condition(value))
    except (TypeError, ValueError, OverflowError):  # a text for a number, one size for several, an array, 10**400
        return False


# Settings of papers. Lee et al. 2017 (the authors' code) for medium, large and text8; Zaremba et al. 2014's small
# network, as in TensorFlow's tutorial. text8 there has a dropout of 0.1 on whole embedding rows and 0.4 on outputs;
# here 0.4 on both. Merity et al. 2018 (AWD) for Penn Treebank, whose loss is a mean over steps, here a sum; for
# WikiText-2 they have --dropout 0.2 --dropout-input 0.65 --batch-size 80.
Preset = Literal["ptb-small", "ptb-medium", "ptb-large", "text8", "awd"]
_ZAREMBA = Config(optimizer="sgd", schedule="decay", tie=False, dataset="ptb", activation="tanh", warmup=0)
PRESETS = {
    "ptb-small": replace(
        _ZAREMBA, features=(200,), dropout=0.0, learning_rate=1.0, decay=0.5, decay_after=4, epochs=13, batch_size=20,
        steps=20, clip=5.0, init_scale=0.1,
    ),
    "ptb-medium": replace(
        _ZAREMBA, features=(650,), dropout=0.5, learning_rate=1.0, decay=0.8, decay_after=6, epochs=39, batch_size=20,
        steps=35, clip=5.0, init_scale=0.05,
    ),
    "ptb-large": replace(
        _ZAREMBA, features=(1500,), dropout=0.65, learning_rate=0.8, decay=1 / 1.15, decay_after=14, epochs=55,
        batch_size=20, steps=35, clip=10.0, init_scale=0.04,
    ),
    "text8": replace(
        _ZAREMBA, dataset="text8", layers=3, features=(1024, 1024, 2048), embedding=128, dropout=0.4,
        learning_rate=0.2, decay=1 / 1.03, decay_after=5, epochs=500, batch_size=128, steps=100, clip=10.0,
        init_scale=0.04,
    ),
    "awd": replace(
        _ZAREMBA, tie=True, features=(1150, 1150, 400), layers=3, dropout=0.25, dropout_input=0.4, dropout_output=0.4,
        dropout_words=0.1, dropout_weights=0.5, locked=True, activation_penalty=2.0, change_penalty=1.0,
        weight_decay=1.2e-6 * 70, learning_rate=30 / 70, schedule="constant", clip=0.25 * 70, epochs=500, batch_size=20,
        steps=70, vary_steps=10, average="non-monotone", patience=5,
    ),
}  # fmt: skip

# What the program does where a data set is named and nothing else: measured in experiments/.
_SCAN = Config(block="residual", gates="input", activation="identity", schedule="cosine")
_OWN_TEXT = replace(_SCAN, features=(256,), learning_rate=3e-3)
RECIPES = {
    "python-docs": replace(_SCAN, dataset="python-docs", features=(160,), learning_rate=4e-3),
    "wikitext-2": replace(
        _SCAN, dataset="wikitext-2", features=(256,), softmax="adaptive", dropout=0.3, epochs=7,
        learning_rate=3e-3,
    ),
}  # fmt: skip

# What may differ between a run and its resumption.
_FREE = {"out", "resume", "data_dir", "epochs", "mesh", "track", "profile_dir"}


def goes_on(config: Config) -> bool:
    """Whether a training goes on with the run in its directory: with `resume="auto"`, whether there is something there.

    What is no run is then refused, as with `resume=True`.
    """
    if config.resume != "auto":
        return config.resume
    return os.path.lexists(config.directory) and not is_empty(config.directory)


def recipe(dataset: str, cell: str = "ran", block: str | None = None, gates: str | None = None) -> Config:
    """The recipe of a data set, or of a text of one's own, where these are given; other data sets have the defaults.

    h = c is for gates on the input: with others it can diverge.
    """
    found = RECIPES.get(dataset) or (Config() if is_named(dataset) else _OWN_TEXT)
    if cell != "ran" or block == "plain":
        return replace(found, gates=Config.gates, activation=Config.activation)
    return found if gates in (None, "input") else replace(found, activation=Config.activation)


def normalised(config: Config) -> Config:
    """The settings as a run keeps them.

    Paths of text are absolute, so that the run can be used from any directory; numbers are Python's own.
    """
    config = replace(config, **{name: _number(value) for name, value in vars(config).items()})
    dataset, data_dir = str(config.dataset), config.data_dir
    lists = {name: getattr(config, name) for name in ("features", "cutoffs", "track")}
    path = Path(os.path.expanduser(dataset))
    if dataset and (path.is_file() or path.is_dir()) and not is_named(dataset):  # a pipe has no path of its own
        dataset = str(absolute(dataset))
    return replace(
        config,
        dataset=dataset,
        out=config.out and str(config.out),
        data_dir=data_dir and str(absolute(data_dir)),
        **{name: tuple(map(_number, one)) for name, one in lists.items() if isinstance(one, tuple | list)},
    )


def _number(value: Any) -> Any:
    """A setting that is a number of NumPy's as Python's; any other unchanged."""
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_same(config: Config, saved: Config) -> None:
    """Raises a UserError for a run that would go on with other settings than it began with."""
    now, then = dataclasses.asdict(config), dataclasses.asdict(saved)
    moved = os.path.isabs(config.dataset) and os.path.isabs(saved.dataset)  # a file: its text is compared instead
    free = _FREE | {"dataset"} if moved else _FREE
    names = [name for name in now if now[name] != then[name] and name not in free]
    changed = [f"{flag(name)} {then[name]} -> {now[name]}" for name in names]
    if changed:
        raise UserError(
            f"the run in {config.directory} began with another configuration ({'; '.join(changed)}). "
            "Resume without these flags, or start a run of its own with another --out."
        )


def save_config(config: Config, directory: Path) -> None:
    """Writes the settings beside the checkpoints."""
    write_sealed(directory / "config.json", kept(config))


def kept(config: Config) -> dict[str, Any]:
    """The settings of a run, without what is of one process."""
    return dataclasses.asdict(config) | {"resume": False, "profile_dir": None}


def load_config(directory: str | Path) -> Config:
    """Reads the settings of a run."""
    path = absolute(directory) / "config.json"
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path.parent} is not a run: it has no config.json. Give the --out directory of a run."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    saved = read_sealed(path, {"features": lambda _: True})  # `check` looks at the values
    unknown = sorted(saved.keys() - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        names = ", ".join(map(ascii, unknown))
        raise UserError(f"{path} has settings this version does not know: {names}. Use the version that wrote it.")
    config = Config(**saved)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error} {MEND}") from None
    return normalised(config)
