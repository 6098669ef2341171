"""What a training step differentiates: the loss of a window of text, in one piece or in parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from ranjax.lm import DROPOUTS, LanguageModel
from ranjax.solvers import Result
from ranjax.training.config import Config
from ranjax.training.mesh import on_data, over_batch, over_time
from ranjax.training.regularise import drop_weights, penalty

WEIGHTS = 2**31 - 1  # folded into the key of a window, which draws the masks of dropout

Constraint = Callable[[Any], Any]  # a function of the parameters: what the model computes with in their place


def unconstrained(params: Any) -> Any:
    """The constraint of a usual training: none."""
    return params


def make_loss(
    model: LanguageModel, config: Config, constrain: Constraint = unconstrained, mesh: Mesh | None = None
) -> Callable:
    """`loss(params, carry, window, key) -> (loss, (nats, carry, iterations))`, sums over time, means of the batch.

    `loss` is `nats`, the cross-entropy, and the penalties of the settings. With `remat` parts of the window their
    activations are computed once more in the backward pass, and only those of one part are held at a time. Each part
    then has its own masks of dropout; where they are locked, the same ones. `mesh` is as in `make_step`.
    """
    part = _part(model, config, mesh)

    def loss(params, carry, window, key):
        params = constrain(params)
        if config.dropout_weights:
            params = drop_weights(params, config.dropout_weights, jax.random.fold_in(key, WEIGHTS))
        run = partial(part, {"params": params})
        if config.remat == 1:
            loss, nats, carry, iterations = run(carry, key, window[:, :-1], window[:, 1:])
            return loss, (nats, carry, iterations)
        keys = jnp.stack([key if config.locked else jax.random.fold_in(key, n) for n in range(config.remat)])
        return _recomputed(run, carry, keys, window)

    return loss


def _part(model: LanguageModel, config: Config, mesh: Mesh | None) -> Callable:
    """`part(params, carry, key, tokens, targets) -> (loss, nats, carry, iterations)`, of some steps of a window."""
    if mesh is not None and mesh.shape["time"] > 1:
        model = model.clone(axis_name="time")
    random = any(getattr(config, name) for name in DROPOUTS)
    alpha, beta = config.activation_penalty, config.change_penalty

    def total_nats(params, hidden, targets):
        return jnp.asarray(model.apply(params, hidden, targets, method="total_nats"))

    total = over_batch(total_nats, mesh)

    def part(params, carry, key, tokens, targets):
        (hidden, carry), sown = model.apply(
            params, tokens, carry, deterministic=not (random or alpha or beta), rngs={"dropout": key},
            mutable=["solver", "outputs"], method="hidden",
        )  # fmt: skip
        nats = total(params, hidden, targets) / len(tokens)
        loss = nats
        if alpha or beta:
            [outputs] = dict(sown)["outputs"]["last"]
            loss = nats + penalty(outputs, alpha, beta, 0 if model.time_major else 1)
        return loss, nats, carry, mean_iterations(sown)

    return over_time(part, mesh)


def _recomputed(run: Callable, carry: Any, keys: Array, window: Array) -> tuple[Array, Any]:
    """The loss of a window in as many parts as there are keys, each computed again in the backward pass."""
    texts = (jnp.stack(jnp.split(text, len(keys), axis=1)) for text in (window[:, :-1], window[:, 1:]))

    def advance(carry, parts):
        loss, nats, carry, iterations = jax.checkpoint(run)(carry, *parts)
        return carry, (loss, nats, jnp.float32(iterations))

    carry, (losses, nats, iterations) = jax.lax.scan(advance, carry, (keys, *texts))
    return jnp.sum(losses), (jnp.sum(nats), carry, jnp.mean(iterations))


def mean_iterations(sown: Any) -> Array | float:
    """Of the fixed point solver in a forward pass, the mean over the layers; 0 where nothing was iterated."""
    results = jax.tree.leaves(sown.get("solver", {}), is_leaf=lambda one: isinstance(one, Result))
    return jnp.mean(jnp.stack([result.iterations for result in results])) if results else 0.0


def in_parts(differentiate: Callable, parts: int, mesh: Mesh | None = None) -> Callable:
    """A function that takes a batch in so many parts, one after another, and returns the means of what it returned.

    Args:
      differentiate: `(params, carry, window, key) -> ((loss, (nats, carry, iterations)), gradient)`.
      parts: a divisor of the batch. With 1 the function is returned as it is.
      mesh: as in `make_step`.
    """
    if parts == 1:
        return differentiate

    def split(a):  # every part has sequences of each device
        return on_data(jnp.swapaxes(a.reshape(len(a) // parts, parts, *a.shape[1:]), 0, 1), mesh, axis=1)

    def in_turn(params, carry, window, key):
        def add(sums, part):
            n, carry, window = part
            (loss, (nats, carry, iterations)), gradient = differentiate(
                params, carry, window, jax.random.fold_in(key, n)
            )
            found = loss, nats, jnp.float32(iterations), gradient
            return jax.tree.map(lambda a, b: a + b / parts, sums, found), carry

        zero = jnp.zeros(())
        sums = zero, zero, zero, jax.tree.map(jnp.zeros_like, params)
        sums, carries = jax.lax.scan(add, sums, (jnp.arange(parts), *jax.tree.map(split, (carry, window))))
        loss, nats, iterations, gradient = sums
        carry = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(parts * a.shape[1], *a.shape[2:]), carries)
        return (loss, (nats, carry, iterations)), gradient

    return in_turn
