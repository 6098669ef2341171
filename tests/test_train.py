"""Training, resumption, evaluation, generation: as a user runs them."""

import contextlib
import dataclasses
import errno
import gc
import io
import json
import logging
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax import checkpoint, evaluate, explain, generate, lm, loop, report, step, train
from ranjax.training.checkpoint import Checkpoints
from ranjax.training.config import PRESETS, Config, check_same, load_config, normalised, parse, save_config
from ranjax.data import load_corpus
from ranjax.data.builtin import markov_entropy
from ranjax.errors import UserError, exit_with_message, flag
from ranjax.evaluate import Evaluation, load_run, make_evaluator
from ranjax.cli import TUNABLES
from ranjax.lm import LanguageModel
from ranjax.training.report import Report
from ranjax.data.files import SPLITS
from ranjax.data.vocabulary import Bytes, Characters, Words

TEXT = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the dog\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pets.txt"
    path.write_text(TEXT * 60)
    return str(path)


def settings(text, out, **options):
    defaults = {"features": (8,), "layers": 1, "batch_size": 4, "steps": 7, "epochs": 2, "warmup": 5}
    return Config(dataset=text, out=str(out), **defaults | options)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A finished run: its directory and its result."""
    out = tmp_path_factory.mktemp("runs") / "pets"
    return out, train.train(settings(text, out, epochs=3, learning_rate=0.02))


def final_state(config, text):
    corpus = load_corpus(text)
    model = step.build_model(config, len(corpus.vocabulary))
    like = step.initial_state(model, step.make_optimizer(config, 1), config)
    state = Checkpoints(config.directory).load("latest", like)
    return state._replace(seconds=0, timed=0)  # the clock is not part of the result


def position(config, text):
    """Steps and epochs that a run would go on from."""
    state = final_state(config, text)
    return int(state.step), int(state.epoch)


def windows_an_epoch(text):
    """With the batches and steps of `settings`."""
    return (len(load_corpus(text).train) // 4 - 1) // 7


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.quick
def test_a_run_leaves_all_it_promises(run):
    out, result = run
    names = {"config.json", "vocabulary.json", "text.json", "metrics.jsonl", "result.json", "loss.png", "checkpoints"}
    assert {path.name for path in out.iterdir()} - {".lock"} == names
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    promised = {"dataset", "test_perplexity", "valid_perplexity", "test_tokens", "tokens_per_second", "parameters"}
    assert promised | {"config", "versions"} <= set(result)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ended = [row for row in rows if "valid_perplexity" in row]
    valid = [row["valid_perplexity"] for row in ended]
    assert len(valid) == 3
    assert result["valid_perplexities"] == valid
    assert result["train_perplexities"] == [row["train_perplexity"] for row in ended]
    assert result["valid_perplexity"] == min(valid)
    assert result["test_perplexity"] < 8  # of 19 characters
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert result["test_tokens"] == len(load_corpus(result["dataset"]).test) - 1
    assert int(final_state(load_config(out), result["dataset"]).epoch) == 3  # the last validation is not made again


@pytest.mark.parametrize("epochs", [1, 3])  # in the last one too
def test_a_signal_while_a_validated_state_is_saved_waits_for_the_save(epochs, text, tmp_path, monkeypatch):
    save = Checkpoints.save

    def interrupted(self, kind, step, tree):
        if kind == "best":
            signal.raise_signal(signal.SIGTERM)
        save(self, kind, step, tree)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.train(settings(text, tmp_path / "run", epochs=epochs))
    assert ended.value.code == 128 + signal.SIGTERM
    assert load_run(tmp_path / "run").params


def test_a_run_goes_on_with_its_own_settings_only(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    config = dataclasses.replace(load_config(tmp_path / "copy"), out=str(tmp_path / "copy"), resume=True, clip=9.0)
    with pytest.raises(UserError, match=r"another configuration \(--clip 5.0 -> 9.0\)"):
        train.train(config)
    assert load_config(tmp_path / "copy").clip == 5.0


def test_a_run_that_could_not_begin_leaves_no_directory(text, tmp_path, monkeypatch):
    """Whatever ends it before all is written that `--resume` needs, the name is free for the next try."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = settings(text, tmp_path / "run")
    with monkeypatch.context() as broken:
        broken.setattr(train, "save_config", full)
        with pytest.raises(UserError, match="run cannot be written: No space left on device"):
            train.train(config)
    assert not (tmp_path / "run").exists()
    train.train(config)
    assert (tmp_path / "run" / "result.json").exists()


def train_until(when, monkeypatch, *configs):
    """Trains one step at a time until Ctrl-C, which comes once for the first run's state `when` holds."""

    def interrupt(self, state, *_):
        if self.config == normalised(configs[0]) and when(state):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("ranjax.training.report.Report.progress", interrupt)
        patch.setattr(loop, "round", lambda _: 1, raising=False)  # bursts stay at a single step
        with pytest.raises(SystemExit, match="130"):
            train.train_together(configs)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.3, "solver": "fixed_point"}, {"optimizer": "sgd", "schedule": "decay", "cell": "lstm"}]
)
def test_an_interrupted_run_goes_on_bitwise(text, tmp_path, options, monkeypatch):
    straight = settings(text, tmp_path / "straight", **options)
    broken = dataclasses.replace(straight, out=str(tmp_path / "broken"))
    train.train(straight)
    train_until(lambda state: int(state.step) == 40, monkeypatch, broken)  # in the middle of the first epoch
    assert int(final_state(broken, text).step) == 40
    train.train(dataclasses.replace(broken, resume=True))
    assert_same(final_state(broken, text), final_state(straight, text))
    rows = [json.loads(line) for line in (straight.directory / "metrics.jsonl").read_text().splitlines()]
    if straight.solver == "fixed_point":
        assert all(3 < row["mean_passes"] <= straight.steps + 2 for row in rows)  # tiny windows
    else:
        assert all("mean_passes" not in row for row in rows)


def test_a_run_that_has_begun_an_epoch_goes_on_to_its_end_at_least(text, tmp_path, monkeypatch):
    config = settings(text, tmp_path / "run", epochs=2)
    train_until(lambda state: int(state.epoch) == 1, monkeypatch, config)  # after the first step of the second
    with pytest.raises(UserError, match="--epochs must be at least 2, which the run has begun; got 1"):
        train.train(dataclasses.replace(config, resume=True, epochs=1))


