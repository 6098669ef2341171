"""The program `evaluate`."""

import dataclasses
import json
import math
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import pytest
from small_runs import TEXT, exported_by_the_program, files_of_at_most, resumed, settings

from ranjax import evaluate, train
from ranjax.training import metrics, model, run, score
from ranjax.training.checkpoint import Checkpoints


def test_the_names_of_the_program_are_those_of_training():
    for name in ("Evaluation", "make_evaluator", "perplexity"):
        assert getattr(evaluate, name) is getattr(metrics, name)
    for name in ("Run", "load_run"):
        assert getattr(evaluate, name) is getattr(model, name)
    assert evaluate.load_text is run.load_text
    assert evaluate.log_probabilities is score.log_probabilities
    with pytest.raises(AttributeError, match=r"module 'ranjax\.evaluate' has no attribute 'report'"):
        _ = evaluate.report


@pytest.mark.quick
def test_a_run_is_evaluated_on_its_test_split(pets_run, capsys):
    config, result = pets_run
    evaluate.main(["--checkpoint", str(config.directory)])
    bits = f"perplexity {result['test_perplexity']:.2f}, {result['test_bits']:.4f} bits per character"
    assert capsys.readouterr().out == (
        f"{config.dataset} test: {bits}, {result['test_nats']:.4f} nats, {result['test_tokens']:,} tokens\n"
    )


def test_a_perplexity_that_is_not_finite_is_an_error(copied_run, capsys):
    saved = Checkpoints(copied_run.directory)
    params = model.load_run(copied_run.directory).params
    saved.save("best", 10**6, jax.tree.map(lambda p: p * jnp.nan, params))
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(["--checkpoint", str(copied_run.directory)])
    assert capsys.readouterr().err.startswith("error: the loss on this text is nan: ")


def test_a_run_is_evaluated_on_another_split_or_text(pets_run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(TEXT)
    flags = ["--checkpoint", str(pets_run[0].directory)]
    evaluate.main([*flags, "--split", "valid"])
    valid = pets_run[1]["valid_perplexity"]
    assert f"pets.txt valid: perplexity {valid:.2f}, " in capsys.readouterr().out
    evaluate.main([*flags, "--dataset", str(tmp_path / "other.txt"), "--split", "train"])
    assert "other.txt train: perplexity" in capsys.readouterr().out


def test_words_that_a_model_does_not_have_are_counted(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the <unk>\n" * 60)
    config = settings(tmp_path, tmp_path / "run", epochs=1)
    train.train(config)
    (tmp_path / "other.txt").write_text("a dog\n" * 40)
    capsys.readouterr()
    evaluate.main(["--checkpoint", config.out, "--dataset", str(tmp_path / "other.txt"), "--split", "train"])
    assert capsys.readouterr().out.endswith(" nats, 107 tokens, 71 of them <unk>\n")


def test_a_changed_text_is_read_by_the_flags_that_the_message_names(copied_run, pets_text, tmp_path, capsys):
    """Where the run resumed on a text that has moved."""
    moved = tmp_path / "the data" / "moved.txt"
    moved.parent.mkdir()
    shutil.copy(pets_text, moved)
    train.train(resumed(copied_run, dataset=str(moved)))
    flags = ["--checkpoint", str(copied_run.directory)]
    evaluate.main(flags)
    moved.write_text("the cat sat on the log\n" + TEXT * 60)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(flags)
    error = capsys.readouterr().err
    assert re.match(r"error: the test split of .*moved\.txt is not the one that the run in .* was trained with", error)
    evaluate.main(shlex.split(error.split("python -m ranjax.evaluate ")[1]))
    assert "moved.txt test: perplexity" in capsys.readouterr().out


def test_a_run_finds_its_data_set_from_any_directory(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "the data" / "text8"
    folder.mkdir(parents=True)
    (folder / "text8").write_text("the cat sat on the mat " * 160)
    monkeypatch.chdir(tmp_path)
    result = train.train(settings("text8", "run", data_dir="the data", epochs=1, batch_size=40))
    monkeypatch.chdir("/")
    flags = ["--checkpoint", str(tmp_path / "run")]
    capsys.readouterr()
    evaluate.main(flags)
    assert f"{result['test_nats']:.4f} nats" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):  # not from the folder of another data set
        evaluate.main([*flags, "--dataset", "ptb"])
    assert "ptb is read from local files only" in capsys.readouterr().err
    (folder / "text8").write_text("the cat sat on the mat " * 200)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(flags)
    evaluate.main(shlex.split(capsys.readouterr().err.split("python -m ranjax.evaluate ")[1]))
    assert "text8 test: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "{tmp}/none"], "none is not a run: it has no config.json"),
        (["--checkpoint", "~nosuchuser/x"], "~nosuchuser/x is not a run: it has no config.json"),
        (
            ["--checkpoint", "{run}", "--dataset", "markov"],
            r"the test split of ranjax\.data\.builtin does not fit the model: .* not the characters '0', '1'",
        ),
        (["--checkpoint", "{run}", "--dataset", ""], "there is no data set or path ''"),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/none"],
            "--text must be a text file; got '.*none', which is no file",
        ),
        (["--checkpoint", "{run}", "--text", ""], "--text must be a text file; got '', which is no file"),
        (["--checkpoint", "{run}", "--text", "{tmp}"], "--text must be a text file; .*, which is a directory"),
        (["--checkpoint", "{run}", "--text", "{tmp}/empty"], "--text .*empty must have at least 2 tokens.* got 0"),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/one"],
            "--text .*one must have at least 2 .* got 1. Give more text.",
        ),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/latin"],
            "--text .*latin is not UTF-8 text: byte 0xfc at position 1",
        ),
        (["--checkpoint", "{run}", "--text", "{tmp}/other"], "--text .*other does not fit the model: .* 'Z'"),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/one", "--split", "test", "--dataset", "markov"],
            "--text is a text of its own; got it with --dataset and --split",
        ),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/one", "--data-dir", "{tmp}"],
            "--text is .* got it with --data-dir",
        ),
        (["--checkpoint", "{run}", "--out", "{tmp}/x.jsonl"], "--out is for the tokens of a --text"),
        (["--checkpoint", "{run}", "--text", "{tmp}/one", "--out", "{tmp}/x"], "--out must end in .jsonl; got .*x"),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/one", "--out", "{tmp}/kept.jsonl"],
            "--out .*kept.jsonl exists and is left unchanged. Give another --out",
        ),
        (
            ["--checkpoint", "{run}", "--text", "{tmp}/one", "--out", "{tmp}/none/x.jsonl"],
            "--out must be in a directory that exists; got .*/none/x.jsonl",
        ),
        (["--checkpoint", "{run}", "--data-dir", "{tmp}/none"], "--data-dir .*/none is not a directory"),
        (["--checkpoint", "{run}", "--dataset", "markov", "--data-dir", "{tmp}/none"], "--data-dir .*/none is not a "),
    ],
)
def test_bad_input_is_one_message(flags, message, pets_run, tmp_path, capsys):
    for name, text in (("one", b"t"), ("empty", b""), ("latin", b"f\xfcr"), ("other", b"Z"), ("kept.jsonl", b"mine")):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(SystemExit) as ended:
        evaluate.main([flag.format(run=pets_run[0].directory, tmp=tmp_path) for flag in flags])
    assert ended.value.code == 1
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert (tmp_path / "kept.jsonl").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 5


