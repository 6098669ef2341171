"""Update rules: what optax has, by the names of the settings."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon, schedule_free_adamw, schedule_free_eval_params

from ranjax.training.config import Config

LIKE_ADAMW = 0.2  # the root mean square of an update of muon's, with which adamw's learning rates fit it
LAYERS = "stack_"  # begins the names of what muon is for


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
    rate, decay = learning_rate(config, per_epoch), config.weight_decay
    match config.optimizer:
        case "sgd":
            rule = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate)) if decay else optax.sgd(rate)
        case "adamw":
            rule = optax.adamw(rate, weight_decay=decay)
        case "muon":
            options = {"consistent_rms": LIKE_ADAMW, "muon_weight_dimension_numbers": matrices}
            rule = muon(rate, weight_decay=decay, adam_weight_decay=decay, **options)
        case _:
            rule = schedule_free_adamw(config.learning_rate, config.warmup or None, weight_decay=decay)
    chain = optax.chain(optax.clip_by_global_norm(config.clip), rule)
    return optax.GradientTransformation(chain.init, _promoting(chain.update))


def matrices(params: Any) -> Any:
    """Of each leaf the axes of a matrix that muon updates, or None: those of layers, each gate by itself."""

    def of(path, leaf):
        if not str(getattr(path[0], "key", "")).startswith(LAYERS) or path[-1].key in ("bias", "scale", "conv"):
            return None
        return (
            MuonDimensionNumbers(0, 2)
            if leaf.ndim == 3
            else MuonDimensionNumbers()
            if path[-1].key == "kernel"
            else None
        )

    return jax.tree_util.tree_map_with_path(of, params)


def evaluated(config: Config) -> Callable[[Any], Any]:
    """A function of the training state: the parameters that are evaluated, and saved as the best."""
    if config.optimizer == "schedule_free":
        return jax.jit(lambda state: schedule_free_eval_params(state.optimizer[1], state.params))
    if config.average == "never":
        return lambda state: state.params
    return jax.jit(
        lambda state: jax.tree.map(lambda a, p: jnp.where(state.averaged > 0, a, p), state.average, state.params)
    )
