"""Runs that are stopped, killed or continued: training goes on bitwise as if nothing had happened."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import (
    TEXT,
    assert_same,
    command,
    metrics_rows,
    position,
    resumed,
    saved_state,
    settings,
    train_until,
    windows_of,
)

from ranjax import evaluate
from ranjax.cli import Stop, Stopped
from ranjax.errors import UserError
from ranjax.train import main
from ranjax.training import run as run_module
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import load_config, save_config
from ranjax.training.loop import Loop
from ranjax.training.metrics import make_evaluator
from ranjax.training.model import load_run
from ranjax.training.run import train


@pytest.fixture(scope="module")
def straight(pets_text, tmp_path_factory):
    """The settings of a finished run of two epochs, which the others must equal."""
    config = settings(pets_text, tmp_path_factory.mktemp("straight") / "run")
    train(config)
    return config


def assert_resumes_as(straight, broken):
    train(resumed(broken))
    assert_same(saved_state(broken), saved_state(straight))


def test_a_run_of_more_epochs_is_one_longer_run(straight, tmp_path):
    short = dataclasses.replace(straight, out=str(tmp_path / "run"))
    train(dataclasses.replace(short, epochs=1))
    assert_resumes_as(straight, short)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "solver": "fixed_point"},
        {"optimizer": "sgd", "schedule": "decay", "cell": "lstm"},
        {"dropout": 0.3, "block": "residual", "gates": "input", "gate_init": "half-lives"},
    ],
)
def test_a_stopped_run_resumes_bitwise(options, pets_text, tmp_path, monkeypatch):
    """Here in the middle of the first epoch."""
    straight, broken = (settings(pets_text, tmp_path / name, **options) for name in ("straight", "broken"))
    train(straight)
    train_until(lambda state: int(state.step) > 20, broken, monkeypatch)
    assert 20 < position(broken)[0] < windows_of(broken)
    assert_resumes_as(straight, broken)
    rows = metrics_rows(straight)
    if straight.solver == "fixed_point":
        assert all(3 < row["mean_iterations"] <= straight.steps + 2 for row in rows)  # tiny windows of text
    else:
        assert all("mean_iterations" not in row for row in rows)


def send_directly():
    signal.raise_signal(signal.SIGTERM)


class Dying:
    """Sends a signal from its `__del__`, where an exception would be lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def send_in_gc_callback():
    """Sends a signal from a callback of the garbage collector, where an exception would be lost; JAX has one."""

    def collected(*_):
        gc.callbacks.remove(collected)
        signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(collected)
    gc.collect()


def send_in_del():
    Dying()


def test_a_signal_on_the_last_step_of_an_epoch_loses_nothing(straight, tmp_path, monkeypatch):
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))
    windows = windows_of(broken)
    train_until(lambda state: int(state.step) == windows, broken, monkeypatch, send_directly, code=143)
    assert position(broken) == (windows, 0)
    assert_resumes_as(straight, broken)


@pytest.mark.parametrize(
    ("send", "call", "epoch"),  # in the first validation, or in the test at the end
    [(send_directly, 1, 0), (send_in_gc_callback, 1, 0), (send_in_del, 3, 2), (send_directly, 3, 2)],
)
def test_a_signal_during_an_evaluation_stops_it_and_loses_nothing(send, call, epoch, straight, tmp_path, monkeypatch):
    broken, calls = dataclasses.replace(straight, out=str(tmp_path / "broken")), []

    def make_signalled(*settings):
        evaluate = make_evaluator(*settings)

        def signalled(*args):
            calls.append(None)
            if len(calls) == call:
                send()
                evaluate(*args)
                pytest.fail("the evaluation went on")
            return evaluate(*args)

        return signalled

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_evaluator", make_signalled)
        with pytest.raises(SystemExit, match="143"):
            train(broken)
    assert position(broken) == (max(epoch, 1) * windows_of(broken), epoch)
    assert not (broken.directory / "result.json").exists()
    assert_resumes_as(straight, broken)


@pytest.mark.parametrize("epochs", [1, 3])  # in the last one, too
def test_a_signal_while_a_validated_state_is_saved_waits_for_the_save(epochs, pets_text, tmp_path, monkeypatch):
    save = Checkpoints.save

    def signalled(self, kind, step, tree):
        if kind == "best":
            signal.raise_signal(signal.SIGTERM)
        save(self, kind, step, tree)

    config = settings(pets_text, tmp_path / "run", epochs=epochs)
    monkeypatch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(SystemExit, match="143"):
        train(config)
    assert load_run(config.directory).params
    assert position(config) == (windows_of(config), 1)


