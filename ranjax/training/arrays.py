"""Trees of arrays as files: one `.npy` for each leaf, named after its place in the tree; or all in one safetensors."""

import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ranjax.errors import UserError, needing


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


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a dictionary of dictionaries, each named by its keys with dots between them."""
    return dict(flatten_dict(tree, sep="."))


def save_tensors(path: Path, tree: Any) -> None:
    """Writes a dictionary of dictionaries of arrays as one safetensors file, which no one has to trust to read it.

    Raises:
      OSError: where the system refuses it.
    """
    with needing("export"):
        from safetensors.numpy import save

    path.write_bytes(save({name: np.asarray(leaf) for name, leaf in sorted(by_name(tree).items())}))


def load_tensors(path: Path, like: Any) -> Any:
    """The tree that `save_tensors` wrote.

    Args:
      path: of the file.
      like: a tree of arrays or of `jax.ShapeDtypeStruct`, as it was saved.

    Raises:
      UserError: for a file that is missing or damaged, or has other arrays; no array is read then.
    """
    with needing("export"):
        from safetensors import SafetensorError, safe_open

    expected = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in by_name(like).items()}
    try:
        with safe_open(path, "numpy") as file:
            names = file.keys()
            found = {name: _described(file.get_slice(name)) for name in names}
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    want, got = (_in_words(of.get(name)) for of in (expected, found))
                    raise UserError(f"{path} does not fit its config.json: {name!a:.80} must be {want}; got {got}.")
            loaded = {name: jnp.asarray(file.get_tensor(name)) for name in expected}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {str(error).rstrip('.')}. Export it, or download it, again.") from None
    return unflatten_dict(loaded, sep=".")


def _described(part: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array in a safetensors file."""
    names = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
    return tuple(part.get_shape()), names.get(part.get_dtype(), str(part.get_dtype()))


def _in_words(described: tuple[tuple[int, ...], str] | None) -> str:
    return "left out" if described is None else f"{described[1]} of the shape {described[0]}"


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
