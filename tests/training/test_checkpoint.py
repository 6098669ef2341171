"""Checkpoints of trees of arrays."""

import gc
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import files_of_at_most

from ranjax.errors import UserError
from ranjax.training import checkpoint
from ranjax.training.checkpoint import Checkpoints, Saver

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.arange(4)}}


@pytest.mark.parametrize("like", [TREE, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), TREE)])
def test_a_saved_tree_is_loaded_bitwise(like, tmp_path):
    Checkpoints(tmp_path).save("best", 1, TREE)
    loaded = Checkpoints(tmp_path).load("best", like)
    jax.tree.map(np.testing.assert_array_equal, loaded, TREE)
    assert [leaf.dtype for leaf in jax.tree.leaves(loaded)] == [leaf.dtype for leaf in jax.tree.leaves(TREE)]


def test_types_and_shapes_of_all_kinds_come_back(tmp_path):
    tree = {
        "b": jnp.arange(5, dtype=jnp.bfloat16),
        "s": jnp.float32(0.1),
        "e": jnp.zeros((0, 3)),
        "a/b \0": (jnp.uint32(7),),
    }
    Checkpoints(tmp_path).save("best", 1, tree)
    loaded = Checkpoints(tmp_path).load("best", tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert jax.tree.map(lambda a: a.dtype, loaded) == jax.tree.map(lambda a: a.dtype, tree)


def test_what_is_saved_is_named_and_read_by_numpy(tmp_path):
    Checkpoints(tmp_path).save("best", 1, TREE)
    folder = tmp_path / "checkpoints" / "best" / "1"
    np.testing.assert_array_equal(np.load(folder / "001-b.c.npy"), TREE["b"]["c"])


def test_saving_keeps_nothing_in_memory(tmp_path):
    run = Checkpoints(tmp_path)

    def objects(number):
        run.save("latest", number, TREE)
        gc.collect()
        return len(gc.get_objects())

    before = [objects(number) for number in range(2)][-1]
    assert [objects(number) for number in range(2, 9)][-1] - before < 5


def numbers_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_states_and_the_best_are_kept(tmp_path):
    """And nothing of one whose saving was killed."""
    run = Checkpoints(tmp_path)
    for n in range(4):
        run.save("latest", n, {"a": np.full(3, n)})
        run.save("best", n, {"a": np.full(3, n)})
        (tmp_path / "checkpoints" / "latest" / f".{7 + n}").mkdir(parents=True)
    run.save("latest", 4, {"a": np.full(3, 4)})
    assert numbers_of(run.directory / "latest") == ["3", "4"]
    assert numbers_of(run.directory / "best") == ["3"]


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


@pytest.mark.parametrize("name", ["x[a]", "y[!b]z", "a**b", "q?r", "caf\udce9", "{a}\n", "\u4e16 %s"])
def test_a_directory_may_have_any_name(name, tmp_path):
    (tmp_path / name).mkdir()
    Checkpoints(tmp_path / name).save("best", 1, TREE)
    loaded = Checkpoints(tmp_path / name).load("best", TREE)
    jax.tree.map(np.testing.assert_array_equal, loaded, TREE)
    assert numbers_of(tmp_path / name / "checkpoints" / "best") == ["1"]


def test_arrays_that_the_system_refuses_are_an_oserror_and_leave_nothing(tmp_path):
    numbers, before = {"a": np.random.default_rng(0).normal(size=100_000)}, threading.active_count()
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        Checkpoints(tmp_path).save("latest", 0, numbers)
    assert numbers_of(tmp_path / "checkpoints" / "latest") == []
    assert threading.active_count() == before


def files(folder):
    """Those of the newest checkpoint."""
    newest = max(folder.iterdir(), key=lambda path: int(path.name))
    return sorted(path for path in newest.rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_named(tmp_path):
    run, rng = Checkpoints(tmp_path), np.random.default_rng(0)
    run.save("best", 1, TREE)
    for file in files(run.directory / "best"):
        content = bytearray(file.read_bytes())
        for at in rng.integers(len(content), size=3) if content else ():
            content[at] ^= (flip := 1 << rng.integers(8))
            file.write_bytes(content)
            with pytest.raises(UserError, match=r"best/1 is damaged: .*(not as it was saved|read)\. Restore it"):
                run.load("best", TREE)
            content[at] ^= flip
        file.write_bytes(content)
    jax.tree.map(np.testing.assert_array_equal, run.load("best", TREE), TREE)


@pytest.mark.parametrize("name", ["sha256.json", "000-a.npy", ""])
def test_a_damaged_newest_state_gives_way_to_the_one_before(name, tmp_path, capsys):
    """And is not counted among those that are kept."""
    run = Checkpoints(tmp_path)
    for n in (1, 2):
        run.save("latest", n, {"a": np.full(3, n)})
    path = run.directory / "latest" / "2" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run.directory / "latest" / "2").mkdir(exist_ok=True)
    run = Checkpoints(tmp_path)
    np.testing.assert_array_equal(run.load("latest", {"a": np.zeros(3, int)})["a"], 1)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {run.directory}/latest/2 is damaged: ")
    assert said.endswith(f"The one before it is used: {run.directory}/latest/1\n")
    run.save("latest", 3, {"a": np.full(3, 3)})
    assert numbers_of(run.directory / "latest") == ["1", "3"]


def test_a_damaged_state_is_saved_again_once_training_comes_there(tmp_path):
    run = Checkpoints(tmp_path)
    for n in (1, 2):
        run.save("latest", n, {"a": np.full(3, n)})
    (run.directory / "latest" / "2" / "sha256.json").unlink()
    run.load("latest", {"a": np.zeros(3, int)})
    run.save("latest", 2, {"a": np.full(3, 2)})
    assert numbers_of(run.directory / "latest") == ["1", "2"]
    np.testing.assert_array_equal(Checkpoints(tmp_path).load("latest", {"a": np.zeros(3, int)})["a"], 2)


def test_a_state_that_may_not_be_read_is_not_called_damaged(tmp_path):
    """Root may read all; a link that leads to itself is refused to anyone."""
    run = Checkpoints(tmp_path)
    for n in (1, 2):
        run.save("latest", n, {"a": np.full(3, n)})
    for name in ("sha256.json", "000-a.npy"):
        file = run.directory / "latest" / "2" / name
        kept = file.rename(tmp_path / "kept")
        file.symlink_to(file)
        with pytest.raises(UserError, match=f"2/{name} cannot be read: Too many levels of symbolic links"):
            run.load("latest", {"a": np.zeros(3, int)})
        kept.replace(file)


def test_nothing_is_saved_where_a_run_was_before(tmp_path):
    (tmp_path / "run").mkdir()
    run = Checkpoints(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="run is no longer the directory of this run: it was moved or removed"):
        run.save("latest", 1, TREE)
    assert numbers_of(tmp_path) == ["moved"]
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no longer the directory of this run"):
        run.save("latest", 1, TREE)
    assert numbers_of(tmp_path / "run") == []


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


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Its arrays are those of the call, also where they are donated meanwhile; the next save waits for it."""
    written, go_on = [], threading.Event()
    write = checkpoint._write

    def slowly(path, tree):
        assert go_on.wait(20)
        write(path, tree)
        written.append(path.name)

    monkeypatch.setattr(checkpoint, "_write", slowly)
    advance = jax.jit(lambda a: a + 1, donate_argnums=0)
    with Saver(Checkpoints(tmp_path)) as saver:
        a = jnp.arange(5.0)
        saver.save("latest", 1, {"a": a})
        a = advance(a)
        assert not written
        threading.Timer(0.2, go_on.set).start()
        saver.save("best", 2, {"a": a})
        assert written == ["1"]
        saver.wait()
        assert written == ["1", "2"]
    loaded = Checkpoints(tmp_path).load("latest", {"a": a})
    np.testing.assert_array_equal(loaded["a"], np.arange(5.0))


def test_what_could_not_be_written_is_raised_by_the_next_call(tmp_path):
    with Saver(Checkpoints(tmp_path)) as saver:
        saver.save("latest", 1, TREE)
        saver.wait()
        with files_of_at_most(10):
            saver.save("latest", 2, TREE)
            with pytest.raises(UserError, match=r"cannot be written: File too large\. What was saved before is intact"):
                saver.wait()
        saver.wait()  # raised once
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(tmp_path).load("latest", TREE), TREE)


def test_all_is_written_at_the_end(tmp_path):
    with Saver(Checkpoints(tmp_path)) as saver:
        saver.save("best", 1, TREE)
    assert numbers_of(tmp_path / "checkpoints" / "best") == ["1"]


def test_a_run_that_is_moved_while_it_is_written_is_called_that(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def write(path, tree):
        (tmp_path / "run").rename(tmp_path / "moved")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(checkpoint, "_write", write)
    with Saver(Checkpoints(tmp_path / "run")) as saver:
        saver.save("latest", 1, TREE)
        with pytest.raises(UserError, match="run is no longer the directory of this run: it was moved or removed"):
            saver.wait()
