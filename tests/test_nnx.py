"""The modules for Flax NNX: equal to the Linen ones, and at home in NNX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from networks import inputs, randomised, variants

import ranjax
import ranjax.nnx as ours
from ranjax.cell import GATES

MASKS = {"seq_lengths": np.array([3, 7]), "segment_starts": np.arange(7)[None] == np.array([[2], [5]])}
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6))


def linen_module(kind, **options):
    cell = ranjax.RANCell(4, **options)
    return {
        "cell": lambda: cell,
        "layer": lambda: ranjax.RAN(cell, return_carry=True),
        "block": lambda: ranjax.ResidualBlock(cell, return_carry=True),
    }[kind]()


def arguments(kind):
    return (jnp.ones((2, 4)), inputs(2, 3)) if kind == "cell" else (inputs(2, 7, 3),)


@pytest.mark.parametrize("kind", ["cell", "layer", "block"])
@variants
def test_outputs_and_gradients_equal_those_of_linen(kind, options):
    """With every leaf at random."""
    linen, masks = linen_module(kind, **options), {} if kind == "cell" else MASKS
    variables = randomised(linen.init(jax.random.key(0), *arguments(kind)), scale=0.5)
    module = ours.from_linen(linen, variables)
    close(module(*arguments(kind), **masks), linen.apply(variables, *arguments(kind), **masks))

    def loss(call):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(call(*arguments(kind), **masks)))

    found = nnx.grad(loss)(module)
    expected = jax.grad(lambda v: loss(partial(linen.apply, v)))(variables)["params"]
    found = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(found))
    }
    expected = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    close(found, expected)


@pytest.mark.parametrize("kind", ["cell", "layer", "block"])
def test_conversion_goes_both_ways(kind):
    linen = linen_module(kind)
    variables = randomised(linen.init(jax.random.key(0), *arguments(kind)))
    same, found = ours.to_linen(ours.from_linen(linen, variables))
    jax.tree.map(np.testing.assert_array_equal, found, dict(variables))
    assert same == linen.clone(parent=None)


@pytest.mark.parametrize("gates", GATES)
def test_the_cell_runs_in_flax_rnn_and_bidirectional(gates):
    cell, x = ours.RANCell(3, 4, gates=gates, rngs=nnx.Rngs(0)), inputs(2, 7, 3)
    close(nnx.RNN(cell)(x), ours.RAN(cell)(x))
    other = ours.RANCell(3, 4, gates=gates, rngs=nnx.Rngs(1))
    both = (nnx.Bidirectional(kind(cell), kind(other), rngs=nnx.Rngs(0)) for kind in (nnx.RNN, ours.RAN))
    lengths = np.array([7, 5])
    expected, found = (layer(x, seq_lengths=lengths) for layer in both)
    close(found[0], expected[0])
    close(found[1, :5], expected[1, :5])


def test_the_carry_is_zeros_or_drawn():
    cell = ours.RANCell(3, 4, rngs=nnx.Rngs(0))
    assert not jnp.any(cell.initialize_carry((2, 3)))
    drawn = cell.initialize_carry((2, 3), nnx.Rngs(1), nn.initializers.normal())
    assert drawn.shape == (2, 4)
    assert jnp.all(drawn != 0)
    assert cell.num_feature_axes == 1
    with pytest.raises(ValueError, match=r"`carry_init` draws from `rngs`; got None\. Pass nnx.Rngs"):
        cell.initialize_carry((2, 3), carry_init=nn.initializers.normal())
    assert not nnx.state(cell, nnx.RngState)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.block = ours.ResidualBlock(ours.RANCell(3, 4, gates="input", rngs=rngs), dropout=0.5, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.block(x))


def test_a_model_trains_under_jit():
    model, x = Model(nnx.Rngs(0)), jnp.asarray(inputs(4, 9, 3))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(x) - jnp.cumsum(x, 1)[..., :1])))(
            model
        )
        optimizer.update(model, gradient)
        return loss

    model.eval()
    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_is_switched_by_train_and_eval():
    model, x = Model(nnx.Rngs(0, dropout=1)), inputs(4, 9, 3)
    model.train()
    assert not jnp.allclose(model(x), model(x))  # other masks at every call
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    key = {"deterministic": False, "rngs": nnx.Rngs(dropout=5)}
    first = model.block(x, **key)
    assert not jnp.allclose(first, model.block(x, deterministic=True))


def test_split_merge_and_an_ensemble():
    layer, x = ours.RAN(ours.RANCell(3, 4, gates="input", rngs=nnx.Rngs(0))), inputs(2, 7, 3)
    graph, state = nnx.split(layer)
    assert len(jax.tree.leaves(state)) == 3
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), layer(x))

    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=0, out_axes=0)
    def created(rngs):
        return ours.RAN(ours.RANCell(3, 4, gates="input", rngs=rngs))

    many = created(nnx.Rngs(0))
    outputs = nnx.vmap(lambda layer: layer(x))(many)
    assert outputs.shape == (5, 2, 7, 4)
    assert not jnp.allclose(outputs[0], outputs[1])


def test_orbax_saves_and_restores_a_layer(tmp_path):
    import orbax.checkpoint as ocp  # flax needs it

    layer, other = (ours.RAN(ours.RANCell(3, 4, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        state = nnx.state(other)
        restored = checkpointer.restore(tmp_path / "layer", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    np.testing.assert_array_equal(other(inputs(2, 7, 3)), layer(inputs(2, 7, 3)))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ours.RANCell(0, 4, rngs=nnx.Rngs(0)), ValueError, "`in_features` must be a whole number"),
        (lambda: ours.RANCell(3, 4, gates="x", rngs=nnx.Rngs(0)), ValueError, "`gates` must be one of"),
        (lambda: ours.RAN(ranjax.RANCell(4)), TypeError, r"`cell` must be a ranjax.nnx.RANCell; got a RANCell"),
        (
            lambda: ours.from_linen(nn.Dense(3), {"params": {}}),
            TypeError,
            "`module` must be a ranjax.RANCell, .* Dense",
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_variables_of_another_module_are_refused():
    x = inputs(2, 7, 3)
    variables = ranjax.RAN(ranjax.RANCell(4, "input")).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"`variables` must be those of the module, of the shapes .*; got"):
        ours.from_linen(ranjax.RAN(ranjax.RANCell(4)), variables)
