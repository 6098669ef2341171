"""The flags of `train` as settings."""

import dataclasses

import pytest
from small_runs import resumed, settings

from ranjax.errors import UserError
from ranjax.training.config import (
    PRESETS,
    RECIPES,
    Config,
    check,
    check_same,
    load_config,
    normalised,
    save_config,
)
from ranjax.training.flags import parse
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


def test_a_text_of_ones_own_is_trained_by_one_scan_in_residual_blocks(tmp_path):
    for name in ("text.txt", "folder"):
        config = parse(["--dataset", str(tmp_path / name)])
        assert (config.gates, config.block, config.activation, config.features) == (
            "input",
            "residual",
            "identity",
            (256,),
        )
    plain = parse(["--dataset", str(tmp_path / "text.txt"), "--block", "plain"])
    assert (plain.gates, plain.block, plain.activation) == ("recurrent", "plain", "tanh")
    assert parse(["--dataset", "ptb"]) == normalised(Config(dataset="ptb"))


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


def test_explicit_flags_win_over_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--preset", "ptb-medium", "--learning-rate", "0.3", "--out", "x"])
    assert (config.features, config.decay, config.learning_rate, config.dropout) == ((650,), 0.8, 0.3, 0.5)
    assert parse(["--learning-rate", "0.3", "--preset=text8"]).features == (1024, 1024, 2048)
    assert config.directory == tmp_path / "x"


def test_the_preset_none_means_the_defaults():
    assert parse(["--preset", "None"]) == parse([]) == normalised(RECIPES[Config.dataset])
    assert parse(["--dataset", "markov"]) == normalised(Config(dataset="markov"))


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


def test_the_word_none_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--out", "None", "--data-dir", "None", "--dataset", "None"])
    assert (config.directory, config.data_dir, config.dataset) == (tmp_path / "None", str(tmp_path / "None"), "None")
    assert parse(["--tokenizer", "None"]).tokenizer is None
