"""Text from an exported RAN by NumPy alone, without JAX and ranjax: the likeliest token each time.

python examples/numpy_reader.py FOLDER "the prompt" 100
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale


def layer(w, x, c, history, g):
    residual = "norm.scale" in w
    n = norm(x, w["norm.scale"]) if residual else x
    steps = [n, *history]  # the latest first
    v = n + sum(a * step for a, step in zip(w["conv"], steps, strict=True)) if "conv" in w else n
    z = np.tensordot(v, w["cell.gates.kernel"], 1) + w["cell.gates.bias"]
    if (a := w.get("cell.gates.recurrent_kernel")) is not None:
        z = z + (g(c) * a if a.ndim == 2 else np.tensordot(g(c), a, 1))
    c = sigmoid(z[0]) * (v @ w["cell.content.kernel"]) + sigmoid(z[1]) * c  # c_t = i_t * (W x_t) + f_t * c_{t-1}
    if residual:
        gate = n @ w["gate.kernel"]
        x = x + (g(c) * gate * sigmoid(gate)) @ w["out.kernel"]
    if "mlp_in.kernel" in w:
        m = norm(x, w["mlp_norm.scale"])
        gate = m @ w["mlp_gate.kernel"]
        x = x + (m @ w["mlp_in.kernel"] * gate * sigmoid(gate)) @ w["mlp_out.kernel"]
    return x if residual else g(c), c, steps[:-1]


def logits_of(ids, config, weights):
    names = sorted(
        {name.split(".")[0] for name in weights if name.startswith("stack_")}, key=lambda name: int(name[6:])
    )
    stack = [{n.removeprefix(f"{name}."): a for n, a in weights.items() if n.startswith(f"{name}.")} for name in names]
    embedding, residual = weights["embed.embedding"], config["block"] == "residual"
    history = [np.zeros(embedding.shape[1])] * (config["conv_width"] - 1) * residual
    states = [(np.zeros(w["cell.gates.bias"].shape[1]), history) for w in stack]
    readout = embedding.T if config["tie"] else weights["decode.kernel"]
    bias = weights["bias" if config["tie"] else "decode.bias"]
    for i in ids:
        x = embedding[i] * (embedding.shape[1] ** 0.5 if residual else 1)
        for n, w in enumerate(stack):
            x, *states[n] = layer(w, x, *states[n], np.tanh if config["activation"] == "tanh" else np.positive)
        x = norm(x, weights["norm.scale"]) if residual else x
        yield x @ readout + bias


def generate(folder, prompt, length):
    config, vocabulary = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("config", "vocabulary"))
    tokens, words = list(vocabulary["content"]), vocabulary["tokenizer"] == "word"
    parts = prompt.replace("\n", " <eos> ").split() if words else prompt
    kind = config["cell"], config["softmax"], config["projection"], vocabulary["tokenizer"] == "bpe"
    if kind != ("ran", "full", None, False) or set(parts) - set(tokens):
        raise SystemExit("for RANs with a full softmax over words or characters that the model has, no projection")
    data, weights = (folder / "model.safetensors").read_bytes(), {}
    begin = 8 + int.from_bytes(data[:8], "little")  # the length of the header; the header, as JSON; the arrays
    for name, one in json.loads(data[8:begin]).items():
        first, last = (begin + offset for offset in one["data_offsets"])
        weights[name] = np.frombuffer(data[first:last], "<f4").reshape(one["shape"])
    ids = [tokens.index(part) for part in parts]
    for n, logits in enumerate(islice(logits_of(ids, config, weights), len(ids) + length - 1), 1):  # the list grows
        ids += [int(np.argmax(logits))] * (n == len(ids))
    text = (" " if words else "").join(tokens[i] for i in ids)
    return text.replace(" <eos>", "\n").replace("\n ", "\n") if words else text


if __name__ == "__main__":
    print(generate(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
