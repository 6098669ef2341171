# Installs ranjax where it is missing. A JAX that is there and new enough is kept as it is.
import importlib.util
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = "OWNER/ranjax"  # on GitHub
SHORT = os.environ.get("RANJAX_SHORT") == "1"  # small sizes, for the tests of this notebook
FLOORS = {"jax": (0, 7, 2), "jaxlib": (0, 7, 2), "flax": (0, 11, 2), "optax": (0, 2, 8), "numpy": (2, 1)}


def kept(name, floor):
    """The installed version of a package as a requirement, if it is new enough."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return []
    return [f"{name}=={found}"] if tuple(map(int, re.findall(r"\d+", found)[:3])) >= floor else []


if importlib.util.find_spec("ranjax") is None:
    checkout = Path("../pyproject.toml").exists()
    source = "..[train]" if checkout else f"ranjax[train] @ git+https://github.com/{REPOSITORY}"
    pins = [pin for name, floor in FLOORS.items() for pin in kept(name, floor)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source, *pins], check=True)
    importlib.invalidate_caches()

import jax

print(date.today(), "Python", platform.python_version(), *(f"{name} {version(name)}" for name in FLOORS))
print(jax.devices(), f"{os.cpu_count()} CPU cores")
