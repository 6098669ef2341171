"""Trackers: what they are given, and that a run does not depend on them."""

import json
import os
import re
import struct
import subprocess
import sys

import pytest
from small_runs import command, metrics_rows, resumed, settings, train_until, windows_of, with_startup_code

from ranjax.errors import UserError
from ranjax.train import main
from ranjax.training import report, track
from ranjax.training.config import load_config
from ranjax.training.loop import Loop
from ranjax.training.run import train
from ranjax.training.track import Tracking

pytestmark = pytest.mark.usefixtures("_often")


@pytest.fixture
def _often(monkeypatch):
    """A row for every burst of steps, so that there is something to compute again."""
    monkeypatch.setattr(report, "LOG_SECONDS", -1.0)


def events(directory):
    """What the event files of a run hold, read by the format they have: (step, tag, value), in their order."""
    from tensorboardX.proto.event_pb2 import Event

    found, texts = [], []
    for path in sorted((directory / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.append((event.step, value.tag, value.simple_value))
                else:
                    texts.append((value.tag, value.tensor.string_val[0].decode()))
    return found, texts


def assert_tracked(config, scalars, before=()):
    """Each figure of the rows is there once: of those that a first process had logged, and of all later steps."""
    rows = [one for one in scalars if not one[1].startswith("result/")]
    assert len({one[:2] for one in rows}) == len(rows)
    reached = max((row["step"] for row in before), default=-1)
    logged = [*before, *(row for row in metrics_rows(config) if row["step"] >= reached)]
    expected = {(row["step"], name): row[name] for row in logged for name in row.keys() - {"step", "crc32"}}
    measured = "tokens_per_second", "training_seconds"
    assert {one[:2] for one in rows} == expected.keys()
    for step, tag, value in rows:
        assert tag in measured or value == pytest.approx(expected[step, tag], rel=1e-6)
    assert [one[0] for one in rows] == sorted(one[0] for one in rows)


def test_tensorboard_has_the_rows_the_settings_and_the_result(pets_text, tmp_path):
    config = settings(pets_text, tmp_path / "run", track=("tensorboard",))
    result = train(config)
    scalars, [(tag, text)] = events(config.directory)
    assert_tracked(config, scalars)
    assert tag == "config/text_summary"
    assert json.loads(text)["batch_size"] == 4
    last = {tag: value for step, tag, value in scalars if step == 2 * windows_of(config)}
    assert last["result/test_perplexity"] == pytest.approx(result["test_perplexity"], rel=1e-6)
    assert last["result/parameters"] == result["parameters"]
    assert load_config(config.directory).track == ("tensorboard",)


@pytest.mark.parametrize("when", ["in an epoch", "after a validation"])
def test_a_run_that_goes_on_is_tracked_without_a_step_twice(when, pets_text, tmp_path, monkeypatch):
    """Here with rows beyond the state that was saved, which are computed again."""
    config = settings(pets_text, tmp_path / "run", track=("tensorboard",))
    check, save, at = Loop.check, Loop.save, windows_of(config)

    def killed(self, state):
        check(self, state)
        if when == "in an epoch" and int(state.step) > at + 20:
            raise MemoryError

    def killed_saving(self, state):
        if when == "after a validation" and int(state.epoch) == 1:
            raise MemoryError
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "check", killed)
        patch.setattr(Loop, "save", killed_saving)
        with pytest.raises(MemoryError):
            train(config)
    rows = metrics_rows(config)
    train(resumed(config))
    scalars, texts = events(config.directory)
    assert_tracked(config, scalars, rows)
    assert len(texts) == 2
    before = scalars, texts
    train(resumed(config))  # a finished run is only read again
    assert events(config.directory) == before


def test_a_run_goes_on_with_its_trackers_or_with_others(pets_text, tmp_path, monkeypatch):
    config = settings(pets_text, tmp_path / "run", track=("tensorboard",))
    train_until(lambda state: int(state.step) > 20, config, monkeypatch)
    main(["--dataset", str(pets_text), "--out", config.out, "--resume"])
    assert_tracked(config, events(config.directory)[0])
    main(["--dataset", str(pets_text), "--out", config.out, "--resume", "--epochs", "3", "--track"])
    assert metrics_rows(config)[-1]["epoch"] == 3
    assert max(step for step, *_ in events(config.directory)[0]) == 2 * windows_of(config)


def test_a_full_disk_ends_the_tracker_and_not_the_training(pets_text, tmp_path, monkeypatch, capsys):
    config = settings(pets_text, tmp_path / "run", track=("tensorboard",))
    log, calls = track.TensorBoard.log, []

    def filled(self, step, values):
        calls.append(step)
        if len(calls) == 3:
            with open("/dev/full", "wb") as full:
                os.dup2(full.fileno(), self._writer._py_recordio_writer._writer.fileno())
        log(self, step, values)

    monkeypatch.setattr(track.TensorBoard, "log", filled)
    result = train(config)
    said = capsys.readouterr().err
    assert said == (
        "warning: --track tensorboard has failed, and the run goes on without it: [Errno 28] No space left on device\n"
    )
    assert len(calls) == 3
    assert len(result["valid_perplexities"]) == 2
    assert metrics_rows(config)[-1]["epoch"] == 2


def test_a_tracker_that_cannot_begin_does_not_end_the_training(pets_text, tmp_path, monkeypatch, capsys):
    config = settings(pets_text, tmp_path / "run", track=("tensorboard",), epochs=1)
    monkeypatch.setattr(track.Path, "mkdir", refusing(track.Path.mkdir, "tensorboard"))
    assert train(config)["test_perplexity"]
    assert re.fullmatch(r"warning: --track tensorboard has failed, .*Read-only.*\n", capsys.readouterr().err)


def refusing(mkdir, name):
    def refused(self, *args, **how):
        if self.name == name:
            raise OSError(30, "Read-only file system")
        return mkdir(self, *args, **how)

    return refused


def test_a_run_whose_identity_is_damaged_goes_on_without_trackers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track, "TRACKERS", {"tensorboard": lambda *_: pytest.fail("it was opened")})
    (tmp_path / "track.json").write_text("{}")
    tracking = Tracking(["tensorboard"], tmp_path, {}, [])
    tracking.open()
    tracking.row({"step": 1, "epoch": 0.5})
    tracking.close()
    assert re.fullmatch(
        r"warning: the run goes on without --track: .*track\.json is damaged.*\n", capsys.readouterr().err
    )