def test_runs_side_by_side_are_those_alone(text, tmp_path, monkeypatch, capsys):
    """Each with its own seed and directory; cut off together, they go on together, or each by itself."""
    both = [settings(text, tmp_path / str(seed), seed=seed, dropout=0.3, epochs=1) for seed in (0, 3)]
    alone = dataclasses.replace(both[1], out=str(tmp_path / "alone"))
    expected = train.train(alone)
    train_until(lambda state: int(state.step) == 5, monkeypatch, *both)
    on = [dataclasses.replace(config, resume=True) for config in both]
    capsys.readouterr()
    results = train.train_together(on)
    assert capsys.readouterr().out.count("epoch 1: train") == 1  # one of them tells
    assert [(r["config"]["seed"], r["side_by_side"]) for r in (*results, expected)] == [(0, 2), (3, 2), (3, 1)]
    assert results[1]["test_perplexity"] == pytest.approx(expected["test_perplexity"], rel=1e-4)
    assert results[0]["test_perplexity"] != pytest.approx(expected["test_perplexity"], rel=1e-3)
    states = (final_state(config, text) for config in (both[1], alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *states)

    further = [dataclasses.replace(config, epochs=2) for config in on]
    assert train.train(further[0])["side_by_side"] == 2  # for an epoch, which is in its seconds; now at different steps
    assert [r["config"]["epochs"] for r in train.train_together(further)] == [2, 2]
    with pytest.raises(UserError, match="the same settings, but for --seed"):
        train.train_together([alone, dataclasses.replace(both[0], dropout=0.1)])
    monkeypatch.chdir(tmp_path)
    for outs in ((both[0].out, both[0].out), ("x", "./x")):
        with pytest.raises(UserError, match="an --out each"):
            train.train_together([dataclasses.replace(config, out=out) for config, out in zip(both, outs)])
    assert train.train_together([]) == []


def test_an_interrupt_on_the_last_step_of_an_epoch_loses_nothing(text, tmp_path, monkeypatch):
    straight, broken = (settings(text, tmp_path / name) for name in ("straight", "broken"))
    train.train(straight)
    windows = windows_an_epoch(text)

    def interrupt(self, state, *_):
        if int(state.step) == windows:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("ranjax.training.report.Report.progress", interrupt)
        with pytest.raises(SystemExit, match="143"):
            train.train(broken)
    assert position(broken, text) == (windows, 0)
    train.train(dataclasses.replace(broken, resume=True))
    assert_same(final_state(broken, text), final_state(straight, text))


def test_a_signal_during_validation_ends_at_once_and_loses_nothing(text, tmp_path, monkeypatch):
    straight, broken = (settings(text, tmp_path / name) for name in ("straight", "broken"))
    train.train(straight)

    def interrupt(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the validation went on")

    with monkeypatch.context() as patch:
        patch.setattr("ranjax.evaluate.make_evaluator", lambda *_: interrupt)
        with pytest.raises(SystemExit, match="143"):
            train.train(broken)
    assert position(broken, text) == (windows_an_epoch(text), 0)
    train.train(dataclasses.replace(broken, resume=True))
    assert_same(final_state(broken, text), final_state(straight, text))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lost", [1, 3])  # in the first validation; in the test, after which no step comes
def test_a_signal_lost_in_a_callback_ends_the_program_all_the_same(lost, text, tmp_path, monkeypatch):
    """What is raised in one of the garbage collector's is only printed."""
    straight, broken = (settings(text, tmp_path / name, epochs=2) for name in ("straight", "broken"))
    train.train(straight)
    calls = []

    def collect(*_):
        gc.callbacks.remove(collect)
        signal.raise_signal(signal.SIGTERM)

    def interrupted(model, streams):
        def evaluate(*args):
            calls.append(args)
            if len(calls) == lost:
                gc.callbacks.append(collect)
                gc.collect()
            return evaluator(*args)

        evaluator = make_evaluator(model, streams)
        return evaluate

    with monkeypatch.context() as patch:
        patch.setattr("ranjax.evaluate.make_evaluator", interrupted)
        with pytest.raises(SystemExit, match="143"):
            train.train(broken)
    assert len(calls) == lost
    train.train(dataclasses.replace(broken, resume=True))
    assert_same(final_state(broken, text), final_state(straight, text))


@pytest.mark.parametrize("saved", [False, True])  # killed before the validated state is saved, or after
def test_every_epoch_of_a_killed_run_is_told_of_once(saved, text, tmp_path, monkeypatch):
    straight, broken = (settings(text, tmp_path / name, epochs=3) for name in ("straight", "broken"))
    whole = train.train(straight)

    def killed(self, state, write=loop.Training.save):
        if saved or int(state.epoch) < 2:
            write(self, state)
        if int(state.epoch) == 2:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "save", killed)
        with pytest.raises(MemoryError):
            train.train(broken)
    resumed = train.train(dataclasses.replace(broken, resume=True))
    for name in ("valid_perplexities", "train_perplexities"):
        assert resumed[name] == whole[name]
        assert len(resumed[name]) == 3
    assert_same(final_state(broken, text), final_state(straight, text))


def test_a_run_killed_before_its_first_step_can_be_resumed(text, tmp_path, monkeypatch):
    config = settings(text, tmp_path / "run", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr("ranjax.training.step.make_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config)
    assert train.train(dataclasses.replace(config, resume=True))["test_tokens"] > 0


def test_a_run_is_trained_by_one_program_at_a_time(text, tmp_path, monkeypatch):
    config = settings(text, tmp_path / "run", epochs=1)
    again, make_step = dataclasses.replace(config, resume=True), step.make_step

    def meanwhile(*args):
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"is being trained by another program\. Wait for its end"):
            train.train(again)
        return make_step(*args)

    monkeypatch.setattr(step, "make_step", meanwhile)
    assert train.train(config)["test_perplexity"] == train.train(again)["test_perplexity"]  # free again


def test_going_on_to_more_epochs_is_one_longer_run(text, tmp_path):
    long = settings(text, tmp_path / "long", epochs=2)
    short = settings(text, tmp_path / "short", epochs=1)
    train.train(long)
    train.train(short)
    train.train(dataclasses.replace(short, epochs=2, resume=True))
    assert_same(final_state(short, text), final_state(long, text))


def test_kill_9_and_resume_is_bitwise(text, tmp_path):
    flags = ["--dataset", text, "--features", "8", "--layers", "1", "--batch-size", "2", "--steps", "5"]
    flags += ["--epochs", "4", "--dropout", "0.1"]
    command = [sys.executable, "-m", "ranjax.train", *flags, "--out"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and "valid_perplexity" in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    train.main([*command[3:], str(tmp_path / "killed"), "--resume"])
    train.main([*command[3:], str(tmp_path / "whole")])
    config = load_config(tmp_path / "whole")
    killed_config = dataclasses.replace(config, out=str(tmp_path / "killed"))
    assert_same(final_state(killed_config, text), final_state(config, text))
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == sorted(rows)


def test_sigterm_saves_and_says_how_to_go_on(text, tmp_path):
    flags = ["--dataset", text, "--features", "8", "--layers", "1", "--batch-size", "2", "--epochs", "10000"]
    command = [sys.executable, "-m", "ranjax.train", *flags, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    process.stdout.readline()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"Go on with: python -m ranjax.train --out {tmp_path / 'run'} --resume" in output
    stopped = int(re.search(r"Stopped after step (\d+), saved", output)[1])
    assert position(load_config(tmp_path / "run"), text)[0] == stopped > 0


def test_steps_that_are_not_finite_are_skipped_and_counted(text):
    config = settings(text, "unused", optimizer="sgd", schedule="constant")
    corpus = load_corpus(text)
    model = step.build_model(config, len(corpus.vocabulary))
    optimizer = step.make_optimizer(config, 100)
    advance = step.make_step(model, optimizer, config, 100)
    windows = jnp.asarray(corpus.train[:2828].reshape(4, 707))
    state = step.initial_state(model, optimizer, config)
    state = jax.tree.map(jnp.copy, state)
    bad = state._replace(params=jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.params))
    bad = advance(bad, windows)
    assert (int(bad.bad), int(bad.bad_in_row), int(bad.step), int(bad.tokens), float(bad.loss)) == (1, 1, 1, 0, 0)
    good = advance(bad._replace(params=jax.tree.map(jnp.copy, state.params)), windows)
    assert (int(good.bad), int(good.bad_in_row), int(good.step)) == (1, 0, 2)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((good.params, good.carry)))
    stopped = advance(good._replace(bad_in_row=jnp.array(step.BAD_STEPS)), windows)
    assert int(stopped.bad_in_row) > step.BAD_STEPS  # it stays stopped until the host has seen it


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(text, tmp_path, monkeypatch):
    config = settings(text, tmp_path / "run", epochs=1)
    train.train(config)
    before = final_state(config, text)
    monkeypatch.setattr("ranjax.lm.cross_entropy", lambda logits, targets: logits[..., 0] * jnp.nan)
    last = int(before.step) + 5  # though the burst goes on beyond it
    with pytest.raises(UserError, match=rf"not finite 5 steps in a row, up to step {last};.*Lower --learning-rate"):
        train.train(dataclasses.replace(config, epochs=2, resume=True))
    assert_same(final_state(config, text), before)


def test_a_run_that_diverges_ends_those_beside_it(text, tmp_path, monkeypatch):
    both = [settings(text, tmp_path / str(seed), seed=seed, epochs=1) for seed in (0, 1)]

    def broken(model, optimizer, config, make=step.initial_state):
        state = make(model, optimizer, config)
        return state._replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params)) if config.seed else state

    monkeypatch.setattr(step, "initial_state", broken)
    with pytest.raises(UserError, match=rf"up to step 5; .*{re.escape(str(both[1].directory))} is intact"):
        train.train_together(both)


def test_the_papers_schedule():
    rate = step.learning_rate(PRESETS["ptb-small"], per_epoch=10)
    by_epoch = [float(rate(10 * epoch + 5)) for epoch in range(7)]
    assert by_epoch == [1, 1, 1, 1, 0.5, 0.25, 0.125]
    cosine = step.learning_rate(Config(schedule="cosine", epochs=2, warmup=5, learning_rate=1.0), per_epoch=10)
    assert [float(cosine(n)) for n in (0, 5, 20)] == pytest.approx([0, 1, 0.01])
    short = step.learning_rate(Config(schedule="cosine", epochs=2, warmup=1000, learning_rate=1.0), per_epoch=10)
    assert [float(short(n)) for n in (0, 5, 10, 20)] == pytest.approx([0, 0.5, 1, 0.01])


