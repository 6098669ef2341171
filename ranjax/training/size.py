"""What a model takes of a device's memory, by arithmetic: before an array or a layer of it exists."""

from pathlib import Path
from typing import Any

import jax

from ranjax.cli import printable
from ranjax.data import Corpus, is_named
from ranjax.device import free_memory
from ranjax.errors import UserError
from ranjax.output import default_cutoffs, tail_features
from ranjax.training.config import Config

UNKNOWN = 2**50  # bytes; more than this no device has, whatever it reports
# In training: the parameters, their gradient, what the optimizer keeps of each; `average` keeps one more.
COPIES = {"sgd": 2, "adamw": 4, "muon": 3, "schedule_free": 4}


def parameter_count(config: Config, vocabulary: int) -> int:
    """The number of parameters of the model that these settings describe.

    Example:
      >>> from ranjax.training.config import Config
      >>> from ranjax.training.size import parameter_count
      >>> parameter_count(Config(features=(200,), tie=False), vocabulary=10_000)
      4410800
    """
    sizes = config.features
    layers = config.layers or (2 if len(sizes) == 1 else len(sizes))
    outputs = [config.projection or size for size in sizes]
    residual = config.block == "residual"
    embedding = config.embedding or (outputs[-1] if config.tie and not residual else sizes[0])
    if residual:
        blocks = [_block(config, embedding, *shape) for shape in zip(sizes, outputs, strict=True)]
        return sum(blocks) * (layers // len(sizes)) + embedding + _words(config, vocabulary, embedding, embedding)
    stack = sum(_layer(config, *shape) for shape in zip([embedding, *outputs], sizes, outputs, strict=False))
    if len(sizes) == 1:
        stack += (layers - 1) * _layer(config, outputs[0], sizes[0], outputs[0])
    return stack + _words(config, vocabulary, embedding, outputs[-1])


def kind_of(config: Config) -> str:
    """The cell, its gates and its block, in words."""
    gates = f", {config.gates} gates" if config.cell == "ran" else ""
    return config.cell.upper() + gates + (", residual" if config.block == "residual" else "")


def described_run(config: Config, corpus: Corpus) -> str:
    """What is trained on what, in one line."""
    vocabulary = len(corpus.vocabulary)
    name = config.dataset if is_named(config.dataset) else Path(config.dataset).name
    text = f"{name}: {len(corpus.train):,} tokens ({corpus.vocabulary.tokenizer}, {vocabulary:,} kinds)"
    layers, sizes = config.layers or (2 if len(config.features) == 1 else len(config.features)), config.features
    size = f"{layers} x {sizes[0]}" if len(sizes) == 1 else " + ".join(map(str, sizes))
    return f"{printable(text)}; {kind_of(config)}, {size}, {parameter_count(config, vocabulary):,} parameters"


def _words(config: Config, vocabulary: int, embedding: int, output: int) -> int:
    """The number of parameters of the embedding and of the output layer."""
    if config.softmax == "full":
        return vocabulary * embedding + vocabulary * (1 if config.tie else output + 1)
    cutoffs = config.cutoffs or default_cutoffs(vocabulary)
    total = (cutoffs[0] + len(cutoffs)) * (output + 1)
    for k, (first, last) in enumerate(zip(cutoffs, (*cutoffs[1:], vocabulary), strict=True), 1):
        size = tail_features(output, k)
        total += size * output + (last - first) * (size + 1)
    return total + (0 if config.tie else vocabulary * embedding)


def _block(config: Config, width: int, size: int, output: int) -> int:
    """The number of parameters of one residual block."""
    conv = config.conv_width * width if config.conv_width > 1 else 0
    mlp = 0 if config.expansion is None else width + 3 * width * int(config.expansion * width)
    return width + conv + _layer(config, width, size, output) + 2 * width * output + mlp


def _layer(config: Config, inputs: int, size: int, output: int) -> int:
    """The number of parameters of one layer."""
    match config.cell:
        case "lstm":
            return 4 * size * (inputs + size + 1)
        case "gru":
            return 3 * size * (inputs + size + 1) + size
        case "rnn":
            return size * (inputs + size + 1)
    seen = {"input": 0, "diagonal": 1, "recurrent": output}[config.gates]  # by each of the two gates, of h or c
    return size * (3 * inputs + 2 * seen + 2) + ((size + 1) * output if config.projection else 0)


def check_memory(config: Config, vocabulary: int, copies: int = 1) -> None:
    """Raises a UserError for a model that the free memory of the device does not hold.

    Args:
      config: the settings.
      vocabulary: number of tokens.
      copies: how many arrays of the size of all parameters there are at least.
    """
    device = jax.local_devices()[0]
    parameters, free = parameter_count(config, vocabulary), free_memory(device)
    takes = 4 * parameters * copies
    if takes > (UNKNOWN if free is None else free):
        have = "" if free is None else f", of which {free / 1e6:,.0f} MB are free"
        raise UserError(
            f"a model of {parameters:,} parameters takes at least {takes / 1e6:,.0f} MB of {device}'s memory{have}. "
            "Lower --features, --embedding or --layers."
        )


def check_step(compiled: Any) -> str:
    """What a compiled step takes of the device's memory, in words.

    Args:
      compiled: `jitted.lower(...).compile()`, whose arguments are on the device.

    Raises:
      UserError: where what it takes beside them is more than is free.
    """
    takes, device = compiled.memory_analysis(), jax.local_devices()[0]
    more = takes.temp_size_in_bytes + takes.output_size_in_bytes - takes.alias_size_in_bytes
    state = takes.argument_size_in_bytes
    described = f"a step takes {more / 1e6:,.0f} MB beside the {state / 1e6:,.0f} of its state and text"
    free = free_memory(device)
    if free is None:
        return described
    if more > free:
        raise UserError(
            f"{described}, and {free / 1e6:,.0f} MB of {device}'s memory are free. Give --accumulate or --remat a "
            "larger number, or lower --batch-size, --steps or --features."
        )
    return f"{described}; {free / 1e6:,.0f} MB are free"
