"""Settings: flags, presets, allowed values, what is saved of them."""

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
    parse,
    save_config,
)
from ranjax.training.model import build_model


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_from_flags_and_from_python_are_the_same_config(preset):
    assert parse(["--preset", preset]) == parse([f"--preset={preset}"]) == normalised(PRESETS[preset])
    changed = dataclasses.replace(PRESETS[preset], learning_rate=0.3, seed=4, tie=True)
    assert parse(["--seed", "4", "--preset", preset, "--tie", "--learning-rate", "0.3"]) == normalised(changed)


@pytest.mark.parametrize("dataset", RECIPES)
def test_a_data_set_has_its_recipe_unless_flags_or_a_preset_say_otherwise(dataset):
    assert parse(["--dataset", dataset]) == normalised(RECIPES[dataset])
    changed = dataclasses.replace(RECIPES[dataset], epochs=1, features=(9,))
    assert parse(["--features", "9", "--dataset", dataset, "--epochs", "1"]) == normalised(changed)
    preset = dataclasses.replace(PRESETS["ptb-small"], dataset=dataset)
    assert parse(["--dataset", dataset, "--preset", "ptb-small"]) == normalised(preset)


@pytest.mark.parametrize("cell", ["ran", "lstm", "gru", "rnn"])
def test_a_recipe_is_for_every_cell(cell):
    config = parse(["--dataset", "wikitext-2", "--cell", cell])
    check(config)
    assert build_model(config, 33_278).cell == cell


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("residual", "input", "identity")),
        (["--block", "plain"], ("plain", "recurrent", "tanh")),
        (["--gates", "recurrent"], ("residual", "recurrent", "tanh")),
        (["--gates", "diagonal", "--activation", "identity"], ("residual", "diagonal", "identity")),
        (["--block", "plain", "--gates", "input"], ("plain", "input", "tanh")),
    ],
)
def test_what_a_recipe_has_for_its_gates_is_not_for_others(flags, expected):
    config = parse(flags)
    assert (config.block, config.gates, config.activation) == expected


def test_schedule_free_has_a_warmup():
    flags = ["--optimizer", "schedule_free", "--schedule", "constant", "--warmup", "50"]
    assert parse(flags).warmup == 50


def test_cutoffs_are_kept_and_resumed_with(tmp_path):
    given = Config(dataset="x", out=str(tmp_path), softmax="adaptive", cutoffs=(np.int64(5), 9))
    for cutoffs in (given.cutoffs, [5, 9]):
        config = normalised(dataclasses.replace(given, cutoffs=cutoffs))
        assert config.cutoffs == (5, 9)
        save_config(config, tmp_path)
        assert load_config(tmp_path) == config
        check_same(config, load_config(tmp_path))


def test_explicit_flags_win_over_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--preset", "ptb-medium", "--learning-rate", "0.3", "--out", "x"])
    assert (config.features, config.decay, config.learning_rate, config.dropout) == ((650,), 0.8, 0.3, 0.5)
    assert parse(["--learning-rate", "0.3", "--preset=text8"]).features == (1024, 1024, 2048)
    assert config.directory == tmp_path / "x"


def test_every_preset_is_a_choice_of_the_flag():
    assert get_args(Preset) == tuple(PRESETS)


def test_the_preset_none_means_the_defaults():
    assert parse(["--preset", "None"]) == parse([]) == normalised(RECIPES[Config.dataset])
    assert parse(["--dataset", "markov"]) == normalised(Config(dataset="markov"))


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


@pytest.mark.parametrize(
    ("flags", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--no-resume"], False),
        (["--resume", "auto"], "auto"),
        (["--resume=auto"], "auto"),
        (["--resume", "--epochs", "9"], True),
        (["--epochs", "9", "--resume"], True),
        (["--resume", "--no-resume"], False),
    ],
)
def test_resume_is_given_with_a_value_or_without(flags, resume, tmp_path):
    out = ["--dataset", "markov", "--out", str(tmp_path)]
    save_config(parse(out), tmp_path)
    found = parse([*out, *flags]).resume
    assert (type(found), found) == (type(resume), resume)


