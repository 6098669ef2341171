"""The equations as plain loops in float64 numpy: the oracle of every test."""

import numpy as np


def recurrence(decay, inputs, initial=None, reverse=False):
    """h_t = decay_t * h_{t-1} + inputs_t over axis -2."""
    decay, inputs = np.asarray(decay, np.float64), np.asarray(inputs, np.float64)
    h = np.zeros_like(inputs[..., 0, :] if inputs.shape[-2] else inputs.sum(-2))
    h = h if initial is None else np.asarray(initial, np.float64)
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
        return g(c) @ params["projection"]["kernel"] + params["projection"]["bias"]

    c, states = np.array(c0, np.float64), []
    for t in range(x.shape[1]):
        before = c if starts is None else np.where(starts[:, t, None], 0, c)
        z = np.einsum("bn,ngf->bgf", np.nan_to_num(x[:, t]), kernel) + gates["bias"]
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
