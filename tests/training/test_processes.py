"""A run of two processes is that of one: the same text, the same losses, one directory. In processes of their own."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
from small_runs import command

from ranjax.errors import UserError
from ranjax.training.flags import parse_cluster

LIMIT = 120  # seconds that a test waits for a process


@contextmanager
def processes(*flags_of_each):
    """The program, once for each of these flags, all of them in one cluster; killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"127.0.0.1:{free.getsockname()[1]}"
    number, environment = len(flags_of_each), os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    cluster = ("--distributed", "--coordinator", at, "--processes", number, "--process")
    started = [
        subprocess.Popen(
            command("train", *flags, *(() if "--mesh" in flags else ("--mesh", f"data={number}")), *cluster, n),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n, flags in enumerate(flags_of_each)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()


def ended(process):
    """The exit code, and what the process has said."""
    said = process.communicate(timeout=LIMIT)
    return process.returncode, *said


PLAIN = "--block", "plain", "--schedule", "decay"


def flags(text, out, *more):
    return (
        "--dataset",
        text,
        "--out",
        out,
        "--features",
        8,
        "--layers",
        1,
        "--batch-size",
        4,
        "--steps",
        7,
        *PLAIN,
        *more,
    )


def begun(out, epochs):
    """Waits until a run has been validated so many times."""
    limit, path = time.monotonic() + LIMIT, out / "metrics.jsonl"
    while not path.exists() or path.read_text().count("valid_perplexity") < epochs:
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.parametrize(("mesh", "axes"), [("data=2", "data 2"), ("data=1,model=2", "model 2")])
def test_two_processes_equal_one(mesh, axes, pets_text, pets_run, tmp_path):
    """The settings of the run that one process has trained; only the first writes and says anything."""
    config, one = pets_run
    more = "--epochs", config.epochs, "--learning-rate", config.learning_rate, "--mesh", mesh
    with processes(*[flags(pets_text, tmp_path / "run", *more)] * 2) as both:
        codes, outputs, errors = zip(*map(ended, both))
    assert codes == (0, 0), errors
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["devices"] == 2
    assert found["valid_perplexities"] == pytest.approx(one["valid_perplexities"], rel=1e-4)
    assert found["test_perplexity"] == pytest.approx(one["test_perplexity"], rel=1e-4)
    assert f"it runs on 2 of 2 devices: {axes}." in outputs[0]
    assert "test: perplexity" in outputs[0]
    assert "perplexity" not in outputs[1]


def test_another_number_of_processes_goes_on(pets_text, tmp_path):
    """Both stop at one step, whichever of them has the signal; a process that is killed takes the other with it."""
    out = tmp_path / "run"
    with processes(*[flags(pets_text, out, "--epochs", 10_000)] * 2) as both:
        begun(out, 1)
        both[1].send_signal(signal.SIGTERM)
        stopped = [ended(one) for one in both]
    assert [code for code, *_ in stopped] == [143, 143], stopped
    step = int(re.search(r"Stopped after step (\d+), saved", stopped[0][1])[1])

    with processes(flags(pets_text, out, "--epochs", 10_000, "--resume")) as [alone]:
        begun(out, 3)
        alone.kill()
    with processes(*[flags(pets_text, out, "--epochs", 10_000, "--resume")] * 2) as both:
        begun(out, 5)
        both[0].kill()  # the first: it is the one that the others are told by
        code, _, _ = ended(both[1])
        assert code not in (0, None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "valid_perplexity" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] > step


def test_processes_with_other_settings_are_refused(pets_text, tmp_path):
    out = tmp_path / "run"
    with processes(flags(pets_text, out), flags(pets_text, out, "--seed", 5)) as both:
        found = [ended(one) for one in both]
    for code, _, error in found:
        assert code == 1
        assert "error: processes 1 have other settings, or another text, than process 0." in error
        assert "Traceback" not in error
    assert not out.exists()


def test_an_error_in_one_process_ends_all(pets_text, tmp_path):
    """Whatever it is: what the process says is the message, and the other does not wait for ever."""
    with processes(flags(pets_text, tmp_path / "run"), flags(tmp_path / "none.txt", tmp_path / "run")) as both:
        first, second = map(ended, both)
    assert second[0] == 1
    assert "none.txt" in second[2]
    assert first[0] not in (0, None)
    assert not (tmp_path / "run").exists()


def test_what_the_first_refuses_ends_all(pets_text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with processes(*[flags(pets_text, tmp_path / "run")] * 2) as both:
        first, second = map(ended, both)
    assert (first[0], second[0]) == (1, 1)
    assert f"error: --out {tmp_path / 'run'} exists and is left unchanged." in first[2]
    assert "error: process 0 has refused to go on; it says why." in second[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--coordinator localhost:1 --processes 2 --process 0", "all together, with --distributed"),
        ("--distributed --processes 2", "all together, with --distributed"),
        ("--distributed --coordinator localhost:1 --processes 2 --process 2", "from 0 to --processes - 1, 1; got 2"),
    ],
)
def test_a_process_that_is_not_one_of_them(given, message):
    with pytest.raises(UserError, match=message):
        parse_cluster(given.split())