def test_a_signal_while_a_run_is_created_leaves_a_run(pets_text, tmp_path, monkeypatch):
    config, save = settings(pets_text, tmp_path / "run"), save_config

    def signalled(*args):
        signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(run_module, "save_config", signalled)
    with pytest.raises(SystemExit, match="130"):
        train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert position(config) == (1, 0)


def test_the_wish_of_a_caller_to_stop_takes_the_place_of_signals(straight, tmp_path):
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="143"):
        train(broken, stop=Stop(minutes=0))
    assert signal.getsignal(signal.SIGTERM) is before
    assert position(broken) == (1, 0)
    assert_resumes_as(straight, broken)


@pytest.mark.parametrize("saved", [False, True])  # killed before the validated state is saved, or after
def test_every_epoch_of_a_killed_run_is_reported_once(saved, pets_text, tmp_path, monkeypatch):
    straight, broken = (settings(pets_text, tmp_path / name, epochs=3) for name in ("straight", "broken"))
    whole, save = train(straight), Loop.save

    def killed(self, state):
        if saved or int(state.epoch) < 2:
            save(self, state)
        if int(state.epoch) == 2:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", killed)
        with pytest.raises(MemoryError):
            train(broken)
    result = train(resumed(broken))
    for name in ("valid_perplexities", "train_perplexities"):
        assert result[name] == whole[name]
        assert len(result[name]) == 3
    assert_same(saved_state(broken), saved_state(straight))


def test_a_run_killed_before_its_first_step_resumes(straight, tmp_path, monkeypatch):
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(broken)
    assert_resumes_as(straight, broken)


def test_kill_9_and_resumption_are_bitwise(pets_text, tmp_path):
    flags = ["--dataset", str(pets_text), "--features", "8", "--layers", "1", "--batch-size", "2", "--steps", "5"]
    flags += ["--epochs", "4", "--dropout", "0.1", "--mesh", "data=1", "--out"]
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    process = subprocess.Popen(command("train", *flags, killed), stdout=subprocess.DEVNULL)
    metrics, deadline = Path(killed) / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and "valid_perplexity" in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (Path(killed) / "result.json").exists()
    main([*flags, killed, "--resume"])
    main([*flags, whole])
    config = load_config(whole)
    assert_same(saved_state(dataclasses.replace(config, out=killed)), saved_state(config))
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines())]
    assert steps == sorted(steps)


def test_a_run_resumes_to_the_end_of_the_epoch_it_has_begun_at_least(straight, tmp_path, monkeypatch):
    config = dataclasses.replace(straight, out=str(tmp_path / "run"))
    train_until(lambda state: int(state.epoch) == 1, config, monkeypatch)  # after the first step of the second
    with pytest.raises(UserError, match="--epochs must be at least 2, which the run has begun; got 1"):
        train(resumed(config, epochs=1))
    assert load_config(config.directory) == config


def test_a_run_resumes_with_its_own_settings_only(copied_run):
    with pytest.raises(UserError, match=r"another configuration \(--clip 5.0 -> 9.0\)"):
        train(resumed(copied_run, clip=9.0))
    assert load_config(copied_run.directory).clip == 5.0


@pytest.mark.parametrize(
    ("text", "changed"),
    [(TEXT.replace("cat", "pig") * 60, "the vocabulary"), ((TEXT * 60)[::-1], "the text")],
)
def test_a_run_resumes_with_its_own_text_and_vocabulary_only(text, changed, copied_run, tmp_path):
    """The second text has the same length and alphabet."""
    (tmp_path / "other.txt").write_text(text)
    with pytest.raises(UserError, match=f"{changed} of the data set is not the one"):
        train(resumed(copied_run, dataset=str(tmp_path / "other.txt")))


def test_a_run_resumes_where_its_text_has_moved(copied_run, pets_text, tmp_path):
    moved = str(shutil.copy(pets_text, tmp_path / "moved.txt"))
    train(resumed(copied_run, dataset=moved))
    assert load_config(copied_run.directory).dataset == moved


