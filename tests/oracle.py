"""The equations as plain loops in float64 numpy: the oracle of every test."""

import numpy as np


def recurrence(decay, inputs, initial=None, reverse=False):
    """h_t = decay_t * h_{t-1} + inputs_t over axis -2."""
    wide = np.complex128 if np.iscomplexobj(decay) or np.iscomplexobj(inputs) else np.float64
    decay, inputs = np.asarray(decay, wide), np.asarray(inputs, wide)
    h = np.zeros_like(inputs[..., 0, :] if inputs.shape[-2] else inputs.sum(-2))
    h = h if initial is None else np.asarray(initial, wide)
    states = np.zeros_like(inputs)
    order = range(inputs.shape[-2])
    for t in reversed(order) if reverse else order:
        h = decay[..., t, :] * h + inputs[..., t, :]
        states[..., t, :] = h
    return states


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def ran(params, x, c0, activation, starts=None, lengths=None):
    """States and outputs of a RAN over x `(batch, time, in)`; padding passes the state on."""
    g = np.tanh if activation == "tanh" else lambda c: c
    gates, x = params["gates"], np.asarray(x, np.float64)
    kernel = np.asarray(gates["kernel"], np.float64)

    def output(c):
        if "projection" not in params:
            return g(c)
        return g(c) @ np.asarray(params["projection"]["kernel"]) + np.asarray(params["projection"]["bias"])

    c, states = np.array(c0, np.float64), []
    for t in range(x.shape[1]):
        before = c if starts is None else np.where(starts[:, t, None], 0, c)
        z = np.einsum("bn,ngf->bgf", np.nan_to_num(x[:, t]), kernel) + np.asarray(gates["bias"])
        u = np.asarray(gates.get("recurrent_kernel", np.zeros(0)), np.float64)
        if u.ndim == 3:
            z = z + np.einsum("bn,ngf->bgf", output(before), u)
        elif u.ndim == 2:
            z = z + output(before)[:, None, :] * u
        i, f = sigmoid(z[:, 0]), sigmoid(z[:, 1])
        after = i * (np.nan_to_num(x[:, t]) @ np.asarray(params["content"]["kernel"], np.float64)) + f * before
        c = after if lengths is None else np.where((t < np.asarray(lengths))[:, None], after, c)
        states.append(c)
    states = np.stack(states, axis=1)
    return states, output(states)


def gates(params, x, states, c0, activation, starts=None, lengths=None):
    """Both gates of every step of a RAN without projection, from its states: shut or open for certain under masks."""
    g = np.tanh if activation == "tanh" else lambda c: c
    before = np.concatenate([np.asarray(c0)[:, None], states[:, :-1]], axis=1)
    before = before if starts is None else np.where(np.asarray(starts)[..., None], 0, before)
    z = np.einsum("btn,ngf->btgf", np.nan_to_num(x), params["gates"]["kernel"]) + np.asarray(params["gates"]["bias"])
    u = np.asarray(params["gates"].get("recurrent_kernel", np.zeros(0)))
    if u.ndim > 1:
        z = z + (np.einsum("btn,ngf->btgf", g(before), u) if u.ndim == 3 else g(before)[:, :, None] * u)
    i, f = np.moveaxis(sigmoid(z), 2, 0)
    if starts is not None:
        f = np.where(np.asarray(starts)[..., None], 0, f)
    if lengths is not None:
        padding = (np.arange(x.shape[1]) >= np.asarray(lengths)[:, None])[..., None]
        i, f = np.where(padding, 0, i), np.where(padding, 1, f)
    return i, f


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def silu(z):
    return z * sigmoid(z)


def residual_block(params, x, step, carry, history, starts=None, lengths=None):
    """Outputs, carry and history of a residual block over x `(batch, time, in)`; `step(carry, v) -> (carry, h)`."""
    products = {name for name in params if name in ("gate", "out", "mlp_gate", "mlp_in", "mlp_out")}
    p = {name: np.asarray(params[name]["kernel"], np.float64) for name in products}
    scales = {name: np.asarray(params[name]["scale"], np.float64) for name in params if "norm" in name}
    conv, outputs = np.asarray(params.get("conv", np.zeros((1, 1))), np.float64), []
    starts = np.zeros(x.shape[:2], bool) if starts is None else starts
    lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
    for t in range(x.shape[1]):
        before = np.where(starts[:, t, None], 0, carry)
        n = rms_norm(np.nan_to_num(x[:, t]), scales["norm"])
        recent = np.concatenate([n[:, None], np.where(starts[:, t, None, None], 0, history)], axis=1)
        after, h = step(before, n + np.sum(conv * recent, axis=1))
        z = np.nan_to_num(x[:, t]) + (h * silu(n @ p["gate"])) @ p["out"]
        if "mlp_in" in p:
            m = rms_norm(z, scales["mlp_norm"])
            z = z + ((m @ p["mlp_in"]) * silu(m @ p["mlp_gate"])) @ p["mlp_out"]
        valid = t < lengths
        carry = np.where(valid[:, None], after, carry)
        history = np.where(valid[:, None, None], recent[:, : history.shape[1]], history)
        outputs.append(z)
    return np.stack(outputs, axis=1), carry, history
