"""The program `train`: flags, messages, exit codes, signals."""

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from small_runs import command, position, run_program, settings, with_startup_code

from ranjax import train
from ranjax.cli import SIGNALS
from ranjax.data import load_corpus
from ranjax.training.config import PRESETS, Config, load_config


def test_the_names_of_the_program_are_those_of_training():
    from ranjax.training import run

    assert (train.Config, train.PRESETS, train.train) == (Config, PRESETS, run.train)
    with pytest.raises(AttributeError, match=r"module 'ranjax\.train' has no attribute 'nonsense'"):
        _ = train.nonsense


def test_an_error_is_one_message_and_exit_code_1(tmp_path):
    ended = run_program("train", "--dataset", "nowhere", "--out", tmp_path / "x")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: there is no data set or path 'nowhere'")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "{run}"], "pets exists and is left unchanged"),
        (["--resume"], "runs/python-docs-ran is not a run"),
        (["--resume", "--preset", "ptb-small"], "runs/ptb-ran is not a run"),
        (["--resume", "--out", "{tmp}/none"], "none is not a run: it has no config.json"),
        (["--resume", "--out", "{run}", "--features", "9"], "another configuration .*--features"),
        (["--resume", "auto", "--out", "{run}", "--features", "9"], "another configuration .*--features"),
        (["--layers", "0"], "--layers must be a whole number, at least 1 and at most 1,000; got 0"),
        (["--learning-rate", "0"], "--learning-rate must be finite and above 0; got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be finite and above 0; got inf"),
        (["--clip", "0"], "--clip must be finite and above 0; got 0"),
        (["--optimizer", "schedule_free"], "--optimizer schedule_free takes the place of a schedule; got it with .*"),
        (
            ["--softmax", "adaptive"],
            "--softmax adaptive needs words, .* of the kind character. Use --tokenizer word .*",
        ),
        (["--softmax", "adaptive", "--tokenizer", "word", "--cutoffs", "9", "3"], r"--cutoffs must be .* got \(9, 3\)"),
        (["--dropout", "2"], r"--dropout must be in \[0, 1\); got 2"),
        (
            ["--solver", "associative", "--gates", "recurrent"],
            "--solver must be .* got '.*' with --gates recurrent",
        ),
        (["--gates", "diagonal", "--projection", "3", "--no-tie"], "--projection cannot go with --gates diagonal"),
        (["--layers", "2", "--features", "4", "5", "6"], "--features must be one size"),
        (["--batch-size", "4000"], "fewer than one batch"),
        (["--embedding", "3", "--block", "plain"], "--tie needs the embedding .* got --embedding 3"),
        (["--dataset", "copy-8"], "the distance of the task copy must be 9 to 2048; got 'copy-8'"),
        (["--seed", "2147483648"], r"--seed must be a whole number, at least 0 and below 2\*\*31"),
        (["--out", "{text}/run"], "--out .*pets.txt/run cannot be written: Not a dir"),
        (["--out", "{long}"], r"{long} cannot be .*written: File name too long\."),
    ],
)
def test_bad_input_is_one_message(flags, message, pets_run, pets_text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"run": pets_run[0].directory, "tmp": tmp_path, "text": pets_text, "long": "n" * 300}
    dataset = [] if {"--preset", "--resume"} & set(flags) else ["--dataset", str(pets_text)]
    before = sorted(path.stat().st_mtime_ns for path in pets_run[0].directory.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        train.main([*dataset, *(flag.format(**places) for flag in flags)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message.replace('{long}', places['long'])}.*\n", error), error
    assert sorted(path.stat().st_mtime_ns for path in pets_run[0].directory.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


# Finds no package of the list in its first line; what imports one fails as if it were not installed.
HIDING = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import sys
sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("tyro", []),
        ("optax", []),
        ("filelock", []),
        ("rich", []),
        ("tokenizers", ["--tokenizer", "bpe"]),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(package, flags, pets_text, tmp_path):
    environment = with_startup_code(tmp_path, f"packages = {[package]}" + HIDING)
    flags = [*flags, "--dataset", pets_text, "--features", "4", "--out", tmp_path / "run"]
    ended = subprocess.run(command("train", *flags), env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("Install it: pip install 'ranjax[train]'\n"), ended.stderr
    assert re.fullmatch(rf"error: {package}[\w.]* is not installed, which the programs need\. .*\n", ended.stderr)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["sitecustomize.py"]


# A process begun in the background of a shell ignores Ctrl-C; these must not. Waits for ever where JAX is imported.
INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
WAITING = (
    INTERRUPTIBLE
    + """
class Waiting:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print("importing", flush=True)
            signal.pause()

import sys
sys.meta_path.insert(0, Waiting())
"""
)


@contextmanager
def started(out, text, folder, code):
    """A program that trains for long."""
    flags = ["--dataset", text, "--features", "8", "--layers", "1", "--batch-size", "2", "--epochs", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = with_startup_code(folder, code)
    environment.pop("XLA_FLAGS", None)  # which a process of its own tries first
    with subprocess.Popen(command("train", *flags, "--out", out), env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()  # where a test has failed


def test_ctrl_c_during_the_imports_ends_the_program_without_a_word(pets_text, tmp_path):
    out = tmp_path / "run"
    with started(out, pets_text, tmp_path, WAITING) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)
    assert output == ("", "")
    assert process.returncode == -signal.SIGINT  # 130 in a shell
    assert not out.exists()


def wait_for_compilation(process, out):
    """It begins as soon as the run's directory is there."""
    deadline = time.monotonic() + 120
    while not out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_steps(process, out):
    assert " parameters." in process.stdout.readline()
    assert process.stdout.readline().startswith("a step takes ")
    assert process.stdout.readline().startswith("epoch 1/")


@pytest.mark.parametrize(
    ("wait", "number"),
    [(wait_for_compilation, signal.SIGINT), *((wait_for_steps, number) for number in SIGNALS)],
)
def test_a_signal_during_training_saves_the_run_and_says_how_to_resume(wait, number, pets_text, tmp_path):
    out = tmp_path / "run"
    with started(out, pets_text, tmp_path, INTERRUPTIBLE) as process:
        wait(process, out)
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
    assert error == ""
    assert process.returncode == 128 + number
    assert output.endswith(f"Go on with: python -m ranjax.train --out {out} --resume\n")
    stopped = int(re.search(r"Stopped after step (\d+), saved", output)[1])
    assert position(load_config(out))[0] == stopped > 0


def test_the_program_trains_with_the_settings_of_its_flags(pets_text, tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--features 8 --layers 1 --batch-size 40 --steps 7 --epochs 1 --mesh data=1"
    flags += " --block plain --schedule decay --learning-rate 2e-3"
    train.main(["--dataset", str(pets_text), "--out", str(out), *flags.split()])
    assert load_config(out) == settings(pets_text, out, batch_size=40, epochs=1)
    *_, last = capsys.readouterr().out.splitlines()
    tokens = len(load_corpus(pets_text).test) - 1
    assert re.fullmatch(rf"test: perplexity .* bits per character, .* nats, {tokens} tokens; saved in {out}", last)


def test_help_is_quick():
    def seconds():
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "ranjax.train", "--help"], check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - began

    assert min(seconds() for _ in range(3)) < 1.5


def test_the_program_stops_by_a_signal_without_a_standard_output(pets_text, tmp_path):
    """As in a job that closes it."""
    out = tmp_path / "run"
    flags = ["--dataset", pets_text, "--features", "8", "--layers", "1", "--epochs", "100000", "--out", out]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command("train", *flags)]
    with subprocess.Popen(shell, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_compilation(process, out)
            process.terminate()
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()  # where the test has failed
    assert (process.returncode, error) == (143, "")
    assert position(load_config(out))[0] > 0
