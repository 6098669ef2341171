"""Linear recurrences, solved sequentially or in parallel over time.

Every solver computes h_t = a_t * h_{t-1} + b_t. All solvers share one derivative rule: the derivative of a linear
recurrence is a linear recurrence, so no solver is differentiated itself. Axes are `(*batch, time, features)`.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Inexact

from ranjax.errors import check_choice
from ranjax.kernels.base import Recurrence, Rows, Solver, Step, mapped
from ranjax.kernels.partition import partitioned
from ranjax.kernels.reference import LONG, associative, chunked, sequential
from ranjax.sharding import alike, at_boundary, automatic, before, check_spread, varying_as, varying_axes

Sequence = Inexact[Array, "*batch time features"]
State = Inexact[Array, "*batch features"]


def linear_recurrence(
    decay: ArrayLike,
    inputs: ArrayLike,
    initial: ArrayLike | None = None,
    *,
    reverse: bool = False,
    solver: str = "auto",
    axis_name: str | None = None,
) -> Array:
    r"""Solves a first-order linear recurrence over the axis of time, feature by feature.

    .. math::
        h_t = \text{decay}_t \, h_{t-1} + \text{inputs}_t, \qquad h_{-1} = \text{initial}

    With `reverse=True` the recurrence is h_t = decay_t * h_{t+1} + inputs_t, and `initial` is the state after the last
    step.

    Reverse mode, forward mode and `vmap` work with every solver, in all three arrays. The cotangent is one more
    recurrence, run in the other direction.

    Solvers agree as long as the states and the products of decays are finite. Otherwise the parallel solvers may lose
    or introduce NaN and infinity: `"associative"` does so wherever a product of decays overflows.

    With decays of 1 and inputs of one sign, rounding errors add up. They grow like

    | solver | relative error | float32, 500,000 steps |
    | --- | --- | --- |
    | `"sequential"`, below 4096 steps | eps * time | |
    | `"sequential"`, from 4096 steps on | eps: sums are compensated | 1e-8 |
    | `"chunked"` | eps * (64 + time / 64), at most eps * (64 + 4096) | 4e-7 |
    | `"associative"` | eps * log(time) | 1e-8 |
    | `"pallas"` | eps * time, or less where time is split | not measured |

    Decays below 1 forget earlier errors: time is then the number of steps that a state remembers. Steps that are not
    linear (diagonal gates) are not compensated.

    Inside `jax.shard_map` the sequence may be spread over the devices of a mesh axis, with the same number of steps on
    each. With `axis_name` every device solves its part; devices exchange two states each, the product of the decays and
    the last state from zero.

    Args:
      decay: floating or complex array `(*batch, time, features)`.
      inputs: floating or complex array of the same shape.
      initial: floating or complex array `(*batch, features)`; None is the same as zeros.
      reverse: run from the last step to the first.
      solver: how the states are computed.

        - `"auto"`, the default, selects one of the others by platform when the program is lowered. On a CPU it is
          `"sequential"`, or `"chunked"` from 4096 steps on where batch * features is below 1000. It selects the kernel
          only if a supported GPU was present at tracing, and `"sequential"` where time is symbolic
          (`jax.export`).
        - `"sequential"`: a loop over the steps.
        - `"associative"`: `jax.lax.associative_scan`.
        - `"chunked"`: all chunks of 64 steps in parallel, with a loop over the chunks between two loops over their
          steps. Memory grows linearly with the length.
        - `"pallas"`: a kernel for GPU or TPU; elsewhere it is interpreted, which is slow. Arrays that are sharded
          along batch or features are not gathered: each device runs its own. It is written in Pallas with Triton,
          which JAX 0.12 deprecates; where JAX comes without it, `"auto"` does not select the kernel.
      axis_name: name of the mesh axis that time is spread over. `decay`, `inputs` and the states are then one device's
        part; `initial` is the same on all devices and precedes the first step of the whole sequence. Inside `shard_map`
        the kernel needs `check_vma=False`; otherwise `"auto"` does not select it.

    Returns:
      The states h, `(*batch, time, features)`, in float32, or in float64 where one of the arrays is; complex where one
      of the arrays is.

    Raises:
      ValueError: for an unknown solver, `"pallas"` where JAX comes without Triton, shapes that do not fit, or arrays
        that `axis_name` does not spread.
      TypeError: for an array that is not of a floating or complex dtype; for complex arrays with `"pallas"`.

    Example:
      >>> import jax.numpy as jnp, ranjax
      >>> decay = jnp.full((4, 1), 0.5)
      >>> ranjax.linear_recurrence(decay, jnp.ones((4, 1))).ravel().tolist()
      [1.0, 1.5, 1.75, 1.875]

    References:
      Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018.
    """
    check_choice("solver", solver, SOLVERS)
    decay, inputs, initial = _as_states(decay, inputs, initial)
    if solver == "pallas" and jnp.iscomplexobj(inputs):
        raise TypeError(f"`solver`='pallas' is for real arrays; got {inputs.dtype}. Use solver='auto'.")
    check_spread("`decay` or `inputs`", (decay, inputs), axis_name)
    if inputs.size == 0:
        return inputs

    def solve(*arrays):
        return _compiled(*arrays, solver, reverse, axis_name)

    return automatic(solve, decay, inputs, initial, like=inputs)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _recurrence(
    decay: Sequence, inputs: Sequence, initial: State, solver: str, reverse: bool, axis_name: str | None
) -> Sequence:
    return _run_recurrence(_linear_step, decay, inputs, initial, solver, reverse, axis_name)


@_recurrence.defjvp
def _recurrence_jvp(solver, reverse, axis_name, primals, tangents):
    """dh_t = a_t dh_{t-1} + (da_t h_{t-1} + db_t), from dh_{-1} = dinitial: the same recurrence."""
    (decay, _, initial), (d_decay, d_inputs, d_initial) = primals, tangents
    states = _recurrence(*primals, solver, reverse, axis_name)
    first = -1 if reverse else 0
    source = d_inputs + d_decay * before(states, initial, -2, reverse, axis_name)
    source = source.at[..., first, :].add(decay[..., first, :] * at_boundary(d_initial, reverse, axis_name))
    return states, _linear_solve(decay, source, solver, reverse, axis_name)


# Without this `jit` a call outside of `jit` would compile its loop every time. Static arguments are given by number:
# `jax_enable_checks` refuses arguments by name around a `custom_jvp`.
_compiled = jax.jit(_recurrence, static_argnums=(3, 4, 5))


def _linear_solve(decay: Sequence, source: Sequence, solver: str, reverse: bool, axis_name: str | None) -> Sequence:
    """The recurrence from a zero state, as a linear system that JAX can transpose.

    The transpose of h_t - a_t h_{t-1} = b_t is g_t - a_{t+1} g_{t+1} = d_t: a recurrence in the other direction.
    """
    zero = jnp.zeros_like(source[..., 0, :])

    def solve(_, b):
        return _run_recurrence(_linear_step, decay, b, zero, solver, reverse, axis_name)

    def transpose_solve(_, d):
        return _run_recurrence(_transposed_step, decay, d, zero, solver, not reverse, axis_name)

    def matvec(h):
        return h - decay * before(h, zero, -2, reverse, axis_name)

    return lax.custom_linear_solve(matvec, source, solve, transpose_solve)


def _run_recurrence(
    step: Step, decay: Sequence, inputs: Sequence, initial: State, solver: str, reverse: bool, axis_name: str | None
) -> Sequence:
    """The states of the recurrence with this step."""
    time, features = inputs.shape[-2:]
    decay, inputs, initial = alike(decay, inputs, initial)
    arrays, carry = tuple(a.reshape(-1, time, features) for a in (decay, inputs)), initial.reshape(-1, features)
    recurrence = Recurrence(step, (carry,), arrays, ((1, inputs.dtype),), reverse=reverse)
    recurrence = recurrence._replace(affine=True, in_place=step is _linear_step)
    if axis_name is not None:
        zero, carry_only = jnp.zeros_like(carry), _without_outputs(step)
        (last,), _ = SOLVERS[solver](recurrence._replace(step=carry_only, carry=(zero,), outs=(), in_place=False))
        carry = _carry_in(jnp.prod(arrays[0], axis=1), last, carry, reverse, axis_name)
        recurrence = recurrence._replace(carry=(carry,))
    _, (states,) = SOLVERS[solver](recurrence)
    return states.reshape(inputs.shape)


def _carry_in(product: Array, last: Array, initial: Array, reverse: bool, axis_name: str) -> Array:
    """The carry that a device's part of an affine recurrence starts from.

    Args:
      product: the product of the slopes over this device's steps.
      last: the carry after this device's steps, started from 0.
      initial: the carry that the whole sequence starts from.
      reverse: whether the recurrence runs from the last step to the first.
      axis_name: the mesh axis that time is spread over.
    """
    products, lasts = lax.all_gather((product, last), axis_name)

    def fold(carry, part):
        slope, offset = part
        return jnp.where(carry == 0, offset, mapped(offset, slope, carry)), carry  # an infinite slope times 0 is NaN

    _, starts = lax.scan(fold, varying_as(initial, (lasts,)), (products, lasts), reverse=reverse)
    return lax.dynamic_index_in_dim(starts, lax.axis_index(axis_name), keepdims=False)


def _linear_step(carry: Rows, _: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """h_t = a_t h_{t-1} + b_t."""
    (h,), (a, b) = carry, rows
    h = a * h + b
    return (h,), (h,)


def _transposed_step(carry: Rows, _: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """g_t = a_{t+1} g_{t+1} + d_t, run in the other direction; the carry is a_{t+1} g_{t+1}."""
    (ag,), (a, d) = carry, rows
    g = ag + d
    return (a * g,), (g,)


def _without_outputs(step: Step) -> Step:
    """The step of a recurrence of which only the last carry is used."""
    return lambda carry, constants, rows: (step(carry, constants, rows)[0], ())


def _auto(recurrence: Recurrence) -> tuple[Rows, Rows]:
    """The solver that `AUTO_BY_PLATFORM` has for the platform."""
    varies = any(map(varying_axes, recurrence.arrays))  # the results of a kernel cannot be typed as varying
    kernel = _has_gpu() and not varies and not jnp.iscomplexobj(recurrence.carry[0])
    batch, time, features = recurrence.sizes
    known = isinstance(time, int)  # with a symbolic time (`jax.export`) only the loop works
    found = AUTO_BY_PLATFORM if known else dict.fromkeys(AUTO_BY_PLATFORM, "sequential")
    if known and recurrence.affine and time >= LONG and isinstance(batch, int) and batch * features < SMALL:
        found = found | {"cpu": "chunked"}
    return _by_platform(recurrence, {name: SOLVERS[one] for name, one in found.items() if one != "pallas" or kernel})


def _has_gpu() -> bool:
    """Whether a GPU is present that the kernel compiles for (Ampere or newer); otherwise it need not be traced."""
    if jax.default_backend() != "gpu" or not _has_triton():
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # AMD GPUs have a name instead
    return capability.replace(".", "").isdecimal() and float(capability) >= 8


def _has_triton() -> bool:
    """Whether this JAX has what the GPU kernel is written in, which 0.12 deprecates."""
    return find_spec("jax.experimental.pallas.triton") is not None


def _pallas(recurrence: Recurrence) -> tuple[Rows, Rows]:
    """The kernel of the platform; on others the GPU kernel, interpreted."""
    if not _has_triton():
        raise ValueError(
            f"solver='pallas' needs `jax.experimental.pallas.triton`, which JAX {jax.__version__} does not have. Use "
            "solver='auto'."
        )
    from ranjax.kernels import gpu, tpu  # importing Pallas takes a second, and few programs need it

    runs = {"tpu": tpu.run, "cuda": gpu.run, "default": partial(gpu.run, interpret=True)}
    return _by_platform(recurrence, {platform: partitioned(run) for platform, run in runs.items()})


def _by_platform(recurrence: Recurrence, solvers: dict[str, Solver]) -> tuple[Rows, Rows]:
    """The solver is selected when the program is lowered, so one traced program serves every platform."""

    def on(solver):
        def solve(carry, arrays, constants, ahead):
            return solver(recurrence._replace(carry=carry, arrays=arrays, constants=constants, ahead=ahead))

        return solve

    branches = {platform: on(solver) for platform, solver in solvers.items()}
    return lax.platform_dependent(
        recurrence.carry, recurrence.arrays, recurrence.constants, recurrence.ahead, **branches
    )


SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "sequential": sequential,
    "associative": associative,
    "chunked": chunked,
    "pallas": _pallas,
}


# What `"auto"` selects by platform, with milliseconds of a gradient from benchmarks/results/. On the CPU chunked is
# faster by a tenth at 4 x 16,384 x 64. A kernel is a default only if it has run on its device: the GPU kernel was timed
# as of e6eaacf and has passed its tests on the device since it was rearranged. Its tiling by shape (kernels/gpu.py) was
# chosen on the same H100 on the same day. Gates that read all of h_{t-1} run sequentially everywhere: 213 against 748
# ms on that CPU at 2 x 8192 x 200; this has not been measured on a GPU.
AUTO_BY_PLATFORM = {
    "cpu": "sequential",  # AMD EPYC, 2 cores, 2026-11-23, 8 x 1024 x 512: 14.1; chunked 18.2, associative 48.6
    "cuda": "pallas",  # H100, 2026-11-23, 32 x 1024 x 512: 0.255; associative 0.798
    "tpu": "sequential",  # not measured; associative_scan is slower there, De et al. 2024 (Griffin)
    "default": "associative",  # not measured: log2(T) sweeps instead of T loop iterations
}


# The sequential loop compensates long sums. Where rows are small, that takes longer than chunks do. Milliseconds of a
# gradient, compensated, chunked, and not compensated: 6.1, 3.2, 1.3 at 1 x 16,384 x 16; 41.0, 36.8, 35.3 at 4 x 16,384
# x 64; 134, 118, 113 at 8 x 8192 x 256; 65, 68, 54 at 2 x 8192 x 512 (AMD EPYC, 2 cores, 2026-11-30).
SMALL = 1000  # batch * features


# On a GPU a loop iteration has a fixed cost: with 8 steps per iteration a training step takes 2.0 ms instead of 3.2 at
# 2 x 650 (H100, 2026-11-27, benchmarks/README.md). On a CPU unrolling has no effect.
UNROLL = 8


def unroll() -> int:
    """The number of steps per loop iteration, for loops with matrix products."""
    return UNROLL if jax.default_backend() == "gpu" else 1


def _as_states(decay: ArrayLike, inputs: ArrayLike, initial: ArrayLike | None) -> tuple[Array, Array, Array]:
    """The three arrays in the dtype of the states, their shapes checked."""
    decay, inputs = numbers("decay", decay), numbers("inputs", inputs)
    if inputs.ndim < 2:
        raise ValueError(
            f"`inputs` must have the axes (*batch, time, features); got the shape {inputs.shape}. "
            "Add the missing axis, for one feature with `inputs[:, None]`."
        )
    if decay.shape != inputs.shape:
        raise ValueError(
            f"`decay` must have the shape of `inputs`, {inputs.shape}; got {decay.shape}. "
            "Broadcast it with `jnp.broadcast_to(decay, inputs.shape)`."
        )
    expected = (*inputs.shape[:-2], inputs.shape[-1])
    initial = jnp.zeros(expected, inputs.dtype) if initial is None else numbers("initial", initial)
    if initial.shape != expected:
        raise ValueError(
            f"`initial` must be one state per sequence, (*batch, features) = {expected}; got {initial.shape}. "
            "Broadcast it with `jnp.broadcast_to`, or pass None for zeros."
        )
    dtype = state_dtype(decay, inputs, initial)
    return decay.astype(dtype), inputs.astype(dtype), initial.astype(dtype)


def numbers(name: str, value: ArrayLike, kind: Any = jnp.inexact) -> Array:
    """`value` as an array, after a check that its dtype is floating or, unless `kind` is `jnp.floating`, complex."""
    try:
        array = jnp.asarray(value)
    except TypeError:  # of JAX, which does not know the argument's name
        raise TypeError(f"`{name}` must be an array; got {value!r:.40}.") from None
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(
            f"`{name}` must be an array of a floating{' or complex' * (kind is jnp.inexact)} dtype; got {array.dtype}. "
            f"Convert it with `{name}.astype(jnp.float32)`."
        )
    return array


def state_dtype(*arrays: Any) -> Any:
    """The dtype of a state that reads these arrays or dtypes: float32, wider or complex where one of them is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *arrays)
