"""The settings of a training run: defaults, the papers' presets, and how flags are read."""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ranjax.data import EMBEDDED, KNOWN
from ranjax.data.builtin import task_of
from ranjax.errors import UserError, flag, is_choice, is_size, read_json, write_whole

ITERATING = "fixed_point", "newton"  # solvers that pass over all steps until they agree


@dataclass(frozen=True)
class Config:
    """Trains a recurrent language model, evaluates it, and saves it.

    The loss is the sum over a window's time steps, averaged over the batch: learning rate and clipping are
    relative to that. What is reported is per token.
    """

    dataset: str = "python-docs"
    """Name of a corpus (python-docs, markov, wikitext-2, ptb, text8, enwik8, ...), or a path to text."""
    data_dir: str | None = None
    """Folder that holds the data set's folder, or that folder itself; without it WikiText and text8 are downloaded."""
    tokenizer: Literal["word", "character", "byte", "bpe"] | None = None
    """How text becomes tokens. If not given, the data set's usual way; characters for a file, words for a folder."""
    out: str | None = None
    """Directory of the run, which must not exist yet; runs/DATASET-CELL if not given."""
    resume: bool = False
    """Go on with the run in --out, up to --epochs."""
    preset: Literal["ptb-small", "ptb-medium", "ptb-large", "text8"] | None = None
    """Settings of a paper; flags given explicitly win over it."""
    cell: Literal["ran", "lstm", "gru", "rnn"] = "ran"
    """The recurrent cell."""
    gates: Literal["recurrent", "diagonal", "input"] = "recurrent"
    """What a RAN's gates see: the whole last output, their own feature of it, or the input only."""
    activation: Literal["tanh", "identity"] = "tanh"
    """A RAN's output h = g(c). With recurrent gates the identity diverges with some seeds at the default settings."""
    ablation: Literal["input-gate", "forget-gate", "gates", "complement", "content"] | None = None
    """A RAN with a constant, learned gate, or both; with i = 1 - f (complement); or with u = x (content)."""
    layers: int | None = None
    """Number of recurrent layers; that of the sizes in --features, or 2 for a single one, if not given."""
    features: tuple[int, ...] = (200,)
    """Size of the state: one number, or one for each layer."""
    embedding: int | None = None
    """Size of the embedding; that of the first layer, or of a tied output, if not given."""
    projection: int | None = None
    """Size of a RAN's projected output."""
    dropout: float = 0.2
    """Rate on the embedding and on every layer's output."""
    tie: bool = True
    """Output layer = the embedding transposed."""
    epochs: int = 3
    """Passes over the training text."""
    batch_size: int = 20
    """Streams of text trained on in parallel."""
    steps: int = 35
    """Truncation length: tokens that a gradient reaches back at most."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """The update rule."""
    learning_rate: float = 2e-3
    """Learning rate at its highest."""
    weight_decay: float = 0.0
    """Of adamw; for sgd there is none."""
    schedule: Literal["constant", "cosine", "decay"] = "decay"
    """constant; cosine: --warmup steps up, then down to a hundredth over --epochs (so more epochs stretch it);
    decay: constant for --decay-after epochs, then times --decay each epoch."""
    warmup: int = 200
    """Steps of linear warm-up (cosine), at most half of all."""
    decay: float = 0.5
    """Factor per epoch (decay)."""
    decay_after: int = 1
    """Epochs at the full rate (decay)."""
    clip: float = 5.0
    """Largest global norm of the gradient."""
    init_scale: float | None = None
    """All weights uniform in +- this; the cells' own initialisers if not given."""
    solver: Literal["auto", "sequential", "associative", "chunked", "pallas", "fixed_point", "newton"] = "auto"
    """How a RAN layer solves its recurrence."""
    streams: int = 1
    """Validation and test text are read as so many streams: faster for long texts, at so many times the memory. Each
    but the first begins 512 tokens before those that it counts."""
    seed: int = 0
    """Seed of the weights and of dropout."""

    @property
    def directory(self) -> Path:
        """Where the run is kept, absolute."""
        out = self.out or f"runs/{Path(self.dataset).stem}-{self.cell}"
        return Path(os.path.expanduser(out)).resolve()


