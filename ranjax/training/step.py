"""One step of training: the state it changes, the update rule, the jitted step."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ranjax.training.config import Config
from ranjax.errors import UserError, flag

if TYPE_CHECKING:
    import optax
    from jax import Array

    from ranjax.lm import LanguageModel

BAD_STEPS = 5  # in a row, after which a run stops


class TrainState(NamedTuple):
    """All that a run needs to go on bitwise; keys follow from the seed and the step.

    Attributes:
      params, optimizer: of the model and of optax.
      carry: the cells' states after the last window.
      step: windows trained on since the beginning; with `epoch` the position in the text.
      epoch: epochs finished, their validation included.
      loss, tokens: summed cross-entropy of the epoch so far, nats, and of how many predictions.
      bad, bad_in_row: steps skipped for a loss or gradient that was not finite.
      best: lowest validation loss so far, nats per token.
      seconds, timed: spent training, compilation left out, and on how many steps.
      passes: of the fixed point solver, the mean over the layers, summed over the epoch so far.
    """

    params: Any
    optimizer: Any
    carry: Any
    step: "Array"
    epoch: "Array"
    loss: "Array"
    tokens: "Array"
    bad: "Array"
    bad_in_row: "Array"
    best: "Array"
    seconds: "Array"
    timed: "Array"
    passes: "Array"


def build_model(config: Config, vocabulary: int) -> "LanguageModel":
    """The model that a configuration describes."""
    import jax
    import jax.numpy as jnp

    from harness.ablation import constraint
    from ranjax.lm import LanguageModel

    if config.ablation is not None and config.cell != "ran":
        raise UserError(f"--ablation is an option of --cell ran; got --cell {config.cell}.")
    names = "cell features layers embedding projection gates activation solver dropout tie init_scale"
    try:
        model = LanguageModel(vocabulary, **{name: getattr(config, name) for name in names.split()})
        init = partial(model.init, deterministic=True)
        jax.eval_shape(
            constraint(config.ablation), jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        )
    except ValueError as error:
        raise UserError(_with_flags(str(error), [*names.split(), "ablation"])) from None
    return model


def _with_flags(message: str, names: Sequence[str]) -> str:
    """A message of the model's in the words of the program: `tie` as --tie, cell='ran' as --cell ran."""
    for name in names:
        message = re.sub(rf"\b{name}='?([\w-]+)'?", rf"{flag(name)} \1", message.replace(f"`{name}`", flag(name)))
    return message


def learning_rate(config: Config, per_epoch: int) -> Callable[[Any], Any]:
    """The learning rate at a step, for an epoch of so many steps."""
    import jax.numpy as jnp
    import optax

    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        total = config.epochs * per_epoch
        warmup = min(config.warmup, total // 2)
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total, peak / 100)
    return lambda step: peak * config.decay ** jnp.maximum(step // per_epoch + 1 - config.decay_after, 0)


def make_optimizer(config: Config, per_epoch: int) -> "optax.GradientTransformation":
    """Global-norm clipping, then the update rule at the scheduled rate."""
    import optax

    rate = learning_rate(config, per_epoch)
    rule = optax.sgd(rate) if config.optimizer == "sgd" else optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def initial_state(model: "LanguageModel", optimizer: "optax.GradientTransformation", config: Config) -> TrainState:
    """The state before the first step."""
    import jax
    import jax.numpy as jnp

    from harness.ablation import constraint
    from ranjax.lm import zero_state

    tokens = jnp.zeros((config.batch_size, config.steps), jnp.int32)
    params = model.init(jax.random.key(config.seed), tokens, deterministic=True)["params"]
    params = constraint(config.ablation)(params)
    carry = zero_state(model, params, config.batch_size)
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    state = TrainState(
        params=params, optimizer=optimizer.init(params), carry=carry, step=count, epoch=count, loss=zero,
        tokens=count, bad=count, bad_in_row=count, best=jnp.array(jnp.inf), seconds=zero, timed=count, passes=zero,
    )  # fmt: skip
    return jax.tree.map(jnp.copy, state)  # donated buffers must be distinct


def make_step(
    model: "LanguageModel",
    optimizer: "optax.GradientTransformation",
    config: Config,
    windows: int,
    seeds: Sequence[int] = (),
) -> Callable[[TrainState, "Array"], TrainState]:
    """One update on the window that the state points at: `step(state, text) -> state`, jitted, state donated.

    `text` is `(batch, length)`. A loss or a gradient that is not finite leaves parameters, optimiser (and with it the
    step by which the learning rate is scheduled) and carry as they were, and is counted. Of several `seeds` the
    states are stacked, each with its own dropout.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from harness.ablation import constraint

    constrain = constraint(config.ablation)
    differentiate = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def step(state, text, dropout):
        position = state.step % windows
        window = jax.lax.dynamic_slice_in_dim(text, position * config.steps, config.steps + 1, axis=1)
        carry = jax.tree.map(lambda c: jnp.where(position == 0, 0, c), state.carry)
        key = jax.random.fold_in(dropout, state.step)
        (loss, (new_carry, made)), gradient = differentiate(state.params, carry, window, key)
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
            tokens=jnp.where(fresh, 0, state.tokens) + good * config.batch_size * config.steps,
            bad=state.bad + ~good,
            bad_in_row=jnp.where(good, 0, state.bad_in_row + 1),
            passes=jnp.where(fresh, 0, state.passes) + made,
        )

    if len(seeds) < 2:
        return jax.jit(partial(step, dropout=jax.random.key(config.seed + 1)), donate_argnums=0)
    keys = jnp.stack([jax.random.key(seed + 1) for seed in seeds])
    return jax.jit(lambda state, text: jax.vmap(step, (0, None, 0))(state, text, keys), donate_argnums=0)


def make_loss(model: "LanguageModel", config: Config) -> Callable:
    """`loss(params, carry, window, key) -> (loss, (carry, passes))`: summed over time, averaged over the batch."""
    import jax.numpy as jnp

    from harness.ablation import constraint
    from ranjax.lm import cross_entropy

    constrain = constraint(config.ablation)

    def loss(params, carry, window, key):
        (logits, carry), sown = model.apply(
            {"params": constrain(params)}, window[:, :-1], carry, deterministic=config.dropout == 0,
            rngs={"dropout": key}, mutable="solver",
        )  # fmt: skip
        nats = cross_entropy(logits, window[:, 1:])
        return jnp.mean(jnp.sum(nats, axis=1)), (carry, passes(sown))

    return loss


def passes(sown: Any) -> "Array | float":
    """Of the fixed point solver in a forward pass, the mean over the layers; 0 where nothing was iterated."""
    import jax.numpy as jnp

    records = [layer["record"] for layer in sown.get("solver", {}).values()]
    return jnp.mean(jnp.stack([record.iterations for record in records])) if records else 0.0
