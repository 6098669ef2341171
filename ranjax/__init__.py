r"""Recurrent additive networks in JAX and Flax.

A recurrent additive network (Lee, Levy, Zettlemoyer 2017) is a gated recurrent network whose state is updated only by
gated addition:

.. math::
    u_t &= W_c x_t                                      &&\text{content} \\
    i_t &= \sigma(W_{ix} x_t + W_{ih} h_{t-1} + b_i)    &&\text{input gate} \\
    f_t &= \sigma(W_{fx} x_t + W_{fh} h_{t-1} + b_f)    &&\text{forget gate} \\
    c_t &= i_t * u_t + f_t * c_{t-1}                    &&\text{state} \\
    h_t &= g(c_t)                                       &&\text{output, } g = \tanh \text{ or the identity}

So a state is a weighted sum of the contents of its past, and once the gates are known the recurrence is linear in c.
Gates that see x only are known beforehand (`gates="input"`, without W_ih and W_fh). Those of the paper read h_{t-1}
(`gates="recurrent"`, the default).

Public names: `RANCell`, `RAN`, `ResidualBlock`, `FixedPoint`, `solve`, `linear_recurrence`, `LanguageModel`,
`load_model` (a trained model from a folder or the hub); the modules `weights` (the inputs that a state is the sum of),
`attribution` (the words that a prediction is the sum of), `memory` (how long states last over a corpus), `nnx` (cell,
layer and block for Flax NNX) and `data`; `config`, `train`, `evaluate`, `generate`, `explain`, `compare` and
`export`, the programs from Python; `__version__`. They are imported when first used, so that programs answer `--help`
at once.
"""

import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# `python -m ranjax.PROGRAM` is looking for the program: from here on Ctrl-C ends it without a word, see `cli.start`.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if TYPE_CHECKING:
    from ranjax import compare as compare
    from ranjax import data as data
    from ranjax import evaluate as evaluate
    from ranjax import explain as explain
    from ranjax import export as export
    from ranjax import generate as generate
    from ranjax import nnx as nnx
    from ranjax import train as train
    from ranjax.block import ResidualBlock as ResidualBlock
    from ranjax.cell import RANCell as RANCell
    from ranjax.interpret import attribution as attribution
    from ranjax.interpret import memory as memory
    from ranjax.interpret import weights as weights
    from ranjax.layer import RAN as RAN
    from ranjax.lm import LanguageModel as LanguageModel
    from ranjax.scan import linear_recurrence as linear_recurrence
    from ranjax.solvers import solve as solve
    from ranjax.solvers.fixed_point import FixedPoint as FixedPoint
    from ranjax.training import config as config
    from ranjax.training.model import load_model as load_model

    __version__: str

_NAMES = {
    "FixedPoint": "solvers.fixed_point",
    "LanguageModel": "lm",
    "RAN": "layer",
    "RANCell": "cell",
    "ResidualBlock": "block",
    "linear_recurrence": "scan",
    "load_model": "training.model",
    "solve": "solvers",
}
_PROGRAMS = "compare", "evaluate", "explain", "export", "generate", "train"
_ALIASES = "attribution", "config", "memory", "weights"  # modules of the folders below, by their public names
_MODULES = {*("cell", "data", "kernels", "layer", "lm", "nnx", "scan"), *_ALIASES, *_PROGRAMS}

__all__ = [
    "RAN",
    "FixedPoint",
    "LanguageModel",
    "RANCell",
    "ResidualBlock",
    "attribution",
    "compare",
    "config",
    "data",
    "evaluate",
    "explain",
    "export",
    "generate",
    "linear_recurrence",
    "load_model",
    "memory",
    "nnx",
    "solve",
    "train",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"ranjax.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"ranjax.{name}")
    if name == "__version__":
        from importlib.metadata import version  # slow, and seldom asked for

        return version("ranjax")
    raise AttributeError(f"module 'ranjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
