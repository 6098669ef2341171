"""Trees of arrays as files: one `.npy` for each leaf, named after its place in the tree."""

import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def save_arrays(folder: Path, tree: Any) -> dict[str, str]:
    """Writes a tree of arrays to a folder, and returns the SHA-256 of each file by its name.

    Raises:
      OSError: where the system refuses it, as on a disk that is full.
    """
    sums = {}
    for name, leaf in _named(tree):
        with (folder / name).open("xb") as file:
            hashed = _Hashed(file)
            np.save(hashed, np.asarray(leaf), allow_pickle=False)
            sums[name] = hashed.digest.hexdigest()
    return sums


def load_arrays(folder: Path, like: Any) -> Any:
    """The tree that `save_arrays` wrote.

    Args:
      folder: that it was given.
      like: a tree of arrays or of `jax.ShapeDtypeStruct`, as it was saved.

    Raises:
      OSError, ValueError: for a file that is missing or cannot be read.
    """
    leaves = [_read(folder / name, leaf.dtype) for name, leaf in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def saved_shapes(folder: Path) -> list[tuple[int, ...]]:
    """The shapes of the arrays in a folder."""
    return [np.load(path, mmap_mode="r", allow_pickle=False).shape for path in folder.glob("*.npy")]


class _Hashed:
    """A file that is written, and the checksum of what was."""

    def __init__(self, file: Any):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves with the names of their files, which a number makes unique."""
    named = []
    for n, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        place = re.sub(r"[^\w.-]", "_", jax.tree_util.keystr(path, simple=True, separator="."), flags=re.ASCII)
        named.append((f"{n:03}-{place:.200}.npy", leaf))
    return named


def _read(path: Path, dtype: Any) -> jax.Array:
    array = np.load(path, allow_pickle=False)
    if array.dtype.kind == "V":  # a type that NumPy does not know by name, such as bfloat16
        array = array.view(dtype)
    return jnp.array(array, jax.dtypes.canonicalize_dtype(dtype))
