"""One step of training: the state it changes, the update rule, the jitted step."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ranjax.lm import LanguageModel, zero_state
from ranjax.solvers import Result
from ranjax.training.config import Config

BAD_STEPS = 5  # in a row, after which a run stops
NOT_YET = float(jnp.finfo(jnp.float32).max)  # the best loss before the first; finite, for JAX_DEBUG_INFS
DROPOUT = 1  # folded into the key of the seed, which draws the weights

Constraint = Callable[[Any], Any]  # a function of the parameters: what the model computes with in their place


class TrainState(NamedTuple):
    """All that a run needs to go on bitwise; keys follow from the seed and the step.

    Attributes:
      params, optimizer: of the model and of optax.
      carry: the cells' states after the last window.
      step: windows trained on since the beginning; with `epoch` the position in the text.
      epoch: epochs finished, their validation included.
      loss, tokens: summed cross-entropy of the epoch so far, nats, and of how many predictions.
      bad, bad_in_row: steps skipped for a loss or gradient that was not finite.
      best: lowest validation loss so far, nats per token; `NOT_YET` before the first.
      seconds, timed: spent training, compilation left out, and on how many steps.
      iterations: of the fixed point solver, the mean over the layers, summed over the epoch so far.
    """

    params: Any
    optimizer: Any
    carry: Any
    step: Array
    epoch: Array
    loss: Array
    tokens: Array
    bad: Array
    bad_in_row: Array
    best: Array
    seconds: Array
    timed: Array
    iterations: Array


def learning_rate(config: Config, per_epoch: int) -> optax.Schedule:
    """The learning rate at a step, for an epoch of so many steps."""
    return _promoting(_schedule(config, per_epoch))


def _promoting(function: Callable) -> Callable:
    """A function of optax, whose arithmetic mixes dtypes, also where `jax_numpy_dtype_promotion` is "strict"."""

    @wraps(function)
    def call(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return call


def _schedule(config: Config, per_epoch: int) -> optax.Schedule:
    peak, total = config.learning_rate, config.epochs * per_epoch
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        warmup = min(config.warmup, total // 2)
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total, peak / 100)
    first = peak if config.decay_after else peak * config.decay
    begin = max(config.decay_after - 1, 0) * per_epoch
    return optax.exponential_decay(first, per_epoch, config.decay, begin, staircase=True)


def make_optimizer(config: Config, per_epoch: int) -> optax.GradientTransformation:
    """Global-norm clipping, then the update rule at the scheduled rate."""
    rate = learning_rate(config, per_epoch)
    rule = optax.sgd(rate) if config.optimizer == "sgd" else optax.adamw(rate, weight_decay=config.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(config.clip), rule)
    return optax.GradientTransformation(chain.init, _promoting(chain.update))


def unconstrained(params: Any) -> Any:
    """The constraint of a usual training: none."""
    return params


def initial_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    constrain: Constraint = unconstrained,
) -> TrainState:
    """The state before the first step."""
    tokens = jnp.zeros((config.batch_size, config.steps), jnp.int32)
    params = constrain(model.init(jax.random.key(config.seed), tokens, deterministic=True)["params"])
    carry = zero_state(model, params, config.batch_size)
    zero, count, most = jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.array(NOT_YET)
    state = TrainState(
        params=params, optimizer=optimizer.init(params), carry=carry, step=count, epoch=count, loss=zero,
        tokens=count, bad=count, bad_in_row=count, best=most, seconds=zero, timed=count, iterations=zero,
    )  # fmt: skip
    return jax.tree.map(jnp.copy, state)  # donated buffers must be distinct


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    windows: int,
    constrain: Constraint = unconstrained,
) -> Callable[[TrainState, Array], TrainState]:
    """One update on the window that the state points at: `step(state, text) -> state`, jitted, state donated.

    `text` is `(batch, length)`. A loss or a gradient that is not finite leaves parameters, optimiser (and with it the
    step by which the learning rate is scheduled) and carry unchanged, and is counted.

    Args:
      windows: steps an epoch.
      constrain: what the model computes with in place of its parameters, such as an ablation; the gradient goes
        through it, and it is applied after each update.
    """
    differentiate = jax.value_and_grad(make_loss(model, config, constrain), has_aux=True)
    dropout = jax.random.fold_in(jax.random.key(config.seed), DROPOUT)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, text: Array) -> TrainState:
        position = state.step % windows
        window = jax.lax.dynamic_slice_in_dim(text, position * config.steps, config.steps + 1, axis=1)
        carry = jax.tree.map(lambda c: jnp.where(position == 0, 0, c), state.carry)
        key = jax.random.fold_in(dropout, state.step)
        (loss, (new_carry, iterations)), gradient = differentiate(state.params, carry, window, key)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        new = constrain(optax.apply_updates(state.params, updates)), new_optimizer, new_carry
        running = state.bad_in_row < BAD_STEPS
        good = running & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (state.params, state.optimizer, carry))
        fresh = position == 0
        return state._replace(
            params=kept[0],
            optimizer=kept[1],
            carry=kept[2],
            step=state.step + 1,
            loss=jnp.where(fresh, 0, state.loss) + jnp.where(good, loss, 0) * config.batch_size,
            tokens=jnp.where(fresh, 0, state.tokens) + jnp.where(good, config.batch_size * config.steps, 0),
            bad=jnp.where(good, state.bad, state.bad + 1),
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
            iterations=jnp.where(fresh, 0, state.iterations) + iterations,
        )

    return step


def make_loss(model: LanguageModel, config: Config, constrain: Constraint = unconstrained) -> Callable:
    """`loss(params, carry, window, key) -> (loss, (carry, iterations))`: summed over time, averaged over the batch."""

    def loss(params, carry, window, key):
        params = {"params": constrain(params)}
        (hidden, carry), sown = model.apply(
            params, window[:, :-1], carry, deterministic=config.dropout == 0, rngs={"dropout": key},
            mutable="solver", method="hidden",
        )  # fmt: skip
        nats = jnp.asarray(model.apply(params, hidden, window[:, 1:], method="total_nats"))
        return nats / len(window), (carry, mean_iterations(sown))

    return loss


def mean_iterations(sown: Any) -> Array | float:
    """Of the fixed point solver in a forward pass, the mean over the layers; 0 where nothing was iterated."""
    results = jax.tree.leaves(sown.get("solver", {}), is_leaf=lambda one: isinstance(one, Result))
    return jnp.mean(jnp.stack([result.iterations for result in results])) if results else 0.0