def test_markov_is_learnt_to_its_entropy(tmp_path):
    config = Config(dataset="markov", out=str(tmp_path / "run"), features=(64,), layers=1, epochs=1, dropout=0.0,
                    learning_rate=0.01, batch_size=40, tie=True)  # fmt: skip
    result = train.train(config)
    assert markov_entropy() * 0.98 < result["test_nats"] < markov_entropy() * 1.02


def test_evaluation_counts_every_prediction_whatever_the_window(run, monkeypatch):
    loaded = load_run(run[0])
    ids = load_corpus(loaded.config.dataset).test
    logits, _ = loaded.model.apply({"params": loaded.params}, ids[None, :-1], deterministic=True)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), ids[1:, None], axis=-1)
    for window in (7, len(ids) - 1, 512):
        monkeypatch.setattr(evaluate, "WINDOW", window)
        result = make_evaluator(loaded.model)(loaded.params, ids)
        assert result.tokens == len(ids) - 1
        assert result.nats == pytest.approx(-float(picked.mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats))
    unsigned = make_evaluator(loaded.model)(loaded.params, ids.astype(np.uint8))
    assert unsigned == result
    for wrong in (ids - 1, ids + 1, ids.astype(float)):
        with pytest.raises(ValueError, match="`ids` must be whole numbers from 0 to 14, the model's; got"):
            make_evaluator(loaded.model)(loaded.params, wrong)
    with pytest.raises(ValueError, match=r"`ids` must be the ids of one text, \(tokens,\); got the shape \(1, "):
        make_evaluator(loaded.model)(loaded.params, ids[None])
    with pytest.raises(UserError, match=r"at least 2 tokens is needed .*; got 1"):
        make_evaluator(loaded.model)(loaded.params, ids[:1])
    with pytest.raises(ValueError, match="`streams` must be a whole number, at least 1; got 0"):
        make_evaluator(loaded.model, 0)

    counted = np.arange(len(ids)) % 5 == 0
    result = make_evaluator(loaded.model)(loaded.params, ids, counted)
    assert result.tokens == counted[1:].sum()
    assert result.nats == pytest.approx(-float(picked[counted[1:]].mean()), rel=1e-5)
    for wrong in (np.arange(len(ids)) == 0, counted[:-1], counted[:2], counted.astype(int), True, "all"):
        with pytest.raises(ValueError, match=r"`counted` must be bool, of the shape .* and mark a token"):
            make_evaluator(loaded.model)(loaded.params, ids, wrong)


@pytest.mark.parametrize("streams", [2, 5, 40, 10**9])  # most of the last would have nothing to read
def test_a_stream_reads_a_window_before_what_it_counts(streams, run, monkeypatch):
    monkeypatch.setattr(evaluate, "WINDOW", 16)
    loaded = load_run(run[0])
    loaded = dataclasses.replace(loaded, params=jax.tree.map(np.array, loaded.params))
    loaded.params["stack_0"]["cell"]["gates"]["bias"][1] += 4  # it remembers longer
    ids = load_corpus(loaded.config.dataset).test
    own = -(-(len(ids) - 17) // (16 * streams)) * 16
    picked = []
    for first in range(0, min(streams * own, len(ids) - 17), own):
        part = ids[first : first + own + 17]
        logits, _ = loaded.model.apply({"params": loaded.params}, part[None, :-1], deterministic=True)
        of_part = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), part[1:, None], axis=-1)
        picked.extend(of_part[16 if first else 0 :])
    assert len(picked) == len(ids) - 1
    result = make_evaluator(loaded.model, streams)(loaded.params, ids)
    assert result.tokens == len(ids) - 1
    assert result.nats == pytest.approx(-float(np.mean(picked)), rel=1e-5)
    assert result.nats != make_evaluator(loaded.model)(loaded.params, ids).nats
    short = make_evaluator(loaded.model, streams)(loaded.params, ids[:4])
    assert (short.tokens, short.nats) == (3, pytest.approx(-float(np.mean(picked[:3])), rel=1e-5))

    counted = np.arange(len(ids)) % 5 == 0
    result = make_evaluator(loaded.model, streams)(loaded.params, ids, counted)
    assert result.tokens == counted[1:].sum()
    assert result.nats == pytest.approx(-float(np.array(picked)[counted[1:]].mean()), rel=1e-5)


def test_a_run_of_several_streams_is_evaluated_so(text, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "WINDOW", 16)
    out = tmp_path / "run"
    result = train.train(settings(text, out, epochs=1, streams=3))
    again, loaded, _ = evaluate.evaluate_split(evaluate.Options(str(out)))
    assert result["test_nats"] == again.nats
    assert again.nats != make_evaluator(loaded.model)(loaded.params, load_corpus(text).test).nats


@pytest.mark.quick
def test_the_program_evaluate(run, capsys, tmp_path):
    out, result = run
    evaluate.main(["--checkpoint", str(out)])
    said = capsys.readouterr().out
    assert f"perplexity {result['test_perplexity']:.2f}, {result['test_bits']:.4f} bits per character" in said
    assert f"{result['test_tokens']:,} tokens" in said
    (tmp_path / "other.txt").write_text(TEXT)
    evaluate.main(["--checkpoint", str(out), "--dataset", str(tmp_path / "other.txt"), "--split", "train"])
    assert "other.txt train: perplexity" in capsys.readouterr().out


@pytest.mark.quick
def test_the_program_generate(run, capsys):
    out, _ = run
    for extra in ([], ["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0.5", "--seed", "3"]):
        generate.main(["--checkpoint", str(out), "--prompt", "the c", "--length", "40", *extra])
        text = capsys.readouterr().out
        assert text.startswith("the c")
        assert len(text) == 5 + 40 + 1
        assert set(text) <= set(TEXT)
        generate.main(["--checkpoint", str(out), "--prompt", "the c", "--length", "40", *extra])
        assert capsys.readouterr().out == text


