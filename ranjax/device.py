"""The device that computes: whether there is one, and its free memory."""

import os
import re
import subprocess
import sys
from typing import Any

from ranjax.errors import UserError


def check_device() -> None:
    """Raises a UserError where JAX finds no device, or XLA does not take its flags."""
    if "XLA_FLAGS" in os.environ and "jax" not in sys.modules:  # of a mistake in them XLA aborts the process
        code = "from jaxlib import xla_client; xla_client.make_cpu_client()"  # a third of a second
        trial = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        why = re.search(r"^[EF]\d{4} .*?\] (.*)$", trial.stderr, re.MULTILINE)
        if trial.returncode and why is not None:
            given = os.environ["XLA_FLAGS"]
            raise UserError(f"XLA_FLAGS={given} is refused: {why[1].rstrip('.')}. Correct or unset it.")
    import jax  # slow

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for a plugin that is not installed
        why = str(error).splitlines()[0].rstrip(".") if str(error) else "it is not installed"
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # as all of its settings are
        raise UserError(
            f"JAX has no device of the platforms it is to use, {asked or 'those it finds'} "
            f"(JAX_PLATFORMS): {why}. Name one that is there, such as JAX_PLATFORMS=cpu, or install its driver and "
            "plugin."
        ) from None


def free_memory(device: Any) -> int | None:
    """The free memory of a device in bytes, or None if it is not known.

    GPUs and TPUs report theirs. For a CPU it is the memory of the host that psutil (an optional package) reports as
    available.

    Args:
      device: a `jax.Device`.

    Returns:
      Bytes, or None.

    Example:
      >>> from types import SimpleNamespace
      >>> from ranjax.device import free_memory
      >>> free_memory(SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30}))
      70
    """
    if device.platform == "cpu":
        return _available_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"])


def _available_memory() -> int | None:
    """The memory of the host in bytes that programs can allocate without swapping; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available
