"""A trained model as a folder of plain files that travels: weights, settings, vocabulary, card, compiled functions."""

import dataclasses
import os
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from ranjax.data import is_named
from ranjax.errors import UserError, check_path, flag
from ranjax.lm import LanguageModel, zero_state
from ranjax.saved import is_count, is_number, is_text, read_json
from ranjax.training.arrays import by_name, save_tensors
from ranjax.training.config import Config, recipe, save_config
from ranjax.training.folder import absolute
from ranjax.training.model import TENSORS, Run, load_run

PLATFORMS = "cpu", "cuda", "tpu"
# Settings that are of one machine, and do not travel.
LOCAL = ("out", "resume", "data_dir", "mesh", "track", "profile_dir")
RESULT = {
    "test_perplexity": is_number,
    "valid_perplexity": is_number,
    "test_nats": is_number,
    "test_tokens": is_count,
    "training_seconds": is_number,
    "parameters": is_count,
    "device": is_text,
    "date": is_text,
    "versions": lambda value: isinstance(value, dict),
    "config": lambda value: isinstance(value, dict),
}


def export(directory: str | Path, out: str | Path, name: str | None = None) -> Path:
    """Writes the best state of a finished run as a folder that `ranjax.load_model` and the programs read.

    The folder has `model.safetensors` (a leaf is named by its keys with dots between them), `config.json`,
    `vocabulary.json`, `text.json` (checksums of the text), `README.md` (a model card with the figures of
    `result.json`), and `step.stablehlo` and `sequence.stablehlo`, which `jax.export` reads without ranjax; see
    `functions`. It has no path of this machine in it. It is written whole or not at all.

    Args:
      directory: of the run.
      out: the folder, which must not exist yet.
      name: of the model in its card, such as OWNER/NAME on the hub. None: the folder's.

    Returns:
      The path of the folder, absolute.

    Raises:
      UserError: for a directory that is no finished run; an `out` that exists or cannot be written.
    """
    check_path("out", out)
    run, directory, out = load_run(directory), absolute(directory), absolute(out)
    if not (directory / "result.json").exists():
        raise UserError(f"{directory} has no result.json: export a run that is finished, or go on with it: --resume.")
    result = read_json(directory / "result.json", RESULT)
    if result["config"].get("epochs") != run.config.epochs:
        raise UserError(f"{directory} was resumed and is not finished: its result.json is older. Go on: --resume.")
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists and is left unchanged. Give another --out.")
    new = out.with_name(f".ranjax-{secrets.token_hex(4)}")
    try:
        new.mkdir(parents=True)
        save_tensors(new / TENSORS, run.params)
        config = travelling(run.config)
        save_config(config, new)
        for file in ("vocabulary.json", "text.json"):
            shutil.copyfile(directory / file, new / file)
        for of, function in functions(run).items():
            (new / f"{of}.stablehlo").write_bytes(function.serialize())
        (new / "README.md").write_text(card(dataclasses.replace(run, config=config), result, name or out.name), "utf-8")
        new.rename(out)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"--out {out} cannot be written: {why}. Give another --out.") from None
        raise
    return out


def travelling(config: Config) -> Config:
    """Settings without what is of one machine: of a text in a file its name alone is left."""
    name = config.dataset if is_named(config.dataset) else Path(config.dataset).name
    return dataclasses.replace(config, dataset=name, **{name: getattr(Config, name) for name in LOCAL})