def test_sampling_takes_only_what_it_may():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 500)

    def drawn(**options):
        sampling = generate.Sampling(**options)
        return np.bincount(jax.vmap(lambda key: generate.sample(key, logits, sampling))(keys), minlength=4) / 500

    np.testing.assert_allclose(drawn(), [0.5, 0.3, 0.15, 0.05], atol=0.06)
    np.testing.assert_allclose(drawn(top_k=2), [0.625, 0.375, 0, 0], atol=0.06)
    np.testing.assert_allclose(drawn(top_p=0.81), [0.526, 0.316, 0.158, 0], atol=0.06)
    np.testing.assert_allclose(drawn(top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(drawn(top_p=0.81, top_k=2), [0.625, 0.375, 0, 0], atol=0.06)
    alike = jnp.array([0.0, 1.0, 1.0, 1.0])
    with pytest.raises(UserError, match=r"--top-k must be a whole number, at least 1; got 2\.5"):
        generate.Sampling(top_k=2.5)
    for options in ({"top_k": 1}, {"top_p": 0.2}):  # equal ones are not kept beyond the number or the sum
        assert {int(generate.sample(key, alike, generate.Sampling(**options))) for key in keys[:20]} == {1}
    assert {int(generate.sample(key, alike, generate.Sampling(top_k=2))) for key in keys[:20]} == {1, 2}
    flat = jnp.zeros(40_000)  # in float32 the probabilities reach 1 before the last token
    tokens = jax.vmap(lambda key: generate.sample(key, flat, generate.Sampling()))(keys[:200])
    assert int(tokens.max()) > 39_000
    np.testing.assert_allclose(drawn(temperature=0), [1, 0, 0, 0])
    np.testing.assert_allclose(drawn(top_p=1e-50), [1, 0, 0, 0])  # 0 in float32
    np.testing.assert_allclose(drawn(top_k=2**40), [0.5, 0.3, 0.15, 0.05], atol=0.06)
    np.testing.assert_allclose(drawn(temperature=1e200), [0.25] * 4, atol=0.06)
    np.testing.assert_allclose(drawn(temperature=0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.06)


def test_words_and_half_characters_are_written_whole():
    from ranjax.data.vocabulary import Bytes, Words

    written = []
    generate.stream(Words(("<eos>", "a", "b")), iter([1, 2, 0, 1]), written.append, "a")
    assert "".join(written) == " a b\na"
    written.clear()
    data = "é!".encode()
    vocabulary = Bytes.build(data)
    generate.stream(vocabulary, iter(vocabulary.encode("é!").tolist()), written.append, "")
    assert written == ["é", "!", ""]
    written.clear()
    vocabulary = Bytes.build("😀".encode())
    generate.stream(vocabulary, iter(vocabulary.encode("😀").tolist()), written.append, "")
    assert written == ["😀", ""]
    written.clear()
    generate.stream(Words(("<eos>", "a", "\ufffd")), iter([1, 2]), written.append, "a")
    assert written[:2] == [" a", " \ufffd"]  # a word is whole, whatever it ends in
    written.clear()
    generate.stream(Words(("<eos>", "a")), iter([1]), written.append, "")
    assert written[0] == "a"  # as on a line of its own


def test_explicit_flags_win_over_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--preset", "ptb-medium", "--learning-rate", "0.3", "--out", "x"])
    assert (config.features, config.decay, config.learning_rate, config.dropout) == ((650,), 0.8, 0.3, 0.5)
    assert parse(["--learning-rate", "0.3", "--preset=text8"]).features == (1024, 1024, 2048)
    assert config.directory == tmp_path / "x"


def program(module, *flags):
    """Standard error and exit code of a program, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", f"ranjax.{module}", *flags], capture_output=True, text=True)
    return done.stderr, done.returncode


def test_a_program_ends_with_one_message_and_exit_code_1(tmp_path):
    error, code = program("train", "--dataset", "nowhere", "--out", str(tmp_path / "x"))
    assert code == 1
    assert error.startswith("error: there is no data set or path 'nowhere'")
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


@contextlib.contextmanager
def waiting(body="pass"):
    """A program that has written a line and waits on its input; then it goes on with `body`."""
    code = (
        "import itertools, signal, sys\nfrom ranjax.errors import exit_with_message\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has it ignored
        "with exit_with_message():\n"
        f"    print('first', flush=True)\n    sys.stdin.read()\n    {body}\n"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", code], env=buffered, **pipes) as process:
        assert process.stdout.readline() == b"first\n"
        yield process


@pytest.mark.parametrize("lines", ["itertools.count()", "range(5)"])  # while it writes, and at its end
def test_a_program_whose_output_is_read_no_further_ends_without_a_word(lines):
    with waiting(f"for line in {lines}: print(line)") as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_what_a_terminal_cannot_show_is_written_as_its_code(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with exit_with_message():
        print("caf\u00e9")
    assert written.getvalue() == b"caf\\xe9\n"


def test_an_output_that_is_closed_from_the_beginning_is_no_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    generate.main(["--checkpoint", str(run[0]), "--length", "2"])


def test_what_does_not_fit_in_the_memory_ends_a_program_with_a_message(capsys):
    with pytest.raises(SystemExit) as ended, exit_with_message():
        jnp.zeros((2**20, 2**30), jnp.int8)
    assert ended.value.code == 1
    assert re.match("error: .*memory.* Take less: in training by --features, ", capsys.readouterr().err)


def test_ctrl_c_ends_a_program_without_a_word():
    with waiting() as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait() == 130


def test_ctrl_c_that_is_ignored_stays_so():
    """As for a job in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with exit_with_message():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["a callback", "a __del__"])
def test_ctrl_c_that_would_be_lost_ends_a_program_all_the_same(where, monkeypatch):
    lost, collections = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: lost.append(told.object))

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def collect(*told):
        collections.append(told)
        if len(collections) == 1:
            signal.raise_signal(signal.SIGINT)

    def program():
        with exit_with_message():
            if where == "a __del__":
                Dying()
            else:
                gc.callbacks.append(collect)
                gc.collect()
            for _ in range(100):
                time.sleep(0.1)

    threads = set(threading.enumerate())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match="130"):
            program()
        assert collect not in lost
        assert (Dying.__del__ in lost) == (where == "a __del__")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        timers = [t for t in set(threading.enumerate()) - threads if isinstance(t, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)  # none comes later
    finally:
        signal.signal(signal.SIGINT, before)
        gc.callbacks[:] = [callback for callback in gc.callbacks if callback is not collect]


def test_a_model_that_has_diverged_is_written_in_short():
    result = evaluate.Evaluation(451_570.0, 10)
    assert json.loads(json.dumps(result.perplexity, allow_nan=False)) == 1e100
    assert evaluate.report(result, None) == "perplexity 1.00e+100, 451570.0000 nats, 10 tokens"
    assert evaluate.report(evaluate.Evaluation(4.5, 10), None) == "perplexity 90.02, 4.5000 nats, 10 tokens"
    assert evaluate.shown(123_456.0) == "123456.00"


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("train", ["--out", "{run}"], "pets exists and is left as it is"),
        ("generate", ["--checkpoint", "~nosuchuser/x"], "~nosuchuser/x is not a run: it has no config.json"),
        ("train", ["--preset", "ptb-tiny"], "--preset must be one of ptb-small, .* got 'ptb-tiny'"),
        ("train", ["--resume"], "runs/python-docs-ran is not a run"),
        ("train", ["--dataset", "{text}", "--layers", "0"], "--layers must be a whole number, at least 1; got 0"),
        ("train", ["--dataset", "{text}", "--learning-rate", "0"], "--learning-rate must be above 0; got 0"),
        ("train", ["--dataset", "{text}", "--learning-rate", "inf"], "--learning-rate must be finite; got inf"),
        ("train", ["--dataset", "{text}", "--clip", "0"], "--clip must be above 0; got 0"),
        (
            "train",
            ["--preset", "ptb-small", "--weight-decay", "0.1"],
            "--weight-decay is for --optimizer adamw; got 0.1",
        ),
        ("train", ["--dataset", "{text}", "--dropout", "2"], r"--dropout must be in \[0, 1\); got 2"),
        (
            "train",
            ["--dataset", "{text}", "--solver", "associative"],
            "--solver must be one of .* got '.*' with --gates recurrent",
        ),
        (
            "train",
            ["--dataset", "{text}", "--gates", "diagonal", "--projection", "3", "--no-tie"],
            "--projection cannot go with --gates diagonal",
        ),
        ("train", ["--dataset", "{text}", "--layers", "2", "--features", "4", "5", "6"], "--features must be one size"),
        ("generate", ["--checkpoint", "{run}", "--length", "0"], "--length must be at least 1; got 0"),
        ("train", ["--resume", "--out", "{tmp}/none"], "none is not a run: it has no config.json"),
        ("train", ["--resume", "--out", "{run}", "--features", "9"], "another configuration .*--features"),
        ("train", ["--dataset", "{text}", "--batch-size", "4000"], "fewer than one batch"),
        ("train", ["--dataset", "{text}", "--embedding", "3"], "--tie needs the embedding .* got --embedding 3"),
        ("train", ["--dataset", "{text}", "--cell", "gru", "--ablation", "gates"], "--ablation is an option of --cell"),
        (
            "train",
            ["--dataset", "{text}", "--ablation", "content", "--no-tie", "--embedding", "3"],
            "--ablation content needs inputs as wide",
        ),
        ("train", ["--dataset", "copy-8"], "the distance of the task copy must be 9 to 2048; got 'copy-8'"),
        ("evaluate", ["--checkpoint", "{tmp}/none"], "none is not a run"),
        (
            "evaluate",
            ["--checkpoint", "{run}", "--dataset", "markov"],
            "the test split of ranjax.embedded does not fit the model: .* not the characters '0', '1'",
        ),
        (
            "generate",
            ["--checkpoint", "{run}", "--prompt", "XYZ"],
            "the prompt does not fit the model: .*'X', 'Y', 'Z'",
        ),
        (
            "generate",
            ["--checkpoint", "{run}", "--prompt", "caf\udce9"],
            r"--prompt is not UTF-8 text; got 'caf\\u",
        ),
        ("generate", ["--checkpoint", "{run}", "--temperature", "nan"], "--temperature must be finite and at least 0"),
        (
            "generate",
            ["--checkpoint", "{run}", "--seed", "-1"],
            r"--seed must be a whole number in \[0, 2\*\*31\); got -1",
        ),
        ("train", ["--dataset", "{text}", "--seed", "2147483648"], r"--seed must be a whole number in \[0, 2\*\*31\)"),
        ("train", ["--dataset", "{text}", "--out", "{text}/run"], "--out .*pets.txt/run cannot be written: Not a dir"),
        ("generate", ["--checkpoint", "{run}", "--top-p", "0"], r"--top-p must be in \(0, 1\]; got 0"),
        ("generate", ["--checkpoint", "{run}", "--top-k", "0"], "--top-k must be a whole number, at least 1; got 0"),
        (
            "generate",
            ["--checkpoint", "{run}", "--seed", "2147483648"],
            r"--seed must be a whole number in \[0, 2\*\*31\)",
        ),
        ("evaluate", ["--checkpoint", "{run}", "--dataset", ""], "there is no data set or path ''"),
    ],
)
def test_bad_input(module, flags, message, run, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"run": run[0], "tmp": tmp_path, "text": text}
    before = sorted(path.stat().st_mtime_ns for path in run[0].rglob("*"))
    main = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}[module]
    with pytest.raises(SystemExit) as stop:
        main([flag.format(**places) for flag in flags])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error), error
    assert "Traceback" not in error
    assert sorted(path.stat().st_mtime_ns for path in run[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "--optimizer must be one of sgd, adamw; got 'adam'"),
        ({"schedule": "linear"}, "--schedule must be one of constant, cosine, decay; got 'linear'"),
        ({"tokenizer": "words"}, "--tokenizer must be one of word, character, byte, bpe, None; got 'words'"),
        ({"tie": "no"}, "--tie must be one of True, False; got 'no'"),
        ({"tie": 1}, "--tie must be one of True, False; got 1"),
        ({"dataset": None}, "--dataset must be a name or a path; got None"),
        ({"data_dir": 5}, "--data-dir must be a path; got 5"),
        ({"seed": -5}, "--seed must be a whole number in [0, 2**31); got -5"),
        ({"seed": 0.0}, "--seed must be a whole number in [0, 2**31); got 0.0"),
        ({"out": ""}, "--out must be a path; got ''"),
        ({"dataset": ""}, "--dataset must be a name or a path; got ''"),
        ({"features": np.array([8, 8])}, "--features must be one or more whole numbers, each at least 1; got array"),
        ({"streams": 0}, "--streams must be a whole number, at least 1; got 0"),
        ({"dropout": 1.0}, "--dropout must be in [0, 1); got 1.0"),
        ({"dropout": -0.1}, "--dropout must be in [0, 1); got -0.1"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0; got -1.0"),
        ({"decay": 0.0}, "--decay must be above 0; got 0.0"),
        ({"init_scale": 0.0}, "--init-scale must be above 0; got 0.0"),
        *(({name: math.inf}, "must be finite; got inf") for name in ("clip", "decay", "init_scale", "weight_decay")),
        *(({name: 2**31}, f"must be below 2**31; got {2**31}") for name in ("epochs", "embedding", "decay_after")),
        ({"features": (8, 10**12)}, "--features must be below 2**31; got (8, 1000000000000)"),
        ({"learning_rate": 10**400}, "--learning-rate must be finite; got 1000"),
        ({"decay_after": 1.5}, "--decay-after must be a whole number, at least 0; got 1.5"),
        ({"data_dir": "a\0b"}, "--data-dir must be a path; got 'a\\x00b'"),
        ({"preset": "ptb-medium"}, "--preset ptb-medium has none of its settings here. From Python: dataclasses.repl"),
    ],
)
def test_settings_from_python_are_checked_as_flags_are(options, message, text, tmp_path):
    good = settings(text, tmp_path / "run")
    bad = dataclasses.replace(good, **{"out": str(tmp_path / "other")} | options)
    for configs in ([bad], [good, bad]):  # of several, every one
        with pytest.raises(UserError, match=re.escape(message)):
            train.train_together(configs)
    assert list(tmp_path.iterdir()) == []


