"""One step of training: the state it changes, the update rule, the jitted step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from ranjax.lm import LanguageModel, zero_state
from ranjax.training.config import Config
from ranjax.training.loss import Constraint, in_parts, make_loss, unconstrained
from ranjax.training.mesh import shardings

BAD_STEPS = 5  # in a row, after which a run stops
NOT_BEGUN = -1  # steps that an average is of
NOT_YET = float(jnp.finfo(jnp.float32).max)  # the best loss before the first; finite, for JAX_DEBUG_INFS
DROPOUT = 1  # folded into the key of the seed, which draws the weights


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
      average: of the parameters, a tree like theirs; empty where nothing is averaged.
      averaged: how many steps it is of; `NOT_BEGUN` before averaging begins.
      recent, older: validation losses of the last `patience` epochs, and the lowest before them.
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
    average: Any
    averaged: Array
    recent: Array
    older: Array


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
        average=params if config.average != "never" else {}, averaged=jnp.array(NOT_BEGUN),
        recent=jnp.full(config.patience if config.average != "never" else 0, NOT_YET), older=most,
    )  # fmt: skip
    return jax.tree.map(jnp.copy, state)  # donated buffers must be distinct


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    windows: int,
    constrain: Constraint = unconstrained,
    mesh: Mesh | None = None,
) -> Any:
    """One update on a window: `step(state, text, start=None, length=config.steps) -> state`, jitted, state donated.

    `text` is `(batch, tokens)`; `start` is where the window begins, `length` its steps. None: the window that the state
    points at, all being of `config.steps`. A loss or a gradient that is not finite leaves parameters, optimiser (and
    with it the step by which the learning rate is scheduled) and carry unchanged, and is counted.

    Args:
      windows: steps an epoch.
      constrain: what the model computes with in place of its parameters, such as an ablation; the gradient goes
        through it, and it is applied after each update.
      mesh: the devices that state and text are spread over (`ranjax.training.mesh.make_mesh`); None: one device.
    """
    loss = make_loss(model, config, constrain, mesh)
    differentiate = in_parts(jax.value_and_grad(loss, has_aux=True), config.accumulate, mesh)
    dropout = jax.random.fold_in(jax.random.key(config.seed), DROPOUT)

    @partial(jax.jit, donate_argnums=0, static_argnums=3)
    def step(state: TrainState, text: Array, start: Array | None = None, length: int = config.steps) -> TrainState:
        position = state.step % windows
        start = position * config.steps if start is None else start
        window = lax.dynamic_slice_in_dim(text, start, length + 1, axis=1)
        carry = jax.tree.map(lambda c: jnp.where(position == 0, 0, c), state.carry)
        key = jax.random.fold_in(dropout, state.step)
        (loss, (nats, new_carry, iterations)), gradient = differentiate(state.params, carry, window, key)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        new = constrain(optax.apply_updates(state.params, updates)), new_optimizer, new_carry
        running = state.bad_in_row < BAD_STEPS
        good = running & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (state.params, state.optimizer, carry))
        average, averaged = _averaged(state, kept[0], good)
        new_state = _counted(state, position == 0, good, nats * config.batch_size, config.batch_size * length)
        new_state = new_state._replace(
            average=average, averaged=averaged, params=kept[0], optimizer=kept[1], carry=kept[2],
            iterations=jnp.where(position == 0, 0, state.iterations) + iterations,
        )  # fmt: skip
        return new_state if mesh is None else lax.with_sharding_constraint(new_state, shardings(mesh, state))

    return step


def _counted(state: TrainState, fresh: Array, good: Array, loss: Array, tokens: int) -> TrainState:
    """The state with its counters after a step, which begins an epoch if it is `fresh`."""
    return state._replace(
        step=state.step + 1,
        loss=jnp.where(fresh, 0, state.loss) + jnp.where(good, loss, 0),
        tokens=jnp.where(fresh, 0, state.tokens) + jnp.where(good, tokens, 0),
        bad=jnp.where(good, state.bad, state.bad + 1),
        bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
    )


def _averaged(state: TrainState, params: Any, good: Array) -> tuple[Any, Array]:
    """The average after a step, and how many steps it is of: one more, if it has begun and the step was good."""
    averaged = jnp.where(good & (state.averaged != NOT_BEGUN), state.averaged + 1, state.averaged)
    share = jnp.where(averaged > state.averaged, 1 / jnp.maximum(averaged, 1).astype(jnp.float32), 0)
    return jax.tree.map(lambda a, p: a + share * (p - a), state.average, params if state.average else {}), averaged


def triggered(state: TrainState, nats: float) -> TrainState:
    """The state after a validation: averaging begins where it is worse than the best of all but the last `patience`.

    That is the non-monotone trigger of Merity et al. 2018.
    """
    if not state.average:
        return state
    older = jnp.minimum(state.older, state.recent[0])
    recent = jnp.append(state.recent[1:], jnp.float32(nats))
    begins = (state.averaged == NOT_BEGUN) & (nats > state.older)
    return state._replace(averaged=jnp.where(begins, 0, state.averaged), older=older, recent=recent)