def functions(run: Run) -> dict[str, jax.export.Exported]:
    """The model as functions of arrays, lowered for CPU, CUDA and TPU, with a batch and a length that are free.

    `step(weights, state, tokens (batch,))` and `sequence(weights, state, tokens (batch, time))` return the logits of
    the next tokens, `(batch, [time,] vocabulary)`, and the next state. `weights` is the dictionary that the library
    safetensors reads from `model.safetensors`; `state` is a list of arrays, zeros at the beginning of a text, whose
    shapes `in_avals` has. A recurrence is run step by step on every platform, so that the outputs are those of the
    sequential scan.
    """
    model = _sequential(run.model)
    leaves, structure = jax.tree.flatten(zero_state(model, run.params, 1))

    def sequence(weights, state, tokens):
        carries = jax.tree.unflatten(structure, state)
        params = unflatten_dict(weights, sep=".")
        logits, carries = model.apply({"params": params}, tokens, carries, deterministic=True)  # pyright: ignore
        return logits, jax.tree.leaves(carries)

    def step(weights, state, tokens):
        logits, state = sequence(weights, state, tokens[:, None])
        return logits[:, 0], state

    batch, time = jax.export.symbolic_shape("batch, time")
    weights = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in by_name(run.params).items()}
    state = [jax.ShapeDtypeStruct((batch, *c.shape[1:]), c.dtype) for c in leaves]
    tokens = {"step": (batch,), "sequence": (batch, time)}
    return {
        function.__name__: jax.export.export(jax.jit(function), platforms=PLATFORMS)(
            weights, state, jax.ShapeDtypeStruct(tokens[function.__name__], jnp.int32)
        )
        for function in (step, sequence)
    }


def _sequential(model: LanguageModel) -> LanguageModel:
    return model.clone(solver="sequential") if model.cell == "ran" else model


def card(run: Run, result: dict[str, Any], name: str) -> str:
    """The model card: what the model is, its figures, how it is used."""
    config = run.config
    # What is in a cell of the table must not end it.
    rows = {
        "data set": config.dataset.replace("|", "\\|"),
        "tokens": f"{run.vocabulary.tokenizer}, {len(run.vocabulary):,} in the vocabulary",
        "parameters": f"{result['parameters']:,}",
        "test perplexity": f"{result['test_perplexity']:.2f}",
        "test nats per token": f"{result['test_nats']:.4f} over {result['test_tokens']:,} tokens",
        "validation perplexity": f"{result['valid_perplexity']:.2f}",
        "training": f"{result['training_seconds'] / 60:.1f} minutes on {result['device']}, {result['date']}",
        "versions": ", ".join(f"{package} {of}" for package, of in result["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return CARD.format(name=name, cell=config.cell.upper(), table=table, flags=flags(config))


def flags(config: Config) -> str:
    """The command line of a training with these settings, without what is of one machine.

    Example:
      >>> from ranjax.training.config import Config
      >>> from ranjax.training.exported import flags
      >>> flags(Config(dataset="markov", features=(8, 9), expansion=None, tie=False))
      '--dataset markov --cell ran --block plain --gates recurrent --expansion None --features 8 9 --no-tie'
    """
    given = ("dataset", "cell", "block", "gates") if config.cell == "ran" else ("dataset", "cell", "block")
    otherwise = vars(recipe(*(getattr(config, name) for name in given)))
    settings = {name: getattr(config, name) for name in given} | {
        name: value for name, value in vars(config).items() if value != otherwise[name] and name not in LOCAL
    }
    return " ".join(_as_flag(name, value) for name, value in settings.items())


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    values = value if isinstance(value, tuple | list) else [value]
    return f"{flag(name)} {shlex.join(map(str, values))}"


CARD = """\
---
library_name: ranjax
pipeline_tag: text-generation
tags: [jax, flax, recurrent-neural-network, recurrent-additive-network]
---

# {name}

A recurrent language model ({cell}), trained and exported by ranjax.

| | |
| --- | --- |
{table}

## Use

```python
import jax.numpy as jnp
import ranjax

run = ranjax.load_model("{name}")  # a folder, or OWNER/NAME on the hub
tokens = jnp.array([[0, 1]])  # (batch, time); ids of a text: run.vocabulary.encode(text)[None]
logits, state = run.model.apply({{"params": run.params}}, tokens, deterministic=True)
```

    python -m ranjax.generate --checkpoint FOLDER

By JAX alone, in the folder; `sequence.stablehlo` is the same for tokens of the shape (batch, time):

```python
import jax.export
import jax.numpy as jnp
from safetensors.numpy import load_file

weights = load_file("model.safetensors")
step = jax.export.deserialize(open("step.stablehlo", "rb").read())
(_, state, _), _ = step.in_tree.unflatten(step.in_avals)
state = [jnp.zeros((1, *one.shape[1:]), one.dtype) for one in state]
logits, state = step.call(weights, state, jnp.array([0]))
```

## Training

    python -m ranjax.train {flags}
"""