def test_a_run_begun_in_python_goes_on_from_the_program(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, tmp_path / "small.txt")
    numbers = {"features": [np.int64(8)], "seed": np.int64(1), "dropout": np.float32(0.5)}
    begun = settings(Path("small.txt"), "run", epochs=1, **numbers)
    begun = dataclasses.replace(begun, out=Path("run"))
    train.train(begun)
    train.train(dataclasses.replace(begun, resume=True))
    train.main(["--resume", "--dataset", "small.txt", "--out", "run", "--epochs", "2"])
    monkeypatch.chdir("/")
    evaluate.main(["--checkpoint", str(tmp_path / "run")])
    assert "perplexity" in capsys.readouterr().out


def test_a_vocabulary_that_does_not_match(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("cat", "pig") * 60)
    config = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"dataset": str(other)}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    resumed = Config(**config | {"features": tuple(config["features"]), "out": str(tmp_path / "copy"), "resume": True})
    with pytest.raises(UserError, match="the vocabulary of the data set is not the one"):
        train.train(resumed)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", "config.json cannot be read: Expecting property name"),
        ("config.json", b"[]", r"config.json must hold an object and 'features'; got \[\]"),
        ("config.json", b"{}", r"config.json must hold an object and 'features'; got \{\}"),
        ("config.json", b'{"features": 8}', "damaged: --features must be one or more whole numbers, .*got 8"),
        ("config.json", b'{"features": [8], "steps": "7"}', "damaged: --steps must be a whole number, .*got '7'"),
        ("vocabulary.json", None, "vocabulary.json cannot be read: .*No such file"),
        ("text.json", b"\xff", "text.json cannot be read: 'utf-8' codec"),
        ("config.json", b'{"features": [8], "new": 1}', "has settings this version does not know: new"),
        ("checkpoints/best/*/tree/_METADATA", None, "best is damaged: it holds no arrays"),
        ("checkpoints/best/*/tree/array_metadatas/process_0", b"garbage", "best is damaged: its arrays cannot be read"),
        ("checkpoints/best/*/tree", None, "best is damaged: its arrays cannot be read"),
    ],
)
def test_damaged_files_of_a_run_are_named(file, content, message, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob(file)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluate.evaluate_split(evaluate.Options(str(tmp_path / "copy")))


def test_a_run_without_a_best_state_says_how_to_get_one(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "best")
    with pytest.raises(UserError, match=r"no epoch of it has been validated\. Go on with: .*copy --resume"):
        load_run(tmp_path / "copy")
    assert not (tmp_path / "copy" / "checkpoints" / "best").exists()
    (tmp_path / "copy" / "checkpoints" / "best").mkdir()
    with pytest.raises(UserError, match="no epoch of it has been validated"):
        load_run(tmp_path / "copy")


def test_a_run_is_evaluated_on_its_own_text_unless_told(text, tmp_path, capsys):
    """And goes on where that has moved to, with as many epochs as it has begun or more."""
    moving = tmp_path / "moving.txt"
    shutil.copy(text, moving)
    config = settings(str(moving), tmp_path / "run", epochs=2)
    train.train(config)
    moving.rename(tmp_path / "moved.txt")
    moved = dataclasses.replace(config, dataset=str(tmp_path / "moved.txt"), resume=True)
    with pytest.raises(UserError, match="--epochs must be at least 2, which the run has begun; got 1"):
        train.train(dataclasses.replace(moved, epochs=1))
    assert load_config(tmp_path / "run") == dataclasses.replace(config, resume=False)
    train.train(moved)
    assert load_config(tmp_path / "run").dataset == moved.dataset
    evaluate.main(["--checkpoint", str(tmp_path / "run")])
    (tmp_path / "moved.txt").write_text("the cat sat on the log\n" + TEXT * 60)
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "the test split of" in error
    evaluate.main(shlex.split(error.split("python -m ranjax.evaluate ")[1]))  # as it says
    assert "moved.txt test: perplexity" in capsys.readouterr().out


def test_a_text_that_has_changed_is_read_by_the_flags_that_are_named(tmp_path, capsys):
    folder = tmp_path / "the data" / "text8"
    folder.mkdir(parents=True)
    (folder / "text8").write_text(TEXT.replace("\n", " ") * 60)
    config = settings("text8", tmp_path / "a run", epochs=1, data_dir=str(folder.parent))
    train.train(config)
    (folder / "text8").write_text(TEXT.replace("\n", " ") * 60 + "the cat ")
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", config.out])
    evaluate.main(shlex.split(capsys.readouterr().err.split("python -m ranjax.evaluate ")[1]))
    assert "text8 test: perplexity" in capsys.readouterr().out


def test_the_run_that_is_found_goes_on_also_as_a_copy(run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run[0], "runs/pets-ran")
    config = parse(["--dataset", text, "--resume", "--epochs", "4"])
    assert config.directory == tmp_path / "runs" / "pets-ran"


def test_what_is_reported_is_of_the_best_state_also_where_its_row_is_gone(text, tmp_path):
    config = settings(text, tmp_path / "run", epochs=1, learning_rate=0.02, schedule="decay", decay=1e4)
    best = train.train(config)["valid_perplexity"]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    result = train.train(dataclasses.replace(config, epochs=2, resume=True))
    assert result["valid_perplexities"] > [1.1 * best]
    assert result["valid_perplexity"] == pytest.approx(best, rel=1e-5)


def test_a_finished_run_whose_rows_are_gone_keeps_its_result(text, tmp_path):
    config = settings(text, tmp_path / "run", epochs=1)
    result = train.train(config)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    picture = (tmp_path / "run" / "loss.png").read_bytes()
    again = train.train(dataclasses.replace(config, resume=True))
    curves = "valid_perplexities", "train_perplexities"
    assert [again[name] for name in curves] == [result[name] for name in curves]
    assert (tmp_path / "run" / "loss.png").read_bytes() == picture


def test_paths_hold_from_any_directory(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "pets.txt")
    flags = ["--features", "4", "--layers", "1", "--batch-size", "4", "--steps", "7", "--epochs", "1"]
    train.main(["--dataset", "pets.txt", "--out", "run", *flags])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate.main(["--checkpoint", "../run"])
    train.main(["--dataset", "../pets.txt", "--out", "../run", "--resume", "--epochs", "2"])


def test_a_checkpoint_of_another_configuration(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"features": [16]}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the configuration beside it"):
        load_run(tmp_path / "copy")


def test_help_is_quick():
    def seconds():
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "ranjax.train", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began

    assert min(seconds() for _ in range(3)) < 1.5


@pytest.mark.parametrize(
    ("module", "options"),
    [("train", Config), ("evaluate", evaluate.Options), ("generate", generate.Options), ("explain", explain.Options)],
)
def test_help_has_every_flag_and_waits_for_no_large_import(module, options):
    code = (
        f"import sys, ranjax.{module} as program\ntry: program.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=wide)
    said, loaded = done.stdout.rstrip("\n").rsplit("\n", 1)
    assert all(flag(field.name) in said for field in dataclasses.fields(options))
    assert "tyro" in loaded.split()
    assert not {"jax", "flax", "datasets", "matplotlib", "tokenizers"} & set(loaded.split())


@pytest.mark.parametrize("given", [None, ""])
def test_a_program_begins_anew_once_with_huge_pages(given):
    """On Linux, unless it is told something else."""
    anew = given is None and sys.platform == "linux"
    code = (
        "import os, sys; print(os.getpid(), flush=True)\n"
        "from ranjax.cli import restart_with_huge_pages; restart_with_huge_pages()\n"
        "print(repr(os.environ.get('GLIBC_TUNABLES')), sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if given is None else {"GLIBC_TUNABLES": given}
    command = [sys.executable, "-c", code, "a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *numbers, last = done.stdout.splitlines()
    assert (len(numbers), len(set(numbers))) == (2 if anew else 1, 1)
    assert last == f"{(TUNABLES if anew else given)!r} ['a b']"


def test_importing_the_library_loads_no_programs():
    code = "import ranjax, sys; ranjax.RAN, ranjax.RANCell, ranjax.linear_recurrence; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "tyro", "tokenizers", "matplotlib", "orbax.checkpoint.v1", "optax"} & set(loaded)


def test_the_state_that_validates_best_is_kept_and_tested(tmp_path, monkeypatch):
    """The second of three epochs, where a run went on after it."""
    (tmp_path / "text.txt").write_text(TEXT * 61)  # of 60, the validation text would be the test text
    config = settings(str(tmp_path / "text.txt"), tmp_path / "run", batch_size=40)
    corpus, losses, read, ended = load_corpus(config.dataset), iter([2.0, 1.0]), [], []

    def evaluated(params, ids):
        read.append(next(split for split in SPLITS if np.array_equal(ids, getattr(corpus, split))))
        nats = next(losses, None)
        if nats is None:  # of the test
            ended.append(jax.tree.map(np.array, params))
        return Evaluation(nats or 1.0, 10)

    monkeypatch.setattr("ranjax.evaluate.make_evaluator", lambda *_: evaluated)
    train.train(config)
    losses = iter([1.0])  # as good is not better
    train.train(dataclasses.replace(config, epochs=3, resume=True))
    assert read == ["valid", "valid", "test", "valid", "test"]
    for params in (*ended, load_run(config.directory).params):
        jax.tree.map(np.testing.assert_array_equal, params, ended[0])


def test_a_text_of_the_same_length_and_alphabet_does_not_match(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    other = tmp_path / "other.txt"
    other.write_text((TEXT * 60)[::-1])
    config = dataclasses.replace(load_config(tmp_path / "copy"), dataset=str(other), out=str(tmp_path / "copy"))
    save_config(config, tmp_path / "copy")
    with pytest.raises(UserError, match="the text of the data set is not the one"):
        train.train(dataclasses.replace(config, resume=True))


def test_bits_are_of_base_two():
    assert Evaluation(math.log(8), 1).bits == pytest.approx(3)
    assert "3.0000 bits per byte" in evaluate.report(Evaluation(math.log(8), 10), "byte")


def test_every_token_is_drawn_after_all_before_it(run):
    trained, greedy = load_run(run[0]), generate.Sampling(temperature=0)
    random = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), trained.params)
    for loaded in (trained, dataclasses.replace(trained, params=random)):
        prompt = loaded.vocabulary.encode("the cat s")
        ids = [*prompt.tolist(), *generate.generate(loaded, prompt, 20, greedy, seed=0)]
        logits, _ = loaded.model.apply({"params": loaded.params}, np.array([ids[:-1]]), deterministic=True)
        np.testing.assert_array_equal(ids[9:], jnp.argmax(logits[0, 8:], axis=-1))


def test_of_a_prompt_only_the_last_token_has_logits(run, monkeypatch):
    loaded, made, logits = load_run(run[0]), [], LanguageModel.logits
    monkeypatch.setattr(LanguageModel, "logits", lambda self, hidden: made.append(hidden.shape) or logits(self, hidden))
    list(generate.generate(loaded, [0] * 50, 3, generate.Sampling(), seed=0))
    assert max(math.prod(shape[:-1]) for shape in made) == 1


@pytest.mark.parametrize(
    ("prompt", "length", "message"),
    [
        ([1, 15], 3, "`prompt` must be whole numbers from 0 to 14, the model's; got int64 from 1 to 15"),
        ([-1], 3, "`prompt` must be whole numbers from 0 to 14, .* from -1 to -1"),
        ([[1, 2]], 3, r"`prompt` must be the ids of one text, \(tokens,\); got the shape \(1, 2\)"),
        ("cat", 3, "`prompt` must be whole numbers from 0 to 14, the model's; got 'cat'"),
        (["c", "a"], 3, r"`prompt` must be whole numbers from 0 to 14, the model's; got \['c', 'a'\]"),
        ([], 3, "`prompt` must have at least one id; got none"),
        ([1], -3, "`length` must be a whole number, at least 1; got -3"),
    ],
)
def test_a_prompt_that_is_not_the_models_is_refused_before_a_token_is_drawn(prompt, length, message, run):
    with pytest.raises(ValueError, match=message):
        generate.generate(load_run(run[0]), prompt, length, generate.Sampling(), seed=0)


def test_words_that_a_model_does_not_have_are_counted(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the <unk>\n" * 60)
    out = str(tmp_path / "run")
    train.train(settings(str(tmp_path), out, epochs=1))
    (tmp_path / "other.txt").write_text("a dog\n" * 40)
    capsys.readouterr()
    evaluate.main(["--checkpoint", out, "--dataset", str(tmp_path / "other.txt"), "--split", "train"])
    assert capsys.readouterr().out.endswith(" nats, 107 tokens, 71 of them <unk>\n")


def test_a_finished_run_that_is_read_again_keeps_the_device_it_was_trained_on(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy")
    elsewhere = {"device": "1 x NVIDIA H100", "date": "2020-01-01", "versions": {"jax": "0.0.1"}}
    (tmp_path / "copy" / "result.json").write_text(json.dumps(run[1] | elsewhere))
    config = dataclasses.replace(load_config(tmp_path / "copy"), out=str(tmp_path / "copy"), resume=True)
    again = train.train(config)
    assert again == run[1] | elsewhere | {"config": again["config"]}
    assert not again["config"]["resume"]
    longer = dataclasses.replace(config, epochs=4)
    assert train.train(longer)["date"] != "2020-01-01"
    for old in (json.dumps(run[1] | elsewhere), ""):  # of three epochs; cut short
        (tmp_path / "copy" / "result.json").write_text(old)
        assert train.train(longer)["date"] != "2020-01-01"


def test_draws_differ_from_token_to_token_and_from_seed_to_seed(run):
    loaded, any_token = load_run(run[0]), generate.Sampling(temperature=1e6)
    drawn = [list(generate.generate(loaded, [0], 40, any_token, seed)) for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert min(len(set(ids)) for ids in drawn) > 5


def test_a_second_text_is_not_compiled_for_again(run, caplog):
    jax.clear_caches()
    texts, compiled = [], []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            texts.append(list(generate.generate(load_run(run[0]), [0, 1], 5, generate.Sampling(0.7), seed=0)))
        compiled.append(any("Compiling jit(advance)" in record.getMessage() for record in caplog.records))
    assert texts[0] == texts[1]
    assert compiled == [True, False]


def test_the_flags_of_generate_reach_it(run, monkeypatch):
    asked = []

    def recorded(_, prompt, *rest):
        asked.append((prompt.tolist(), *rest))
        return iter(())

    monkeypatch.setattr(generate, "generate", recorded)
    flags = "--length 7 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 5"
    generate.main(["--checkpoint", str(run[0]), *flags.split()])
    line = load_run(run[0]).vocabulary.encode("\n").tolist()
    assert asked == [(line, 7, generate.Sampling(0.5, 3, 0.9), 5)]
    assert dataclasses.asdict(generate.Options("x")) == {
        "checkpoint": "x", "prompt": "", "length": 200, "temperature": 0.8, "top_k": None, "top_p": 1.0, "seed": 0
    }  # fmt: skip
    assert generate.prompt_ids(Characters("ab"), "").tolist() == [0]
    assert generate.prompt_ids(Words(("a", "<eos>")), "").tolist() == [1]


def test_the_speed_is_tokens_by_seconds(text, tmp_path):
    config = settings(text, tmp_path)
    zero = jnp.zeros(())
    state = step.TrainState({}, None, None, 30, 2, 1.0, 1, 0, 0, zero, jnp.array(2.0), jnp.array(10), 0.0)
    report = Report(tmp_path, config, 15, 0, 0)
    report._rows = [{"step": 15, "epoch": 1.0, "train_perplexity": 2.0, "valid_perplexity": 2.0}]
    result = report.result(load_corpus(text), state, Evaluation(1.0, 1))
    assert result["tokens_per_second"] == 10 * 4 * 7 / 2.0


def test_a_directory_that_is_no_run_is_not_to_go_on_with(text, tmp_path):
    with pytest.raises(UserError, match=r"exists and is left as it is\. Give another --out"):
        train.train(settings(text, tmp_path))


def test_what_the_system_refuses_is_one_line(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--dataset", text, "--out", str(tmp_path / ("n" * 300))])
    assert ended.value.code == 1
    assert re.fullmatch(r"error: .*: File name too long\.\n", capsys.readouterr().err)


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to write more bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a thread of orbax goes on
def test_arrays_that_the_system_refuses_are_an_oserror(tmp_path, caplog):
    numbers = {"a": np.random.default_rng(0).normal(size=100_000)}
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        Checkpoints(tmp_path).save("latest", 0, numbers)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert logging.getLogger("absl").level < logging.CRITICAL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_ends_a_run_with_one_message_and_loses_nothing(run, text, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "copy")
    config = dataclasses.replace(load_config(tmp_path / "copy"), out=str(tmp_path / "copy"), resume=True, epochs=4)
    save, before = Checkpoints.save, final_state(config, text)

    def full(*args):
        with files_of_at_most(1000):
            save(*args)

    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "save", full)
        with pytest.raises(UserError, match="checkpoints cannot be written: File too large"):
            train.train(config)
    assert_same(final_state(config, text), before)
    assert train.train(config)["test_tokens"] > 0


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (train, "save_config", "config.json"),
        (Report, "__init__", "metrics.jsonl"),
        (Report, "_row", "metrics.jsonl"),
        (Report, "result", "run"),
    ],
)
def test_a_disk_that_is_full_for_a_small_file_loses_nothing(run, tmp_path, monkeypatch, owner, name, file):
    shutil.copytree(run[0], tmp_path / "run")
    config = dataclasses.replace(load_config(tmp_path / "run"), out=str(tmp_path / "run"), resume=True, epochs=4)
    begun, write = (tmp_path / "run" / "metrics.jsonl").read_text(), getattr(owner, name)

    def full(*args, **options):
        with files_of_at_most(100):
            return write(*args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(owner, name, full)
        with pytest.raises(UserError, match=f"{file} cannot be written: File too large.*intact: --resume goes on"):
            train.train(config)
    assert load_config(tmp_path / "run").features == config.features
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(begun)
    assert not list((tmp_path / "run").glob(".*.new"))
    result = train.train(config)
    assert len(result["valid_perplexities"]) == 4
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))


def test_an_unfinished_run_of_another_program_is_left_as_it_is(text, tmp_path):
    other = tmp_path / f".run.{os.getpid()}"  # in containers many a program has the same number
    other.mkdir()
    train.train(settings(text, tmp_path / "run", epochs=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "run"]


def test_the_preset_that_help_calls_none_is_none():
    assert parse(["--preset", "None"]) == parse([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup", "500"], "--warmup is for --schedule cosine; got 500 with decay"),
        (["--preset", "ptb-small", "--schedule", "cosine", "--decay", "0.9"], "--decay is for .*; got 0.9 with cosine"),
        (["--schedule", "constant", "--decay-after", "2"], "--decay-after is for .* decay; got 2 with constant"),
    ],
)
def test_a_setting_that_the_schedule_does_not_read_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags)


def test_a_setting_of_the_schedule_is_taken(tmp_path):
    flags = ["--schedule", "cosine", "--warmup", "500", "--out", str(tmp_path)]
    save_config(parse(flags), tmp_path)
    assert parse([*flags, "--resume"]).warmup == parse(["--resume", "--out", str(tmp_path)]).warmup == 500
    assert parse(["--preset", "ptb-small", "--schedule", "cosine"]).decay == 0.5  # the preset's, not asked for


def test_a_thread_trains_without_signals(text, tmp_path):
    thread = threading.Thread(target=train.train, args=(settings(text, tmp_path / "run", epochs=1, batch_size=40),))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "result.json").exists()


def test_the_presets_are_the_papers_settings():
    """Dropout, rate, its factor and the epochs before it, epochs, steps, clipping, scale of the weights."""
    names = ["dropout", "learning_rate", "decay", "decay_after", "epochs", "steps", "clip", "init_scale"]
    assert {name: [getattr(preset, of) for of in names] for name, preset in PRESETS.items()} == {
        "ptb-small": [0.0, 1.0, 0.5, 4, 13, 20, 5.0, 0.1],
        "ptb-medium": [0.5, 1.0, 0.8, 6, 39, 35, 5.0, 0.05],
        "ptb-large": [0.65, 0.8, 1 / 1.15, 14, 55, 35, 10.0, 0.04],
        "text8": [0.4, 0.2, 1 / 1.03, 5, 500, 100, 10.0, 0.04],
    }


def test_a_run_goes_on_with_no_other_settings(tmp_path):
    config = Config(out=str(tmp_path))
    check_same(dataclasses.replace(config, epochs=9, data_dir="x", resume=True), config)
    for field in dataclasses.fields(Config):
        if field.name not in ("out", "resume", "data_dir", "epochs"):
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} "):
                check_same(dataclasses.replace(config, **{field.name: "another"}), config)


def test_a_folder_of_the_name_of_a_data_set_is_not_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("markov", "ptb", "copy-9"):
        (tmp_path / name).mkdir()
        assert normalised(Config(dataset=name)).dataset == name


def test_a_run_finds_its_data_set_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "data" / "text8").mkdir(parents=True)
    (tmp_path / "data" / "text8" / "text8").write_text("the cat sat on the mat " * 160)
    monkeypatch.chdir(tmp_path)
    result = train.train(settings("text8", "run", data_dir="data", epochs=1))
    monkeypatch.chdir("/")
    found, *_ = evaluate.evaluate_split(evaluate.Options(str(tmp_path / "run")))
    assert found.nats == result["test_nats"]
    with pytest.raises(UserError, match="ptb is read from local files only"):  # not from the folder of another
        evaluate.evaluate_split(evaluate.Options(str(tmp_path / "run"), dataset="ptb"))