def test_with_auto_the_saved_settings_are_the_defaults_where_there_is_a_run(tmp_path):
    flags = ["--dataset", "markov", "--out", str(tmp_path / "run"), "--resume", "auto"]
    assert parse(flags).clip == Config.clip
    (tmp_path / "run").mkdir()
    assert parse(flags).clip == Config.clip
    save_config(settings("markov", tmp_path / "run", clip=0.5), tmp_path / "run")
    assert parse(flags).clip == 0.5


def test_resuming_takes_the_saved_settings_as_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings("markov", "run", learning_rate=0.3, features=(8, 9), layers=2)
    (tmp_path / "run").mkdir()
    save_config(normalised(config), tmp_path / "run")
    again = parse(["--out", "run", "--resume", "--epochs", "9"])
    assert dataclasses.replace(again, out="run") == resumed(config, epochs=9)
    assert again.directory == tmp_path / "run"


def test_resuming_with_a_preset_takes_its_settings_as_defaults(tmp_path, monkeypatch):
    """And the run whose name follows from the preset's data set."""
    monkeypatch.chdir(tmp_path)
    preset = PRESETS["ptb-small"]
    preset.directory.mkdir(parents=True)
    save_config(preset, preset.directory)
    config = parse(["--preset", "ptb-small", "--resume"])
    assert config == resumed(preset)
    check_same(config, load_config(config.directory))
    other = parse(["--preset", "ptb-medium", "--resume"])
    with pytest.raises(UserError, match=r"--features \(200,\) -> \(650,\); --dropout 0.0 -> 0.5"):
        check_same(other, load_config(other.directory))


def test_a_copied_run_is_resumed_where_it_is_found(pets_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pets-ran").mkdir(parents=True)
    save_config(settings(pets_text, "/elsewhere"), tmp_path / "runs" / "pets-ran")
    config = parse(["--dataset", str(pets_text), "--resume", "--epochs", "4"])
    assert config.directory == tmp_path / "runs" / "pets-ran"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "decay", "--warmup", "500"], "--warmup is for --schedule cosine; got 500 with decay"),
        (["--preset", "ptb-small", "--schedule", "cosine", "--decay", "0.9"], "--decay is for .*; got 0.9 with cosine"),
        (["--schedule", "constant", "--decay-after", "2"], "--decay-after is for .* decay; got 2 with constant"),
    ],
)
def test_a_setting_of_another_schedule_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags)


def test_a_setting_of_the_schedule_is_taken(tmp_path):
    flags = ["--schedule", "cosine", "--warmup", "500", "--out", str(tmp_path)]
    save_config(parse(flags), tmp_path)
    assert parse([*flags, "--resume"]).warmup == parse(["--resume", "--out", str(tmp_path)]).warmup == 500
    assert parse(["--preset", "ptb-small", "--schedule", "cosine"]).decay == 0.5  # the preset's, not asked for


def test_residual_blocks_are_refused_with_a_preset_of_plain_layers():
    with pytest.raises(UserError, match="--block residual cannot go with --preset ptb-small, whose settings are those"):
        parse(["--preset", "ptb-small", "--block", "residual"])
    assert parse(["--block", "residual", "--expansion", "None"]).expansion is None


@pytest.mark.parametrize(
    "flags", [["--preset", "ptb-tiny"], ["--cell", "xlstm"], ["--nonsense", "1"], ["--steps", "x"]]
)
def test_flags_that_do_not_exist_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert "Traceback" not in error


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


def test_the_word_none_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--out", "None", "--data-dir", "None", "--dataset", "None"])
    assert (config.directory, config.data_dir, config.dataset) == (tmp_path / "None", str(tmp_path / "None"), "None")
    assert parse(["--tokenizer", "None"]).tokenizer is None


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pets.txt").write_text("the cat")
    config = normalised(Config(dataset="~/a.pets.txt", data_dir="~/d", out="~/r"))
    assert (config.dataset, config.data_dir) == (str(tmp_path / "a.pets.txt"), str(tmp_path / "d"))
    assert config.directory == tmp_path / "r"
    assert dataclasses.replace(config, out=None).directory.name == "a.pets-ran"