def test_a_run_from_python_resumes_from_the_program(pets_text, tmp_path, monkeypatch, capsys):
    """From any directory, and with settings that are numbers of NumPy's or paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(pets_text, "small.txt")
    numbers = {"features": [np.int64(8)], "seed": np.int64(1), "dropout": np.float32(0.5), "batch_size": 40}
    config = dataclasses.replace(
        settings("small.txt", "run", epochs=1, **numbers), dataset=Path("small.txt"), out=Path("run")
    )
    train(config)
    train(resumed(config))
    main(["--resume", "--dataset", "small.txt", "--out", "run", "--epochs", "2"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["--dataset", "../small.txt", "--out", "../run", "--resume", "--epochs", "3"])
    assert position(load_config("../run"))[1] == 3
    evaluate.main(["--checkpoint", "../run"])
    assert "perplexity" in capsys.readouterr().out


def test_the_result_is_of_the_best_state_also_where_its_row_is_gone(pets_text, tmp_path):
    config = settings(pets_text, tmp_path / "run", epochs=1, learning_rate=0.02, schedule="decay", decay=1e4)
    best = train(config)["valid_perplexity"]
    (config.directory / "metrics.jsonl").unlink()
    result = train(resumed(config, epochs=2))
    assert result["valid_perplexities"] > [1.1 * best]
    assert result["valid_perplexity"] == pytest.approx(best, rel=1e-5)


def test_a_finished_run_whose_rows_are_gone_keeps_its_curves(pets_run, copied_run):
    (copied_run.directory / "metrics.jsonl").unlink()
    picture = (copied_run.directory / "loss.png").read_bytes()
    again = train(resumed(copied_run))
    curves = "valid_perplexities", "train_perplexities"
    assert [again[name] for name in curves] == [pets_run[1][name] for name in curves]
    assert (copied_run.directory / "loss.png").read_bytes() == picture


def test_a_finished_run_that_is_only_read_again_keeps_the_device_it_was_trained_on(pets_run, copied_run):
    elsewhere = {"device": "1 x NVIDIA H100", "date": "2020-01-01", "versions": {"jax": "0.0.1"}}
    saved, result = copied_run.directory / "result.json", pets_run[1] | elsewhere
    saved.write_text(json.dumps(result))
    again = train(resumed(copied_run))
    assert again == result | {"config": again["config"]}
    assert not again["config"]["resume"]
    longer = resumed(copied_run, epochs=4)
    assert train(longer)["date"] != "2020-01-01"
    for old in (json.dumps(result), ""):  # of three epochs; cut short
        saved.write_text(old)
        assert train(longer)["date"] != "2020-01-01"
    assert os.listdir(copied_run.directory / "checkpoints" / "latest")


def test_a_run_whose_newest_state_is_damaged_resumes_bitwise_from_the_one_before(straight, tmp_path, capsys):
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))
    train(dataclasses.replace(broken, epochs=1))
    newest = max((broken.directory / "checkpoints" / "latest").iterdir(), key=lambda path: int(path.name))
    (newest / "sha256.json").write_text("{}")
    assert_resumes_as(straight, broken)
    assert f"warning: {newest} is damaged" in capsys.readouterr().err


def test_a_damaged_row_does_not_end_a_finished_training(pets_run, copied_run, capsys):
    path = copied_run.directory / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first.replace("epoch", "epock"), *rest]) + "\n")
    again = train(resumed(copied_run))
    assert again["valid_perplexities"] == pets_run[1]["valid_perplexities"]
    assert "line 1 of" in capsys.readouterr().err


def test_the_same_command_begins_goes_on_and_ends(straight, tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"), resume="auto")
    train_until(lambda state: int(state.step) > 20, broken, monkeypatch)
    assert 20 < position(broken)[0] < windows_of(broken)
    result = train(broken)
    assert_same(saved_state(broken), saved_state(straight))
    capsys.readouterr()
    assert train(broken) == result
    assert re.fullmatch(
        r"pets\.txt: .*\na step takes .*\n(it runs on 1 of 8 devices\.\n)?"
        r"it goes on from step (\d+) of \2, .*\ntest: .*\n",
        capsys.readouterr().out,
    )
    assert load_config(broken.directory).resume is False


def test_the_same_command_line_begins_and_goes_on(pets_text, tmp_path, capsys):
    command_line = ["--dataset", str(pets_text), "--features", "8", "--layers", "1", "--batch-size", "40"]
    command_line += ["--epochs", "1", "--out", str(tmp_path / "run"), "--resume", "auto"]
    for epochs in ("1", "2"):
        main([*command_line, "--epochs", epochs])
    assert [row["epoch"] for row in metrics_rows(load_config(tmp_path / "run")) if "valid_perplexity" in row] == [1, 2]
    with pytest.raises(SystemExit, match="1"):
        main([*command_line, "--clip", "9"])
    assert "began with another configuration (--clip 5.0 -> 9.0)" in capsys.readouterr().err


def test_what_is_no_run_is_refused_also_where_one_may_begin(pets_text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        train(settings(pets_text, tmp_path, resume="auto"))
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        train(settings(pets_text, tmp_path / "notes.txt", resume="auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_start_that_another_has_overtaken_goes_on_with_its_run(straight, tmp_path, monkeypatch):
    late = dataclasses.replace(straight, out=str(tmp_path / "late"), resume="auto")

    def overtaken(*args):
        monkeypatch.undo()
        shutil.copytree(straight.directory, late.directory)
        save_config(*args)

    monkeypatch.setattr(run_module, "save_config", overtaken)
    train(late)
    assert_same(saved_state(late), saved_state(straight))
    assert [path.name for path in tmp_path.iterdir()] == ["late"]
