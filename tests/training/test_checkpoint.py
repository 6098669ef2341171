"""Checkpoints of trees of arrays."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import files_of_at_most

from ranjax.errors import UserError
from ranjax.training import checkpoint
from ranjax.training.checkpoint import Checkpoints

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.arange(4)}}


@pytest.mark.parametrize("like", [TREE, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), TREE)])
def test_a_saved_tree_is_loaded_bitwise(like, tmp_path):
    Checkpoints(tmp_path).save("best", 1, TREE)
    loaded = Checkpoints(tmp_path).load("best", like)
    jax.tree.map(np.testing.assert_array_equal, loaded, TREE)
    assert [leaf.dtype for leaf in jax.tree.leaves(loaded)] == [leaf.dtype for leaf in jax.tree.leaves(TREE)]


def test_one_checkpoint_of_a_kind_is_kept(tmp_path):
    """And nothing of one whose saving was killed."""
    folder = tmp_path / "checkpoints" / "latest"
    for n in range(3):
        Checkpoints(tmp_path).save("latest", n, {"a": np.full(3, n)})
        (folder / f"{7 + n}.orbax-checkpoint-tmp" / "tree").mkdir(parents=True)
    Checkpoints(tmp_path).save("latest", 3, {"a": np.full(3, 3)})
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["3"]


def test_a_checkpoint_that_is_replaced_during_loading_is_loaded_from_the_newer_one(tmp_path, monkeypatch):
    """As by `evaluate` during the training of the run that it reads."""
    kept, check, newer = Checkpoints(tmp_path), checkpoint._check_shapes, iter((2, 3))
    kept.save("best", 1, {"a": np.full(3, 1)})

    def replaced(*arguments):
        check(*arguments)
        for n in newer:
            return kept.save("best", n, {"a": np.full(3, n)})

    monkeypatch.setattr(checkpoint, "_check_shapes", replaced)
    np.testing.assert_array_equal(kept.load("best", {"a": np.zeros(3, int)})["a"], 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a thread of orbax goes on
def test_arrays_that_the_system_refuses_are_an_oserror(tmp_path, caplog):
    numbers = {"a": np.random.default_rng(0).normal(size=100_000)}
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        Checkpoints(tmp_path).save("latest", 0, numbers)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logging.getLogger("absl").level < logging.CRITICAL


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("best/*/tree/_METADATA", None, "best is damaged: it holds no arrays"),
        ("best/*/tree/array_metadatas/process_0", b"garbage", "best is damaged: its arrays cannot be read"),
        ("best/*/tree", None, "best is damaged: its arrays cannot be read"),
    ],
)
def test_damaged_checkpoints_are_named(file, content, message, tmp_path):
    Checkpoints(tmp_path).save("best", 1, TREE)
    (path,) = (tmp_path / "checkpoints").glob(file)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).load("best", TREE)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    Checkpoints(tmp_path).save("best", 1, TREE)
    with pytest.raises(UserError, match=r"does not fit the configuration beside it: expected .*\(5,\).* got .*\(4,\)"):
        Checkpoints(tmp_path).load("best", TREE | {"b": {"c": np.zeros(5, np.int32)}})


def test_a_run_without_a_best_state_says_how_to_get_one(tmp_path):
    run = Checkpoints(tmp_path / "a run")
    message = r"no epoch of it has been validated\. Go on with: .*--out '.*/a run' --resume"
    with pytest.raises(UserError, match=message):
        run.load("best", TREE)
    assert not run.directory.exists()
    (run.directory / "best").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        run.load("best", TREE)
    with pytest.raises(UserError, match="has no latest checkpoint: it had one from its beginning"):
        run.load("latest", TREE)
