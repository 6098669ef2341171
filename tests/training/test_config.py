"""Settings: presets, allowed values, what is saved of them."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from small_runs import resumed, settings

from ranjax.errors import UserError
from ranjax.saved import write_sealed
from ranjax.training.config import (
    PRESETS,
    RECIPES,
    Config,
    Preset,
    check,
    check_same,
    load_config,
    normalised,
    save_config,
)


def test_cutoffs_are_kept_and_resumed_with(tmp_path):
    given = Config(dataset="x", out=str(tmp_path), softmax="adaptive", cutoffs=(np.int64(5), 9))
    for cutoffs in (given.cutoffs, [5, 9]):
        config = normalised(dataclasses.replace(given, cutoffs=cutoffs))
        assert config.cutoffs == (5, 9)
        save_config(config, tmp_path)
        assert load_config(tmp_path) == config
        check_same(config, load_config(tmp_path))


def test_every_preset_is_a_choice_of_the_flag():
    assert get_args(Preset) == tuple(PRESETS)


def test_presets_are_the_settings_of_the_papers():
    """Dropout, rate, its factor and the epochs before it, epochs, steps, clipping, scale of the weights."""
    assert PRESETS["awd"].weight_decay * PRESETS["awd"].learning_rate == pytest.approx(30 * 1.2e-6)  # as theirs
    names = ["dropout", "learning_rate", "decay", "decay_after", "epochs", "steps", "clip", "init_scale"]
    assert {name: [getattr(preset, of) for of in names] for name, preset in PRESETS.items()} == {
        "ptb-small": [0.0, 1.0, 0.5, 4, 13, 20, 5.0, 0.1],
        "ptb-medium": [0.5, 1.0, 0.8, 6, 39, 35, 5.0, 0.05],
        "ptb-large": [0.65, 0.8, 1 / 1.15, 14, 55, 35, 10.0, 0.04],
        "text8": [0.4, 0.2, 1 / 1.03, 5, 500, 100, 10.0, 0.04],
        "awd": [0.25, 30 / 70, 0.5, 1, 500, 70, 0.25 * 70, None],
    }


@pytest.mark.parametrize("config", [Config(), *PRESETS.values(), *RECIPES.values()])
def test_defaults_and_presets_pass_the_checks_and_are_saved_whole(config, tmp_path):
    config = dataclasses.replace(config, out=str(tmp_path))
    check(config)
    save_config(resumed(config), tmp_path)  # a run is not "resumed" by being loaded
    assert load_config(tmp_path) == normalised(config) == normalised(normalised(config))


SIZE = "a whole number, at least 1 and below 2**31"
COUNT = "a whole number, at least 0 and below 2**31"
SIZES = "one or more whole numbers, each at least 1 and below 2**31"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "--optimizer must be one of sgd, adamw, muon, schedule_free; got 'adam'"),
        ({"schedule": "linear"}, "--schedule must be one of constant, cosine, decay; got 'linear'"),
        ({"tokenizer": "words"}, "--tokenizer must be one of word, character, byte, bpe, None; got 'words'"),
        ({"tie": "no"}, "--tie must be one of True, False; got 'no'"),
        ({"resume": "x"}, "--resume must be one of True, False, auto; got 'x'"),
        ({"resume": 1}, "--resume must be one of True, False, auto; got 1"),
        ({"tie": 1}, "--tie must be one of True, False; got 1"),
        ({"dataset": None}, "--dataset must be a name or a path; got None"),
        ({"dataset": ""}, "--dataset must be a name or a path; got ''"),
        ({"data_dir": 5}, "--data-dir must be a path; got 5"),
        ({"data_dir": "a\0b"}, "--data-dir must be a path; got 'a\\x00b'"),
        ({"out": ""}, "--out must be a path; got ''"),
        ({"seed": -5}, f"--seed must be {COUNT}; got -5"),
        ({"seed": 0.0}, f"--seed must be {COUNT}; got 0.0"),
        ({"decay_after": 1.5}, f"--decay-after must be {COUNT}; got 1.5"),
        ({"features": np.array([8, 8])}, f"--features must be {SIZES}; got array"),
        ({"features": (8, 10**12)}, f"--features must be {SIZES}; got (8, 1000000000000)"),
        ({"features": ()}, f"--features must be {SIZES}; got ()"),
        ({"block": "highway"}, "--block must be one of plain, residual; got 'highway'"),
        ({"conv_width": 0}, f"--conv-width must be {SIZE}; got 0"),
        ({"expansion": 0}, "--expansion must be finite and above 0; got 0"),
        ({"gate_init": "ones"}, "--gate-init must be one of zeros, half-lives, half-lives-variance; got 'ones'"),
        ({"half_life": 0.5}, "--half-life must be finite and at least 1; got 0.5"),
        ({"streams": 0}, f"--streams must be {SIZE}; got 0"),
        ({"layers": True}, "--layers must be a whole number, at least 1 and at most 1,000; got True"),
        ({"layers": 1001}, "--layers must be a whole number, at least 1 and at most 1,000; got 1001"),
        ({"features": (8,) * 1001}, "--features must be at most 1,000 sizes; got (8, 8,"),
        ({"learning_rate": True}, "--learning-rate must be finite and above 0; got True"),
        (
            {"learning_rate": 1e-320},
            "--learning-rate must be between 1.2e-38 and 3.4e38, the range of float32; got 1e-320",
        ),
        ({"clip": 1e308}, "--clip must be between 1.2e-38 and 3.4e38, the range of float32; got 1e+308"),
        ({"clip": 1e-50}, "--clip must be between 1.2e-38 and 3.4e38, the range of float32; got 1e-50"),
        ({"decay": 1e300}, "--decay must be between 1.2e-38 and 3.4e38, the range of float32; got 1e+300"),
        (
            {"weight_decay": 1e308},
            "--weight-decay must be between 1.2e-38 and 3.4e38, the range of float32; got 1e+308",
        ),
        ({"weight_decay": -1e-320}, "--weight-decay must be finite and at least 0; got -1e-320"),
        ({"dropout": 1 - 1e-12}, "--dropout must be in [0, 1); got 0.99"),
        ({"dropout": False}, "--dropout must be in [0, 1); got False"),
        ({"dropout": 1.0}, "--dropout must be in [0, 1); got 1.0"),
        ({"dropout": -0.1}, "--dropout must be in [0, 1); got -0.1"),
        ({"weight_decay": -1.0}, "--weight-decay must be finite and at least 0; got -1.0"),
        ({"decay": 0.0}, "--decay must be finite and above 0; got 0.0"),
        ({"init_scale": 0.0}, "--init-scale must be finite and above 0; got 0.0"),
        ({"learning_rate": 10**400}, "--learning-rate must be finite and above 0; got 1000"),
        ({"learning_rate": math.nan}, "--learning-rate must be finite and above 0; got nan"),
        *(({name: math.inf}, "must be finite and ") for name in ("clip", "decay", "init_scale", "weight_decay")),
        *(({name: 2**31}, f"below 2**31; got {2**31}") for name in ("epochs", "embedding", "decay_after")),
        ({"accumulate": 3}, "--accumulate must divide --batch-size 4; got 3"),
        ({"remat": 4}, "--remat must divide --steps 7; got 4"),
        (
            {"dropout_weights": 0.5, "gates": "input"},
            "--dropout-weights is for cells that read their last output; got 0.5",
        ),
        (
            {"optimizer": "schedule_free", "schedule": "constant", "average": "non-monotone"},
            "--optimizer schedule_free evaluates averages of its own. Give --average never",
        ),
        ({"vary_steps": 4}, "--vary-steps must be below half of --steps 7, and 0 with --remat; got 4 with --remat 1"),
        ({"vary_steps": 1, "remat": 7}, "--vary-steps must be below half of --steps 7, and 0 with --remat; got 1 with"),
        (
            {"optimizer": "schedule_free"},
            "--optimizer schedule_free takes the place of a schedule; got it with --schedule decay",
        ),
    ],
)
def test_settings_from_python_are_checked_as_flags_are(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(dataclasses.replace(settings("markov", "run"), **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "damaged: it has no 'features'"),
        ({"features": 8}, "damaged: --features must be one or more whole numbers, .*got 8"),
        ({"features": [8], "steps": "7"}, "damaged: --steps must be a whole number, .*got '7'"),
        ({"features": [8], "steps": {"7": []}}, "damaged: --steps must be a whole number, .*got {'7'"),
        ({"features": [8], "new\x1b": 1}, r"has settings this version does not know: 'new\\x1b'"),
    ],
)
def test_saved_settings_that_are_none_are_named(content, message, tmp_path):
    write_sealed(tmp_path / "config.json", content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_settings_that_are_not_those_saved_are_refused(tmp_path):
    """Such as a flipped bit, which would be other settings."""
    save_config(Config(out=str(tmp_path)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"dropout": 0.2', '"dropout": 0.3'))
    with pytest.raises(UserError, match="is damaged: its content does not fit its checksum"):
        load_config(tmp_path)


def test_settings_that_may_not_be_read_are_not_called_missing(tmp_path):
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(UserError, match=r"config.json cannot be read: Too many levels of symbolic links\."):
        load_config(tmp_path)


def test_a_path_that_leads_through_what_is_not_there_is_one_path_everywhere(tmp_path):
    config = Config(out=str(tmp_path / "a" / ".." / "run"))
    assert config.directory == tmp_path / "run"
    (tmp_path / "run").mkdir()
    save_config(config, config.directory)
    assert load_config(tmp_path / "b" / ".." / "run").out == config.out


def test_a_run_resumes_with_its_own_settings_only(tmp_path):
    config = Config(out=str(tmp_path))
    check_same(dataclasses.replace(config, epochs=9, data_dir="x", resume=True), config)
    for field in dataclasses.fields(Config):
        if field.name not in ("out", "resume", "data_dir", "epochs", "mesh", "track", "profile_dir"):
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} "):
                check_same(dataclasses.replace(config, **{field.name: "another"}), config)


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path):
    numbers = {"features": [np.int64(8)], "seed": np.int64(1), "dropout": np.float32(0.5)}
    config = normalised(settings(Path("markov"), tmp_path, **numbers))
    assert [type(value) for value in (*config.features, config.seed, config.dropout)] == [int, int, float]
    save_config(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["features"] == [8]
    assert load_config(tmp_path) == config


def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("markov", "ptb", "copy-9"):
        (tmp_path / name).mkdir()
        assert normalised(Config(dataset=name)).dataset == name


def test_a_pipe_keeps_its_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    assert normalised(Config(dataset=str(tmp_path / "link"))).dataset == str(tmp_path / "link")


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pets.txt").write_text("the cat")
    config = normalised(Config(dataset="~/a.pets.txt", data_dir="~/d", out="~/r"))
    assert (config.dataset, config.data_dir) == (str(tmp_path / "a.pets.txt"), str(tmp_path / "d"))
    assert config.directory == tmp_path / "r"
    assert dataclasses.replace(config, out=None).directory.name == "a.pets-ran"
