"""The model of a run: built from its settings, and with the parameters that it has learned."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ranjax.data.vocabulary import Vocabulary, load_vocabulary
from ranjax.errors import UserError, check_path, in_flags
from ranjax.lm import DROPOUTS, LanguageModel
from ranjax.training.arrays import load_tensors
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import Config, load_config
from ranjax.training.folder import absolute
from ranjax.training.hub import download
from ranjax.training.size import check_memory

TENSORS = "model.safetensors"
FILES = TENSORS, "config.json", "vocabulary.json", "text.json"  # what is read of a model that was exported


@dataclass(frozen=True)
class Run:
    """A trained model: the best parameters of a run, its settings and its vocabulary."""

    config: Config
    vocabulary: Vocabulary
    model: LanguageModel
    params: Any


def load_run(directory: str | Path) -> Run:
    """Loads the best state of the run that `--out` named, or the model in a folder that `ranjax.export` wrote.

    Raises:
      UserError: if the directory is neither, has no checkpoint yet, or one that does not fit its settings.
    """
    check_path("directory", directory)
    directory = absolute(directory)
    config = load_config(directory)
    vocabulary = load_vocabulary(directory / "vocabulary.json")
    check_memory(config, len(vocabulary))
    model = build_model(config, len(vocabulary))
    like = abstract_params(model)
    if (directory / TENSORS).exists():
        return Run(config, vocabulary, model, load_tensors(directory / TENSORS, like))
    return Run(config, vocabulary, model, Checkpoints(directory).load("best", like))


def load_model(source: str | Path, revision: str | None = None) -> Run:
    """Loads a trained model from a folder, or from the hub.

    Nothing that is downloaded is executed; from the hub come the files of a model only, into its usual cache, and where
    they came from is printed on standard error.

    Args:
      source: a folder that `python -m ranjax.export` wrote, the directory of a run; or, where there is no such path,
        the id of a model on the hub, `"owner/name"`.
      revision: of a model on the hub: a branch, a tag or a commit. None: its main branch.

    Returns:
      The model: `run.model`, `run.params`, `run.vocabulary` and `run.config`.

    Raises:
      UserError: for a source that is neither, a hub that does not answer, files that are damaged or do not fit.

    Example:
      >>> import ranjax
      >>> ranjax.load_model("no/such/model")
      Traceback (most recent call last):
      ranjax.errors.UserError: no/such/model is neither a folder nor the id of a model on the hub, OWNER/NAME.
    """
    check_path("source", source)
    try:
        local = os.path.lexists(absolute(source))
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from None
    if local:
        if revision is not None:
            raise UserError(f"`revision` is for a model on the hub; got {revision!r} with the folder {source}.")
        return load_run(source)
    folder = download(str(source), revision, FILES)
    print(f"{source} is no folder here: loaded from the hub, at {folder.name}.", file=sys.stderr)
    return load_run(folder)


def build_model(config: Config, vocabulary: int) -> LanguageModel:
    """The model that a configuration describes."""
    names = ("cell", "features", "layers", "embedding", "projection", "gates", "activation", "solver")
    names += ("gate_init", "half_life", "block", "conv_width", "expansion")
    names += ("tie", "softmax", "cutoffs", "init_scale", "locked", *DROPOUTS)
    with in_flags(names):
        dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
        model = LanguageModel(vocabulary, dtype=dtype, **{name: getattr(config, name) for name in names})
        abstract_params(model)
    return model


def abstract_params(model: LanguageModel) -> Any:
    """The shapes and dtypes of a model's parameters."""
    init = partial(model.init, deterministic=True)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
