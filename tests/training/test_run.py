"""A whole run: what it writes, what it refuses, how its model and its text are loaded."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from small_runs import (
    TEXT,
    assert_same,
    command,
    files_of_at_most,
    metrics_rows,
    position,
    resumed,
    saved_state,
    settings,
    windows_of,
)

from ranjax.data import load_corpus
from ranjax.data.builtin import markov_entropy
from ranjax.data.files import SPLITS
from ranjax.errors import UserError
from ranjax.lm import LanguageModel
from ranjax.training import metrics
from ranjax.training import run as run_module
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import load_config, save_config
from ranjax.training.metrics import Evaluation, make_evaluator
from ranjax.training.model import load_run
from ranjax.training.report import Report
from ranjax.training.run import load_text, train


@pytest.mark.quick
def test_a_run_writes_all_its_files(pets_run):
    config, result = pets_run
    names = {"config.json", "vocabulary.json", "text.json", "metrics.jsonl", "result.json", "loss.png", "checkpoints"}
    names |= {"environment.json"}
    assert {path.name for path in config.directory.iterdir()} - {".lock"} == names
    assert json.loads((config.directory / "result.json").read_text()) == json.loads(json.dumps(result))
    assert load_config(config.directory) == config
    ended = [row for row in metrics_rows(config) if "valid_perplexity" in row]
    valid = [row["valid_perplexity"] for row in ended]
    assert len(valid) == 3
    assert result["valid_perplexities"] == valid
    assert result["train_perplexities"] == [row["train_perplexity"] for row in ended]
    assert result["valid_perplexity"] == min(valid)
    assert result["test_perplexity"] < 8  # of 15 characters
    assert (config.directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert position(config) == (3 * windows_of(config), 3)  # the last validation is not repeated on resumption


@pytest.mark.quick
def test_the_result_of_a_run_says_what_was_trained_where(pets_run, pets_text):
    config, result = pets_run
    promised = {"dataset", "source", "test_nats", "test_bits", "tokens_per_second", "training_seconds", "skipped_steps"}
    assert promised | {"device", "date", "versions"} <= set(result)
    assert result["test_tokens"] == len(load_corpus(pets_text).test) - 1
    assert result["parameters"] == sum(p.size for p in jax.tree.leaves(load_run(config.directory).params))
    assert result["config"] == dataclasses.asdict(load_config(config.directory))


def test_markov_is_learnt_to_its_entropy(tmp_path):
    result = train(
        settings(
            "markov",
            tmp_path / "run",
            features=(64,),
            epochs=1,
            dropout=0.0,
            learning_rate=0.01,
            batch_size=40,
            steps=35,
        )
    )
    assert markov_entropy() * 0.98 < result["test_nats"] < markov_entropy() * 1.02


def test_the_learning_rate_decays_after_an_epoch_of_the_text(pets, tmp_path):
    """To nothing here, so that the second epoch changes nothing."""
    ends = []
    options = {"optimizer": "sgd", "schedule": "decay", "decay": 1e-30, "decay_after": 1, "batch_size": 40}
    for epochs in (1, 2):
        config = dataclasses.replace(pets, out=str(tmp_path / str(epochs)), epochs=epochs, **options)
        train(config)
        ends.append(saved_state(config).params)
    assert_same(*ends)


def bounded(params):
    return jax.tree.map(lambda p: jnp.clip(p, -0.05, 0.05), params)


def test_a_constrained_run_saves_constrained_params_and_resumes_bitwise(pets_text, tmp_path):
    whole, parts = (settings(pets_text, tmp_path / name, batch_size=40) for name in ("whole", "parts"))
    train(whole, constrain=bounded)
    train(dataclasses.replace(parts, epochs=1), constrain=bounded)
    train(resumed(parts), constrain=bounded)
    assert_same(saved_state(parts), saved_state(whole))
    for params in (saved_state(whole).params, load_run(whole.directory).params):
        assert max(float(jnp.abs(p).max()) for p in jax.tree.leaves(params)) == pytest.approx(0.05)


def test_a_run_of_several_streams_is_evaluated_with_as_many(pets_text, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "WINDOW", 16)
    config = settings(pets_text, tmp_path / "run", epochs=1, streams=3)
    nats = train(config)["test_nats"]
    run, ids = load_run(config.directory), load_corpus(pets_text).test
    assert nats == make_evaluator(run.model, 3)(run.params, ids).nats
    assert nats != make_evaluator(run.model)(run.params, ids).nats


def test_the_state_that_validates_best_is_kept_and_tested(tmp_path, monkeypatch):
    """The second of three epochs, where a run resumes after it."""
    (tmp_path / "text.txt").write_text(TEXT * 61)  # of 60, the validation text would be the test text
    config = settings(tmp_path / "text.txt", tmp_path / "run", batch_size=40)
    corpus, losses, read, ended = load_corpus(config.dataset), iter([2.0, 1.0]), [], []

    def evaluated(params, ids):
        read.append(next(split for split in SPLITS if np.array_equal(ids, getattr(corpus, split))))
        nats = next(losses, None)
        if nats is None:  # of the test
            ended.append(jax.tree.map(np.array, params))
        return Evaluation(nats or 1.0, 10)

    monkeypatch.setattr(run_module, "make_evaluator", lambda *_: evaluated)
    train(config)
    losses = iter([1.0])  # as good is not better
    train(resumed(config, epochs=3))
    assert read == ["valid", "valid", "test", "valid", "test"]
    for params in (*ended, load_run(config.directory).params):
        assert_same(params, ended[0])


def test_a_test_that_is_not_finite_is_an_error_and_no_result(copied_run, monkeypatch):
    (copied_run.directory / "result.json").unlink()
    monkeypatch.setattr(run_module, "make_evaluator", lambda *_: lambda *_: Evaluation(float("nan"), 10))
    with pytest.raises(UserError, match="the loss on this text is nan"):
        train(resumed(copied_run))
    assert not (copied_run.directory / "result.json").exists()


def test_a_diverging_run_keeps_its_last_good_checkpoint(copied_run, monkeypatch):
    before = saved_state(copied_run)
    monkeypatch.setattr(LanguageModel, "total_nats", lambda _, hidden, targets: jnp.sum(hidden) * jnp.nan)
    with pytest.raises(UserError, match=rf"not finite 5 steps in a row, up to step {int(before.step) + 5};"):
        train(resumed(copied_run, epochs=4))
    assert_same(saved_state(copied_run), before)


def test_settings_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--clip must be finite and above 0; got 0"):
        train(settings("markov", tmp_path / "run", clip=0))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_left_unchanged(pets_run, pets_text, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"exists and is left unchanged\. Give another --out"):
        train(settings(pets_text, tmp_path))
    with pytest.raises(UserError, match=r"Go on with it: --out .*pets --resume; or give another --out"):
        train(pets_run[0])


def test_an_empty_directory_is_taken(pets_text, tmp_path):
    (tmp_path / "run").mkdir()
    train(settings(pets_text, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "result.json").exists()


def test_a_run_that_could_not_be_created_leaves_no_directory(pets_text, tmp_path, monkeypatch):
    """Whatever ends it before all is written that `--resume` needs, the name is free for the next try."""
    config, save = settings(pets_text, tmp_path / "run", epochs=1), save_config

    def full(*args):
        with files_of_at_most(10):
            save(*args)

    with monkeypatch.context() as broken:
        broken.setattr(run_module, "save_config", full)
        with pytest.raises(UserError, match="run cannot be written: File too large"):
            train(config)
    assert list(tmp_path.iterdir()) == []
    train(config)
    assert (tmp_path / "run" / "result.json").exists()


def test_what_a_killed_program_has_left_of_a_run_is_removed_by_the_next(pets_text, tmp_path):
    """But not what another program is about to complete, nor what is not of a run."""
    names = ".ranjax-1", ".ranjax-2", ".ranjax-notes", ".ranjax-3", ".ranjax-4"
    killed, alive, other, empty, begun = (tmp_path / name for name in names)
    for folder in (killed, alive, other, empty, begun):
        folder.mkdir()
    (killed / ".open").touch()
    (other / "notes.txt").touch()
    for folder in (other, empty):
        os.utime(folder, (0, 0))
    (killed / "vocabulary.json").touch()
    with FileLock(alive / ".open"):
        train(settings(pets_text, tmp_path / "run", epochs=1, batch_size=40))
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, begun.name, other.name, "run"]


def test_a_run_is_trained_by_one_program_at_a_time(pets_text, tmp_path, monkeypatch):
    config, make_step = settings(pets_text, tmp_path / "run", epochs=1), run_module.make_step

    def meanwhile(*args):
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"is being trained by another program\. Wait for its end"):
            train(resumed(config))
        return make_step(*args)

    monkeypatch.setattr(run_module, "make_step", meanwhile)
    assert train(config)["test_perplexity"] == train(resumed(config))["test_perplexity"]  # unlocked again


def test_of_two_starts_at_once_one_trains_and_the_other_is_refused(pets_text, tmp_path):
    flags = ["--dataset", pets_text, "--features", "8", "--layers", "1", "--epochs", "100000", "--resume", "auto"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    starts = [subprocess.Popen(command("train", *flags, "--out", tmp_path / "run"), **pipes) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in starts):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        refused, trains = sorted(starts, key=lambda process: process.poll() is None)
        assert refused.returncode == 1
        assert re.fullmatch(r"error: the run in .* is being trained by another program\..*\n", refused.stderr.read())
        trains.terminate()
        assert trains.wait(timeout=60) in (143, -signal.SIGTERM)  # the latter before it listens
    finally:
        for process in starts:
            process.kill()
            process.communicate()


def test_training_in_a_thread_leaves_signals_alone(pets_text, tmp_path):
    config = settings(pets_text, tmp_path / "run", epochs=1, batch_size=40)
    thread = threading.Thread(target=train, args=(config,))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "result.json").exists()


def test_signals_are_handled_as_before_once_a_run_has_ended(pets, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(dataclasses.replace(pets, out=str(tmp_path / "run")))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_full_disk_ends_a_run_with_one_message_and_loses_nothing(copied_run, monkeypatch):
    config = resumed(copied_run, epochs=4)
    save, before = Checkpoints.save, saved_state(config)

    def full(*args):
        with files_of_at_most(1000):
            save(*args)

    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "save", full)
        with pytest.raises(UserError, match="checkpoints cannot be written: File too large"):
            train(config)
    assert_same(saved_state(config), before)
    assert train(config)["test_tokens"] > 0


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (run_module, "save_config", "config.json"),
        (Report, "__init__", "metrics.jsonl"),
        (Report, "_row", "metrics.jsonl"),
        (Report, "result", "copy"),
    ],
)
def test_a_disk_that_is_full_for_a_small_file_loses_nothing(copied_run, monkeypatch, owner, name, file):
    config, write = resumed(copied_run, epochs=4), getattr(owner, name)
    before = (config.directory / "metrics.jsonl").read_text()

    def full(*args, **options):
        with files_of_at_most(100):
            return write(*args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, full)
        with pytest.raises(UserError, match=f"{file} cannot be written: File too large.*intact: --resume goes on"):
            train(config)
    assert load_config(config.directory).features == config.features
    assert (config.directory / "metrics.jsonl").read_text().startswith(before)
    assert not list(config.directory.glob(".*.new"))
    result = train(config)
    assert len(result["valid_perplexities"]) == 4
    assert json.loads((config.directory / "result.json").read_text()) == json.loads(json.dumps(result))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json is damaged: Expecting property name"),
        ("config.json", b'{"features": [16]}', "config.json is damaged: it has no 'sha256'"),
        ("vocabulary.json", None, "vocabulary.json cannot be read: No such file"),
        ("text.json", b"\xff", "text.json is damaged: 'utf-8' codec"),
        ("checkpoints/best", None, "has no best checkpoint: no epoch of it has been validated"),
    ],
)
def test_damaged_files_of_a_run_are_named(file, content, message, copied_run):
    path = copied_run.directory / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(load_run(copied_run.directory), copied_run.directory, "test")


def test_settings_of_another_model_do_not_fit(copied_run):
    save_config(dataclasses.replace(copied_run, features=(16,)), copied_run.directory)
    with pytest.raises(UserError, match="does not fit the configuration beside it"):
        load_run(copied_run.directory)


@pytest.mark.parametrize("name", ["x[a]", "a**b", "caf\udce9"])
def test_the_directory_of_a_run_may_have_any_name(name, pets_text, tmp_path):
    config = settings(pets_text, tmp_path / name, epochs=1, batch_size=40)
    train(config)
    assert train(resumed(config, epochs=2))["config"]["out"] == config.out
    assert load_run(tmp_path / "nowhere" / ".." / name).params
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_loop_of_links_is_refused_before_the_first_step(pets_text, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop exists and is left unchanged"):
        train(settings(pets_text, tmp_path / "loop"))
    with pytest.raises(UserError, match="loop/run cannot be written: Too many levels of symbolic links"):
        train(settings(pets_text, tmp_path / "loop" / "run"))
    with pytest.raises(UserError, match="cannot be read: Too many levels of symbolic links"):
        load_run(tmp_path / "loop")


def test_a_state_that_does_not_come_back_is_refused_before_the_first_step(pets_text, tmp_path, monkeypatch):
    load = Checkpoints.load
    monkeypatch.setattr(Checkpoints, "load", lambda *a: jax.tree.map(lambda x: x + 1, load(*a)))
    with pytest.raises(UserError, match=r"is not read as it was written\. Give another --out"):
        train(settings(pets_text, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_program_has_begun_meanwhile_is_left_unchanged(pets_text, tmp_path, monkeypatch):
    config, save = settings(pets_text, tmp_path / "run"), save_config

    def meanwhile(*args):
        save(*args)
        (tmp_path / "run").mkdir()
        save(config, tmp_path / "run")

    monkeypatch.setattr(run_module, "save_config", meanwhile)
    with pytest.raises(UserError, match=r"run exists and is left unchanged\. Go on with it"):
        train(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_run_that_is_moved_while_it_trains_stops_and_can_be_resumed(pets_text, tmp_path, monkeypatch):
    config, epoch = settings(pets_text, tmp_path / "run"), Report.epoch

    def moved(self, *args):
        epoch(self, *args)
        (tmp_path / "run").rename(tmp_path / "moved")

    with monkeypatch.context() as patch:
        patch.setattr(Report, "epoch", moved)
        with pytest.raises(UserError, match="run is no longer the directory of this run: it was moved or removed"):
            train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert len(train(resumed(dataclasses.replace(config, out=str(tmp_path / "moved"))))["valid_perplexities"]) == 2


def test_the_text_of_a_run_is_loaded_by_its_splits(pets_run, pets_text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(pets_run[0].directory)
    run = load_run("~/run")
    for split in SPLITS:
        np.testing.assert_array_equal(load_text(run, "~/run", split), getattr(load_corpus(pets_text), split))
    with pytest.raises(ValueError, match="`split` must be one of"):
        load_text(run, "~/run", "validation")


def test_the_text_of_a_run_is_found_in_another_data_dir(tmp_path):
    for name, text in (("a", TEXT), ("b", TEXT), ("c", TEXT + "the cat ")):
        (tmp_path / name / "text8").mkdir(parents=True)
        (tmp_path / name / "text8" / "text8").write_text(text.replace("\n", " ") * 60)
    config = settings("text8", tmp_path / "run", epochs=1, data_dir=str(tmp_path / "a"), batch_size=40)
    train(config)
    shutil.rmtree(tmp_path / "a")
    run = load_run(config.directory)
    assert len(load_text(run, config.directory, "test", str(tmp_path / "b"))) > 0
    with pytest.raises(UserError, match=r"--data-dir .*a is not a directory"):
        load_text(run, config.directory, "test")
    with pytest.raises(UserError, match=re.escape(f"--split test --dataset text8 --data-dir {tmp_path / 'c'}")):
        load_text(run, config.directory, "test", str(tmp_path / "c"))


@pytest.mark.parametrize("directory", [None, 5, b"run", "a\0b"])
def test_a_run_that_is_no_path_is_refused(directory):
    with pytest.raises(UserError, match="`directory` must be a path; got"):
        load_run(directory)


def test_a_model_too_large_for_the_device_is_refused_before_anything_is_written(pets, tmp_path):
    for sizes in ({"features": (2**31 - 1,)}, {"embedding": 2**31 - 1, "tie": False}):
        with pytest.raises(UserError, match=r"a model of [\d,]+ parameters takes at least"):
            train(dataclasses.replace(pets, out=str(tmp_path / "run"), **sizes))
    assert not (tmp_path / "run").exists()
