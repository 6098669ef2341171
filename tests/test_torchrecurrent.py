"""Parameters of `torchrecurrent.RAN` in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ranjax
from ranjax import torchrecurrent

pytestmark = pytest.mark.core


def drawn(inputs=3, size=4, layers=2):
    """A state dict with every leaf drawn."""
    rng, state = np.random.default_rng(0), {}
    for n in range(layers):
        shapes = {"weight_ih": (3 * size, size if n else inputs), "weight_hh": (2 * size, size)}
        shapes |= {"bias_ih": (2 * size,), "bias_hh": (2 * size,)}
        state |= {f"cells.{n}.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return state


def without(state, *names):
    return {name: value for name, value in state.items() if not name.endswith(names)} if names else state


def outputs(layers, x):
    h = jnp.asarray(x)
    for params in layers:
        features = params["content"]["kernel"].shape[1]
        h = ranjax.RAN(ranjax.RANCell(features)).apply({"params": {"cell": params}}, h)
    return h


@pytest.mark.parametrize("left_out", [(), ("bias_hh",), ("bias_ih", "bias_hh")])
def test_the_real_layer_has_the_same_outputs_in_and_out(left_out):
    torch = pytest.importorskip("torch", reason="needs the packages torch and torchrecurrent: pip install '.[bench]'")
    package = pytest.importorskip("torchrecurrent")
    flags = {"bias": "bias_ih" not in left_out, "recurrent_bias": "bias_hh" not in left_out}
    layer = package.RAN(3, 4, num_layers=2, batch_first=True, **flags)
    state = without(drawn(), *left_out)
    layer.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
    x = np.random.default_rng(1).normal(size=(2, 9, 3)).astype(np.float32)
    expected = layer(torch.tensor(x))[0].detach().numpy()
    ours = torchrecurrent.from_state_dict(layer.state_dict())
    np.testing.assert_allclose(outputs(ours, x), expected, rtol=0, atol=1e-6)
    again = package.RAN(3, 4, num_layers=2, batch_first=True)
    again.load_state_dict({name: torch.tensor(a) for name, a in torchrecurrent.to_state_dict(ours).items()})
    np.testing.assert_allclose(again(torch.tensor(x))[0].detach().numpy(), expected, rtol=0, atol=1e-6)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_a_loop_over_the_equations_of_that_layer_has_the_same_outputs(x64):
    state = {name: value.astype(np.float64) for name, value in drawn(layers=1).items()}
    w, r, a, b = state.values()
    x = np.random.default_rng(1).normal(size=(2, 9, 3))
    c, h, expected = np.zeros((2, 4)), np.zeros((2, 4)), []
    for t in range(9):
        gates = sigmoid(x[:, t] @ w[4:].T + a + h @ r.T + b)
        c = gates[:, :4] * (x[:, t] @ w[:4].T) + gates[:, 4:] * c
        h = np.tanh(c)
        expected.append(h)
    found = outputs(torchrecurrent.from_state_dict(state), x)
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=0, atol=1e-12)


def test_out_and_in_again_is_bitwise_the_same():
    cell = ranjax.RANCell(4)
    params = [
        jax.tree.map(lambda p: p + 0.3, cell.init(jax.random.key(n), jnp.zeros((2, 4)), jnp.zeros((2, size)))["params"])
        for n, size in enumerate((3, 4))
    ]
    back = torchrecurrent.from_state_dict(torchrecurrent.to_state_dict(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, r"must have the layers cells\.0, cells\.1, \.\.\.; got \[\]"),
        (lambda s: {"rnn.weight": 0}, "must be that of a torchrecurrent.RAN; got the name 'rnn.weight'"),
        (lambda s: {n.replace("cells.0", "cells.7"): a for n, a in s.items()}, r"must have the layers .*\[1, 7\]"),
        (lambda s: without(s, "0.weight_hh"), r"must have cells\.0\.weight_hh; got bias_hh, bias_ih, weight_ih"),
        (lambda s: s | {"cells.1.bias_ih": np.zeros(7)}, r"cells\.1\.bias_ih of the shape \(8,\); got \(7,\)"),
        (lambda s: s | {"cells.1.weight_ih": np.zeros((13, 4))}, r"cells\.1\.weight_ih of the shape \(12, 4\); got"),
    ],
)
def test_what_is_no_such_layer_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        torchrecurrent.from_state_dict(change(drawn()))


@pytest.mark.parametrize("options", [{"gates": "input"}, {"gates": "diagonal"}, {"projection": 2}])
def test_cells_that_it_does_not_have_are_refused(options):
    cell = ranjax.RANCell(4, **options)
    params = cell.init(jax.random.key(0), jnp.zeros((2, 4)), jnp.zeros((2, 3)))["params"]
    with pytest.raises(ValueError, match=r"`layers\[0\]` must be the parameters of a RANCell with gates='recurrent'"):
        torchrecurrent.to_state_dict([params])