def test_paths_may_begin_with_a_tilde(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pets.txt").write_text("the cat")
    config = normalised(Config(dataset="~/a.pets.txt", data_dir="~/d", out="~/r"))
    assert (config.dataset, config.data_dir) == (str(tmp_path / "a.pets.txt"), str(tmp_path / "d"))
    assert config.directory == tmp_path / "r"
    assert dataclasses.replace(config, out=None).directory.name == "a.pets-ran"
    (tmp_path / "run").symlink_to(run[0])
    found, *_ = evaluate.evaluate_split(evaluate.Options("~/run"))
    assert found.perplexity == run[1]["test_perplexity"]


def test_one_checkpoint_of_a_kind_is_kept(tmp_path):
    """And nothing of one whose saving was killed."""
    folder = tmp_path / "checkpoints" / "latest"
    for n in range(3):
        Checkpoints(tmp_path).save("latest", n, {"a": np.full(3, n)})
        (folder / f"{7 + n}.orbax-checkpoint-tmp" / "tree").mkdir(parents=True)
    Checkpoints(tmp_path).save("latest", 3, {"a": np.full(3, 3)})
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["3"]


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    """As by `evaluate` beside the training that it looks at."""
    kept, check, newer = Checkpoints(tmp_path), checkpoint._check_shapes, iter((2, 3))
    kept.save("best", 1, {"a": np.full(3, 1)})

    def replaced(*arguments):
        check(*arguments)
        for n in newer:
            return kept.save("best", n, {"a": np.full(3, n)})

    monkeypatch.setattr(checkpoint, "_check_shapes", replaced)
    np.testing.assert_array_equal(kept.load("best", {"a": np.zeros(3, int)})["a"], 3)


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    row = {"step": 1, "epoch": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 2, "ep')
    assert report._read_rows(tmp_path / "metrics.jsonl") == [row]


@pytest.mark.parametrize("line", ["5", '{"epoch": 1}', '{"step": 1, "ep'])
def test_a_damaged_line_before_the_last_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 1, "epoch": 0.5}\n')
    with pytest.raises(UserError, match=r"line 1 of .*metrics.jsonl must be a row; got"):
        report._read_rows(tmp_path / "metrics.jsonl")


def test_a_validation_that_is_not_finite_ends_the_run(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("ranjax.evaluate.make_evaluator", lambda *_: lambda *_: Evaluation(math.nan, 10))
    with pytest.raises(UserError, match="the validation loss is nan; no epoch before it was validated"):
        train.train(dataclasses.replace(pets, out=str(tmp_path / "run")))


def test_signals_are_handled_as_before_once_a_run_has_ended(pets, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train.train(dataclasses.replace(pets, out=str(tmp_path / "run")))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_gradient_that_is_not_finite_is_skipped_where_the_loss_is_finite(pets, monkeypatch):
    monkeypatch.setattr(lm, "cross_entropy", lambda logits, targets: jnp.sqrt(0 * logits[..., 0]))
    model, optimizer = step.build_model(pets, 19), step.make_optimizer(pets, 1)
    state = step.initial_state(model, optimizer, pets)
    after = step.make_step(model, optimizer, pets, 1)(state, jnp.zeros((4, 8), jnp.int32))
    assert (int(after.bad), float(after.loss)) == (1, 0)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(after.params))


def test_bytes_that_begin_no_character_are_written_while_the_text_goes_on():
    written, before = [], []

    def ids():
        for _ in range(20):
            before.append(len(written))
            yield 0

    generate.stream(Bytes((0xFF, 97)), ids(), written.append, "")
    assert before[-1] >= 1


class Clock:
    """Stands for `time`: every look at it is so many seconds after the one before."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def monotonic(self):
        self.now += self.seconds
        return self.now


def an_epoch(monkeypatch, seconds, windows, stop=None):
    """The state after an epoch of steps that do nothing, and at which of them it was saved."""
    stop = stop or loop.Interrupt()
    saved, told = [], types.SimpleNamespace(steps=0)

    def progress(state, steps, elapsed):
        told.steps += steps

    told.progress = progress
    monkeypatch.setattr(loop.Training, "save", lambda self, state: saved.append(int(state.step)))
    monkeypatch.setattr(loop, "time", Clock(seconds))
    zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
    state = step.TrainState({}, {}, (), count, count, zero, count, count, count, zero, zero, count, zero)
    run = loop.Training(None, told)

    def advance(state, _):
        assert stop.saved is None
        return state._replace(step=state.step + 1)

    return loop.Loop([run], advance, None, windows).epoch(state, stop), saved


def test_what_was_saved_before_an_epoch_is_not_all_there_is_in_it(monkeypatch):
    stop = loop.Interrupt(saved=0)
    an_epoch(monkeypatch, 1.0, 4, stop)
    assert stop.saved == 4


def test_a_second_signal_is_not_waited_for():
    told = []
    before = signal.signal(signal.SIGINT, lambda *_: told.append("the program's own"))
    try:
        with loop.interrupts([]) as stop:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["the program's own"]


def test_compilation_is_not_timed(monkeypatch):
    state, _ = an_epoch(monkeypatch, seconds=1.0, windows=4)
    assert (int(state.timed), float(state.seconds)) == (3, 3.0)


def test_a_long_epoch_is_saved_on_its_way(monkeypatch):
    _, saved = an_epoch(monkeypatch, seconds=30.0, windows=9)
    assert len(saved) > 2
    assert saved[-1] == 9


def test_speed_is_in_tokens(pets, tmp_path):
    told = Report(tmp_path, dataclasses.replace(pets, out=str(tmp_path)), 5, 0, 0)
    zero = jnp.zeros(())
    told.progress(step.TrainState({}, None, None, jnp.array(5), jnp.array(0), *[zero] * 8), 5, 2.0)
    assert told._rows[-1]["tokens_per_second"] == 5 * 4 * 7 / 2


def test_progress_is_that_of_the_epoch_and_skipped_steps_are_told(pets, tmp_path, capsys):
    told, zero = Report(tmp_path, dataclasses.replace(pets, epochs=3), 5, 0, 0), jnp.zeros(())
    state = step.TrainState({}, None, None, jnp.array(10), jnp.array(1), *[zero] * 8)
    told.progress(state, 5, 2.0)
    assert capsys.readouterr().out.startswith("epoch 2/3 100%: 70 tokens/s")
    told.epoch(state._replace(bad=jnp.array(2), seconds=jnp.array(90.0)), Evaluation(0.0, 1))
    assert capsys.readouterr().out.endswith("valid 1.00, 1.5 minutes of training, 2 steps skipped\n")


def test_the_picture_of_the_loss_is_over_epochs(tmp_path, monkeypatch):
    figures, blank = [], report.blank_figure
    monkeypatch.setattr(report, "blank_figure", lambda *size: figures.append(blank(*size)) or figures[0])
    rows = [{"step": 5 * n, "epoch": float(n), "train_perplexity": 9.0 - n, "valid_perplexity": 8.0} for n in (1, 2)]
    report.draw_loss(rows, 5, tmp_path / "loss.png")
    assert [line.get_xydata().tolist() for line in figures[0].axes[0].lines] == [[[1, 8], [2, 7]], [[1, 8], [2, 8]]]


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, [5]), (16.0, [1, 2, 3, 4, 5])])  # between looks at the clock
def test_a_row_comes_every_fifteen_seconds_and_at_the_end_of_an_epoch(seconds, steps, pets, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "time", Clock(seconds))
    told = Report(tmp_path, pets, 5, 0, 0)
    zero = jnp.zeros(())
    for at in range(1, 6):
        told.progress(step.TrainState({}, None, None, jnp.array(at), jnp.array(0), *[zero] * 8), 1, 1.0)
    assert [row["step"] for row in told._rows] == steps


@pytest.mark.parametrize("solver", ["fixed_point", "newton"])
def test_solvers_that_iterate_are_not_trained_side_by_side(solver, pets, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda config: config.seed)  # one alone
    gates = "diagonal" if solver == "newton" else "recurrent"
    both = [
        dataclasses.replace(pets, solver=solver, gates=gates, seed=seed, out=str(tmp_path / str(seed)))
        for seed in (3, 4)
    ]
    assert train.train_together(both) == [3, 4]
