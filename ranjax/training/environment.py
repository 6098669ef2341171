"""What a run computes with, so that one that goes on elsewhere is bit for bit the same, or says that it is not."""

from pathlib import Path

import jax

from ranjax.cli import refusals, warn
from ranjax.errors import UserError
from ranjax.saved import read_sealed, write_sealed
from ranjax.training.report import device, versions

# Other values are other random numbers or other types: another training. The rest changes the rounding at most.
SETTINGS = "jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable"


def save_environment(directory: Path) -> None:
    """Writes what this process computes with beside the checkpoints."""
    write_sealed(directory / "environment.json", _environment())


def check_environment(directory: Path) -> None:
    """Compares this process with the one that trained the run before.

    Warns where the run goes on, though not bit for bit, and keeps what this process computes with.

    Raises:
      UserError: where it would be another training.
    """
    here = _environment()
    then = read_sealed(directory / "environment.json", dict.fromkeys(here, lambda value: isinstance(value, str)))
    changed = [name for name in here if here[name] != then[name]]
    for name in changed:
        if name in SETTINGS:
            raise UserError(
                f"the run in {directory} began with {name} = {then[name]}; here it is {here[name]}, which is another "
                f"training. Resume with {name.upper()}={then[name]}, or start a run of its own with another --out."
            )
    if changed:
        names = "; ".join(f"{name} {then[name]} -> {here[name]}" for name in changed)
        warn(f"the run goes on with what it did not begin with, so not bit for bit as it would have ({names}).")
        with refusals(directory / "environment.json"):
            save_environment(directory)


def _environment() -> dict[str, str]:
    settings = {name: str(getattr(jax.config, name)) for name in (*SETTINGS, "jax_default_matmul_precision")}
    return settings | {"device": device()} | {name: versions()[name] for name in ("jax", "flax", "optax")}
