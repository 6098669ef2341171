"""The trace of some training steps."""

import dataclasses
import gzip
import json

import pytest
from small_runs import metrics_rows, settings

from ranjax.errors import UserError
from ranjax.training import profile
from ranjax.training.config import load_config
from ranjax.training.run import train


def traced_steps(folder):
    """The numbers of the steps in a trace."""
    [path] = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]


@pytest.mark.parametrize("where", ["profile", "run/profile"])
def test_five_steps_are_traced_after_the_warm_up(where, pets_text, tmp_path, capsys):
    config = settings(pets_text, tmp_path / "run", epochs=1, profile_dir=str(tmp_path / where))
    train(config)
    assert traced_steps(tmp_path / where) == [10, 11, 12, 13, 14]
    assert list((tmp_path / where).rglob("*.xplane.pb"))
    assert load_config(config.directory).profile_dir is None
    assert capsys.readouterr().err == ""


def test_a_trace_changes_nothing_of_a_training(pets_run, pets_text, tmp_path):
    config = settings(pets_text, tmp_path / "run", epochs=3, learning_rate=0.02, profile_dir=str(tmp_path / "profile"))
    assert train(config)["valid_perplexities"] == pets_run[1]["valid_perplexities"]


def test_a_directory_with_something_in_it_is_refused_before_anything_is_written(pets_text, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--profile-dir .*kept exists and is not empty\. Give another one"):
        train(settings(pets_text, tmp_path / "run", profile_dir=str(tmp_path / "kept")))
    with pytest.raises(UserError, match=r"--profile-dir .*notes.txt cannot be written: File exists"):
        train(settings(pets_text, tmp_path / "run", profile_dir=str(tmp_path / "kept" / "notes.txt")))
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "notes.txt"]


def test_the_same_command_goes_on_without_a_second_trace(pets_text, tmp_path, capsys):
    config = settings(pets_text, tmp_path / "run", epochs=1, resume="auto", profile_dir=str(tmp_path / "profile"))
    train(config)
    before = sorted((tmp_path / "profile").rglob("*"))
    train(dataclasses.replace(config, epochs=2))
    assert metrics_rows(config)[-1]["epoch"] == 2
    assert sorted((tmp_path / "profile").rglob("*")) == before
    assert capsys.readouterr().err.endswith("is left unchanged: the run goes on without a trace.\n")


def test_a_training_that_ends_before_the_trace_says_so(pets_text, tmp_path, capsys):
    train(settings(pets_text, tmp_path / "run", epochs=1, steps=99, profile_dir=str(tmp_path / "profile")))
    assert "it begins after 10 steps of training" in capsys.readouterr().err
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_training_that_ends_within_the_trace_keeps_what_there_is(pets_text, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "WARM_UP", 6)
    train(settings(pets_text, tmp_path / "run", epochs=1, steps=99, profile_dir=str(tmp_path / "profile")))
    assert traced_steps(tmp_path / "profile") == [6, 7]


def test_a_trace_that_cannot_be_written_does_not_end_the_training(pets_text, tmp_path, monkeypatch, capsys):
    start = profile.jax.profiler.start_trace

    def replaced(folder):
        start(folder)
        (tmp_path / "profile").rmdir()
        (tmp_path / "profile").write_text("a file")

    monkeypatch.setattr(profile.jax.profiler, "start_trace", replaced)
    result = train(settings(pets_text, tmp_path / "run", epochs=1, profile_dir=str(tmp_path / "profile")))
    assert result["test_perplexity"]
    assert "there is no trace in --profile-dir" in capsys.readouterr().err