def check(config: Config) -> None:
    """Raises a UserError for a setting out of its range."""
    for names, holds, expected in (
        ("dataset", _is_path, "a name or a path"),
        ("data_dir out", lambda v: v is None or _is_path(v), "a path"),
        ("epochs batch_size steps streams", is_size, "a whole number, at least 1"),
        ("layers embedding projection", lambda v: v is None or is_size(v), "a whole number, at least 1"),
        ("features", lambda v: v and all(map(is_size, v)), "one or more whole numbers, each at least 1"),
        ("epochs batch_size steps streams layers embedding projection decay_after", _fits, "below 2**31"),
        ("features", lambda v: all(map(_fits, v)), "below 2**31"),
        ("learning_rate clip decay", lambda v: v > 0, "above 0"),
        ("init_scale", lambda v: v is None or v > 0, "above 0"),
        ("weight_decay", lambda v: v >= 0, "at least 0"),
        ("learning_rate clip decay init_scale weight_decay", lambda v: v is None or math.isfinite(v), "finite"),
        ("warmup decay_after", lambda v: is_size(v, 0), "a whole number, at least 0"),
        ("dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("seed", lambda v: is_size(v, 0) and _fits(v), "a whole number in [0, 2**31)"),
    ):
        for name in names.split():
            if not _holds(holds, getattr(config, name)):
                raise UserError(f"{flag(name)} must be {expected}; got {getattr(config, name)!r}.")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if not is_choice(value, choices):
            raise UserError(f"{flag(name)} must be one of {', '.join(map(str, choices))}; got {value!r}.")
    if config.weight_decay and config.optimizer != "adamw":
        raise UserError(f"--weight-decay is for --optimizer adamw; got {config.weight_decay} with {config.optimizer}.")
    if config.preset is not None:
        given, usual, own = map(dataclasses.asdict, (config, Config(), PRESETS[config.preset]))
        if not any(given[name] == own[name] != usual[name] for name in own if name != "preset"):
            raise UserError(
                f"--preset {config.preset} has none of its settings here. From Python: "
                f"dataclasses.replace(ranjax.config.PRESETS[{config.preset!r}], ...)."
            )


def _fits(size: Any) -> bool:
    """Whether it is an int32, as arrays' indices and steps are."""
    return size is None or size < 2**31


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(str(value)) and "\0" not in str(value)


def _choices(kind: Any) -> tuple:
    """The values that a setting of this type may have, where they can be told one by one."""
    if kind is bool:
        return True, False
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = get_args(kind)
    return (*get_args(parts[0]), None) if parts and get_origin(parts[0]) is Literal else ()


_CHOICES = {name: choices for name, kind in get_type_hints(Config).items() if (choices := _choices(kind))}


def _holds(condition: Callable[[Any], Any], value: Any) -> bool:
    try:
        return bool(condition(value))
    except (TypeError, ValueError, OverflowError):  # a text for a number, one size for several, an array, 10**400
        return False


_ZAREMBA = Config(optimizer="sgd", schedule="decay", tie=False, dataset="ptb", activation="tanh", warmup=0)

# Lee et al. 2017 (the authors' code) for medium, large and text8; Zaremba et al. 2014's small network, as in
# TensorFlow's tutorial. text8 there has a dropout of 0.1 on whole embedding rows and 0.4 on outputs; here 0.4 on both.
PRESETS = {
    "ptb-small": dataclasses.replace(
        _ZAREMBA, preset="ptb-small", features=(200,), dropout=0.0, learning_rate=1.0, decay=0.5, decay_after=4,
        epochs=13, batch_size=20, steps=20, clip=5.0, init_scale=0.1,
    ),
    "ptb-medium": dataclasses.replace(
        _ZAREMBA, preset="ptb-medium", features=(650,), dropout=0.5, learning_rate=1.0, decay=0.8, decay_after=6,
        epochs=39, batch_size=20, steps=35, clip=5.0, init_scale=0.05,
    ),
    "ptb-large": dataclasses.replace(
        _ZAREMBA, preset="ptb-large", features=(1500,), dropout=0.65, learning_rate=0.8, decay=1 / 1.15,
        decay_after=14, epochs=55, batch_size=20, steps=35, clip=10.0, init_scale=0.04,
    ),
    "text8": dataclasses.replace(
        _ZAREMBA, preset="text8", dataset="text8", layers=3, features=(1024, 1024, 2048), embedding=128, dropout=0.4,
        learning_rate=0.2, decay=1 / 1.03, decay_after=5, epochs=500, batch_size=128, steps=100, clip=10.0,
        init_scale=0.04,
    ),
}  # fmt: skip

# What may differ between a run and its resumption.
_FREE = {"out", "resume", "data_dir", "epochs"}


def parse(argv: list[str] | None = None) -> Config:
    """Reads the flags; with --preset or --resume the preset or the saved settings are their defaults."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in (None, "None", *PRESETS):
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}.")

    def read(default: Config) -> Config:
        return normalised(tyro.cli(Config, args=argv, default=default, prog="python -m ranjax.train"))

    default = PRESETS.get(preset or "", Config())
    config = read(default)
    if config.resume:
        default = dataclasses.replace(load_config(config.directory), out=str(config.directory))
        config = read(default)
    for name, schedule in (("warmup", "cosine"), ("decay", "decay"), ("decay_after", "decay")):
        if config.schedule != schedule and getattr(config, name) != getattr(default, name):
            got = f"{getattr(config, name)} with {config.schedule}"
            raise UserError(f"{flag(name)} is for --schedule {schedule}; got {got}.")
    return config


def normalised(config: Config) -> Config:
    """The settings as a run keeps them: paths of text as absolute ones, so that it can be used from any directory, and
    Python's own numbers."""
    config = dataclasses.replace(config, **{name: _number(value) for name, value in vars(config).items()})
    dataset, data_dir, features = str(config.dataset), config.data_dir, config.features
    path = Path(os.path.expanduser(dataset))
    named = dataset in (*KNOWN, *EMBEDDED) or task_of(dataset) is not None
    if dataset and os.path.exists(path) and not named:  # False, too, for a name that no path can have
        dataset = str(path.resolve())
    return dataclasses.replace(
        config,
        dataset=dataset,
        out=config.out and str(config.out),
        data_dir=data_dir and str(Path(os.path.expanduser(data_dir)).resolve()),
        features=tuple(map(_number, features)) if isinstance(features, tuple | list) else features,
    )


def _number(value: Any) -> Any:
    """A setting that is a number of NumPy's as Python's; any other as it is."""
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
            f"the run in {config.directory} was made with another configuration ({'; '.join(changed)}). "
            "Resume without these flags, or start a run of its own with another --out."
        )


def save_config(config: Config, directory: Path) -> None:
    """Writes the settings beside the checkpoints."""
    text = json.dumps(dataclasses.asdict(config) | {"resume": False}, indent=2)
    write_whole(directory / "config.json", text + "\n")


def load_config(directory: Path) -> Config:
    """Reads the settings of a run."""
    path = Path(os.path.expanduser(directory)).resolve() / "config.json"
    if not path.is_file():
        raise UserError(f"{path.parent} is not a run: it has no config.json. Give the --out directory of a run.")
    saved = read_json(path, "features")
    fields = {field.name for field in dataclasses.fields(Config)}
    if set(saved) - fields:
        unknown = ", ".join(sorted(set(saved) - fields))
        raise UserError(f"{path} has settings this version does not know: {unknown}. Use the version that wrote it.")
    config = Config(**saved)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error} Restore it, or train anew.") from None
    return normalised(config)
