"""The names that options take, each in one place.

No import here is slow, so that programs that read flags by these types can answer `--help` at once.
"""

from typing import Literal

Cell = Literal["ran", "lstm", "gru", "rnn"]
Gates = Literal["recurrent", "diagonal", "input"]
GateInit = Literal["zeros", "half-lives", "half-lives-variance"]
Block = Literal["plain", "residual"]
Softmax = Literal["full", "adaptive"]
Optimizer = Literal["sgd", "adamw", "muon", "schedule_free"]
Average = Literal["never", "non-monotone"]
Precision = Literal["float32", "bfloat16"]
Activation = Literal["tanh", "identity"]
Solver = Literal["auto", "sequential", "associative", "chunked", "pallas", "fixed_point", "newton"]
Tokenizer = Literal["word", "character", "byte", "bpe"]
Split = Literal["train", "valid", "test"]
Resume = bool | Literal["auto"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Reduction = Literal["max", "l1", "l2", "contribution"]