class Recorded:
    """A tracker that notes what it is given."""

    def __init__(self, directory, identity, config):
        self.notes = [(directory.name, config)]

    def log(self, step, values):
        self.notes.append((step, values))

    def close(self, step, result):
        self.notes.append(("closed", step, result))


def test_several_trackers_get_the_same_and_one_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    class Failing(Recorded):
        def log(self, step, values):
            if step == 2:
                raise ConnectionResetError("the network\nis gone")
            super().log(step, values)

    made = []
    kinds = {"tensorboard": Recorded, "trackio": Failing}
    made_by = {name: lambda *a, kind=kind: made.append(kind(*a)) or made[-1] for name, kind in kinds.items()}
    monkeypatch.setattr(track, "TRACKERS", made_by)
    (tmp_path / "run").mkdir()
    tracking = Tracking(["tensorboard", "trackio", "tensorboard"], tmp_path / "run", {"seed": 1}, [])
    tracking.open()
    for step in (1, 2, 3):
        tracking.row({"step": step, "epoch": step / 2})
    tracking.row({"step": 3, "epoch": 1.5, "valid_perplexity": 2.0})
    tracking.close({"test_perplexity": 3.0, "device": "x", "tokens_per_second": None})
    whole, failed = (one.notes for one in made)
    begun = [("run", {"seed": 1}), (1, {"epoch": 0.5})]
    assert whole == [
        *begun, (2, {"epoch": 1.0}), (3, {"epoch": 1.5}), (3, {"valid_perplexity": 2.0}),
        ("closed", 3, {"test_perplexity": 3.0}),
    ]  # fmt: skip
    assert failed == begun
    left = "warning: --track trackio has failed, and the run goes on without it: the network\n"
    assert capsys.readouterr().err == left


def test_what_is_wrong_with_a_tracker_itself_is_not_hidden(tmp_path, monkeypatch):
    class Wrong(Recorded):
        def log(self, step, values):
            raise TypeError

    monkeypatch.setattr(track, "TRACKERS", {"tensorboard": Wrong})
    tracking = Tracking(["tensorboard"], tmp_path, {}, [])
    tracking.open()
    with pytest.raises(TypeError):
        tracking.row({"step": 1, "epoch": 0.5})


HIDING = """
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorboardX", "wandb", "trackio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import sys
sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize(("name", "package"), track.PACKAGES.items())
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(name, package, pets_text, tmp_path):
    flags = ["--dataset", pets_text, "--features", "8", "--out", tmp_path / "run", "--track", name]
    environment = with_startup_code(tmp_path, HIDING)
    ended = subprocess.run(command("train", *flags), env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"error: --track {name} needs {package}, which is not installed. Install it: pip install 'ranjax[{name}]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_other_trackers_are_refused(pets_text, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--track must be any of tensorboard, wandb, trackio; got \('mlflow',\)"):
        train(settings(pets_text, tmp_path / "run", track=("mlflow",)))
    with pytest.raises(UserError, match="--track must be any of tensorboard, wandb, trackio; got 'wandb'"):
        train(settings(pets_text, tmp_path / "run", track="wandb"))
    with pytest.raises(SystemExit, match="1"):
        main(["--out", str(tmp_path / "run"), "--track", "mlflow"])
    assert "--track" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wandb_has_the_rows_offline_and_the_run_goes_on_under_its_name(pets_text, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'ranjax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = settings(pets_text, tmp_path / "run", track=("wandb",))
    train_until(lambda state: int(state.step) > 20, config, monkeypatch)
    train(resumed(config))
    identity = json.loads((config.directory / "track.json").read_text())["identity"]
    folders = [path for path in (config.directory / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert all(path.name.endswith(identity) for path in folders)
    found = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    for name in ("valid_perplexity", "test_perplexity", "batch_size"):
        assert name.encode() in found


def test_trackio_has_each_step_once(pets_text, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'ranjax[trackio]'")
    config = settings(pets_text, tmp_path / "run", track=("trackio",))
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}  # which is read when it is imported
    flags = ["--dataset", pets_text, "--features", "8", "--layers", "1", "--batch-size", "4", "--steps", "7"]
    for epochs in ("1", "2"):
        given = [*flags, "--out", config.out, "--track", "trackio", "--resume", "auto", "--epochs", epochs]
        subprocess.run(command("train", *given), env=environment, check=True, capture_output=True)
    code = "from trackio.sqlite_storage import SQLiteStorage as S; import json; "
    code += "print(json.dumps([S.get_logs('ranjax', run) for run in S.get_runs('ranjax')]))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout
    [logged] = json.loads(printed.splitlines()[-1])
    scalars = [(row["step"], name, row[name]) for row in logged for name in row.keys() - {"step", "timestamp"}]
    assert_tracked(config, scalars)
