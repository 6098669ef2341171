"""The program `generate`."""

import dataclasses
import re
import sys

import pytest
from small_runs import TEXT, settings

from ranjax import evaluate, generate, sampling, train


def test_the_names_of_the_program_are_those_of_sampling():
    for name in ("Sampling", "generate", "prompt_ids", "sample", "stream"):
        assert getattr(generate, name) is getattr(sampling, name)
    with pytest.raises(AttributeError, match=r"module 'ranjax\.generate' has no attribute 'nonsense'"):
        _ = generate.nonsense


@pytest.mark.quick
@pytest.mark.parametrize("flags", ["", "--temperature 0", "--top-k 1", "--top-p 0.5 --seed 3"])
def test_text_follows_the_prompt_and_from_the_seed(flags, pets_run, capsys):
    flags = ["--checkpoint", str(pets_run[0].directory), "--prompt", "the c", "--length", "40", *flags.split()]
    generate.main(flags)
    text = capsys.readouterr().out
    assert text.startswith("the c")
    assert len(text) == 5 + 40 + 1
    assert set(text) <= set(TEXT)
    generate.main(flags)
    assert capsys.readouterr().out == text


def test_the_flags_of_the_program_reach_the_draws(pets_run, monkeypatch):
    asked = []

    def recorded(_, prompt, *rest):
        asked.append((prompt.tolist(), *rest))
        return iter(())

    monkeypatch.setattr(sampling, "generate", recorded)
    run, flags = str(pets_run[0].directory), "--length 7 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 5"
    generate.main(["--checkpoint", run, *flags.split()])
    line = evaluate.load_run(run).vocabulary.encode("\n").tolist()
    assert asked == [(line, 7, sampling.Sampling(0.5, 3, 0.9), 5)]
    assert dataclasses.asdict(generate.Options("x")) == {
        "checkpoint": "x", "prompt": "", "length": 200, "temperature": 0.8, "top_k": None, "top_p": 1.0, "seed": 0
    }  # fmt: skip


def test_control_characters_are_shown_as_codes_on_a_terminal_and_written_to_a_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "red.txt").write_text("\x1b[31mred\x07\ttab\n" * 100)
    out = str(tmp_path / "run")
    train.train(settings(tmp_path / "red.txt", out, epochs=1))
    capsys.readouterr()
    flags = ["--checkpoint", out, "--prompt", "\x1b[31mred\x07\t", "--length", "40", "--temperature", "0"]
    generate.main(flags)
    raw = capsys.readouterr().out
    assert raw.startswith("\x1b[31mred\x07\t")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate.main(flags)
    shown = capsys.readouterr().out
    assert shown == raw.replace("\x1b", r"\x1b").replace("\x07", r"\x07")
    assert "\x1b" not in shown


def test_the_word_none_is_a_prompt(pets_run, capsys):
    with pytest.raises(SystemExit, match="1"):
        generate.main(["--checkpoint", str(pets_run[0].directory), "--prompt", "None"])
    assert "the prompt does not fit the model: " in capsys.readouterr().err


def test_a_missing_standard_output_is_no_error(pets_run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    generate.main(["--checkpoint", str(pets_run[0].directory), "--length", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "~nosuchuser/x"], "~nosuchuser/x is not a run: it has no config.json"),
        (["--length", "0"], "--length must be a whole number, at least 1; got 0"),
        (["--prompt", "XYZ"], "the prompt does not fit the model: .*'X', 'Y', 'Z'"),
        (["--prompt", "caf\udce9"], r"--prompt is not UTF-8 text; got 'caf\\udce9'"),
        (["--temperature", "nan"], "--temperature must be finite and at least 0"),
        (["--top-p", "0"], r"--top-p must be in \(0, 1\]; got 0"),
        (["--top-k", "0"], "--top-k must be a whole number, at least 1, or None; got 0"),
        (["--seed", "-1"], r"--seed must be a whole number in \[0, 2\*\*31\); got -1"),
        (["--seed", "2147483648"], r"--seed must be a whole number in \[0, 2\*\*31\)"),
    ],
)
def test_bad_input_is_one_message(flags, message, pets_run, capsys):
    run = [] if "--checkpoint" in flags else ["--checkpoint", str(pets_run[0].directory)]
    with pytest.raises(SystemExit) as ended:
        generate.main([*run, *flags])
    assert ended.value.code == 1
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