def test_any_text_is_evaluated_and_its_tokens_written(pets_run, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    flags = ["--checkpoint", str(pets_run[0].directory), "--text", str(tmp_path / "text")]
    evaluate.main([*flags, "--out", str(tmp_path / "tokens.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert "".join(row["token"] for row in rows) == TEXT
    nats = -sum(row["log_probability"] for row in rows[1:]) / (len(TEXT) - 1)
    line = f"perplexity {math.exp(nats):.2f}, {nats / math.log(2):.4f} bits per character, {nats:.4f} nats, "
    line = f"{tmp_path / 'text'}: {line}{len(TEXT) - 1} tokens"
    assert capsys.readouterr().out == f"{line}; written: {tmp_path / 'tokens.jsonl'}\n"
    evaluate.main(flags)
    assert capsys.readouterr().out == f"{line}\n"


def test_an_exported_model_evaluates_any_text_in_words(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the <unk>\n" * 60)
    train.train(settings(tmp_path, tmp_path / "run", epochs=1))
    exported_by_the_program(tmp_path / "run", tmp_path / "exported")
    (tmp_path / "other").write_text("a dog\nthe cat")
    capsys.readouterr()
    evaluate.main(
        [
            "--checkpoint",
            str(tmp_path / "exported"),
            "--text",
            str(tmp_path / "other"),
            "--out",
            str(tmp_path / "o.jsonl"),
        ]
    )
    said = capsys.readouterr().out
    assert re.search(r": perplexity \S+, \S+ bits per token, \S+ nats, 5 tokens, 1 of them <unk>; written: ", said)
    tokens = [json.loads(line)["token"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert tokens == ["<unk>", "<unk>", "\n", "the", "cat", "\n"]


def test_an_out_that_cannot_be_written_leaves_nothing(pets_run, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    flags = ["--checkpoint", str(pets_run[0].directory), "--text", str(tmp_path / "text"), "--out"]
    with files_of_at_most(100), pytest.raises(SystemExit, match="1"):
        evaluate.main([*flags, str(tmp_path / "tokens.jsonl")])
    assert re.fullmatch(r"error: --out .*tokens\.jsonl cannot be written: File too large\.\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_another_text_that_is_one_file_is_evaluated_whole(pets_run, tmp_path, capsys):
    (tmp_path / "held-out.txt").write_text(TEXT)
    (tmp_path / "one.txt").write_text("the cat")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "test.txt").write_text(TEXT)
    (tmp_path / "folder" / ".DS_Store").write_bytes(b"\0")
    flags = ["--checkpoint", str(pets_run[0].directory), "--dataset"]
    for name, split, tokens in (
        ("held-out.txt", "whole", len(TEXT)),
        ("one.txt", "whole", 7),
        ("folder", "test", len(TEXT)),
    ):
        evaluate.main([*flags, str(tmp_path / name)])
        line = capsys.readouterr().out
        assert f"{name} {split}: perplexity" in line
        assert line.endswith(f" {tokens - 1} tokens\n")


def test_training_and_evaluation_report_the_same(tmp_path, capsys):
    for split, text in (("train", "the cat sat on\n" * 60), ("valid", "the cat\n"), ("test", "the zebra sat\n" * 9)):
        (tmp_path / f"{split}.txt").write_text(text)
    config = settings(tmp_path, tmp_path / "run", epochs=1)
    train.train(config)
    trained = re.search(r"^test: (.*); saved in", capsys.readouterr().out, re.MULTILINE)[1]
    evaluate.main(["--checkpoint", config.out])
    assert capsys.readouterr().out.endswith(f" test: {trained}\n")
    assert trained.endswith(" of them <unk>")


def test_the_options_default_to_the_test_split_of_the_run():
    assert dataclasses.asdict(evaluate.Options("x")) == {
        "checkpoint": "x", "dataset": None, "data_dir": None, "split": None, "text": None, "out": None
    }  # fmt: skip
