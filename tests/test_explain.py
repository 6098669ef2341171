"""`python -m ranjax.explain` as a user runs it."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import files_of_at_most

import ranjax
from ranjax import evaluate, explain, generate, train, weights
from ranjax.errors import UserError
from ranjax.interpret import explanation, render
from ranjax.interpret.attribution import decompositions
from ranjax.training.config import Config
from ranjax.training.model import load_run

PETS = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the <script>alert(1)</script> dog\n"


def trained(folder, **options):
    folder.mkdir(exist_ok=True)
    (folder / "pets.txt").write_text(PETS * 60)
    settings = {"features": (8,), "batch_size": 4, "steps": 7, "epochs": 1, "tokenizer": "word"}
    train.train(Config(dataset=str(folder / "pets.txt"), out=str(folder / "run"), **settings | options))
    return str(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("residual"), block="residual", gates="input", conv_width=2)


def message(arguments, capsys):
    """What the program prints on standard error before it ends with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        explain.main(arguments)
    assert ended.value.code == 1
    return capsys.readouterr().err


def shown(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


@pytest.mark.quick
def test_the_terminal_shows_the_strongest_sources_of_each_word(run, capsys):
    explain.main(["--checkpoint", run, "--text", "the cat sat on the mat", "--top", "2", "--reduce", "max"])
    lines = capsys.readouterr().out.splitlines()
    loaded = load_run(run)
    parts = decompositions(loaded.model, loaded.params, loaded.vocabulary.encode("the cat sat on the mat"))[0]
    pairs = np.array(weights.reduced(parts, "max"))
    row = next(line for line in lines if line.startswith("    4 the"))
    first, second = np.argsort(-pairs[4, :4])[:2]
    words = ["the", "cat", "sat", "on"]
    expected = f"{pairs[4, 4]:.3g}   {words[first]} {pairs[4, first]:.3g} -{4 - first}"
    assert expected in row
    assert row.endswith(f"{words[second]} {pairs[4, second]:.3g} -{4 - second}")
    assert any(line.startswith("Half-lives of the 8 components") for line in lines)
    predictions = [line for line in lines if " = biases " in line]
    assert len(predictions) == explanation.PREDICTIONS
    for line in predictions:  # the shares sum to the logit
        logit, shares = line.split(" = ")
        total = sum(float(share) for share in re.findall(r"[+-]\d+\.\d+", shares))
        assert total == pytest.approx(float(logit.split("logit ")[1]), abs=0.05)


def test_a_residual_run_is_explained_evaluated_and_sampled(residual, tmp_path, capsys):
    page, text = tmp_path / "page.html", "the cat sat on the mat"
    explain.main(["--checkpoint", residual, "--text", text, "--layer", "2", "--out", str(page)])
    assert "Layer 2." in capsys.readouterr().out
    loaded, predictions = load_run(residual), shown(page)["predictions"]
    ids = loaded.vocabulary.encode(text)
    logits, _ = loaded.model.apply({"params": loaded.params}, ids[None], deterministic=True)
    for prediction in predictions:
        found = sum(prediction["words"]) + prediction["bias"]
        id = loaded.vocabulary.encode("\n" if prediction["word"] == "⏎" else prediction["word"])[0]
        assert found == pytest.approx(float(logits[0, -1, id]), abs=2e-3)  # the page has four digits of each share
    evaluate.main(["--checkpoint", residual])
    perplexity = json.loads((Path(residual) / "result.json").read_text())["test_perplexity"]
    assert f"perplexity {perplexity:.2f}" in capsys.readouterr().out
    generate.main(["--checkpoint", residual, "--prompt", "the", "--length", "5"])
    assert capsys.readouterr().out.startswith("the")


def test_the_word_none_is_a_text(run, capsys):
    explain.main(["--checkpoint", run, "--text", "None"])
    assert "0 <unk>" in capsys.readouterr().out


def test_a_top_that_is_no_size_is_refused(run):
    with pytest.raises(ValueError, match="`top` must be a whole number, at least 1; got 0"):
        explain.explain(load_run(run), "the cat", top=0)


@pytest.mark.parametrize("name", ["it.html", "it.png"])
def test_a_page_or_a_figure_is_written_whole_or_not_at_all(name, run, tmp_path, capsys):
    (tmp_path / name).write_text("the old one")
    with files_of_at_most(5000):
        error = message(["--checkpoint", run, "--text", "the cat", "--out", str(tmp_path / name)], capsys)
    assert "cannot be written: File too large" in error
    assert (tmp_path / name).read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_unknown_words_are_shown_as_unk(run, capsys):
    explain.main(["--checkpoint", run, "--text", "the aardvark sat"])
    assert "1 <unk>" in capsys.readouterr().out


def test_pages_and_figures_of_one_word_and_of_characters(tmp_path, run, capsys):
    explain.main(["--checkpoint", run, "--text", "cat", "--out", str(tmp_path / "one.html")])
    explain.main(["--checkpoint", run, "--text", "cat", "--out", str(tmp_path / "one.png")])
    assert len(shown(tmp_path / "one.html")["words"]) == 1
    out = trained(tmp_path, tokenizer="character", gates="input", activation="identity", layers=1)
    explain.main(["--checkpoint", out, "--text", "the cat\n", "--top", "50", "--out", str(tmp_path / "it.html")])
    assert shown(tmp_path / "it.html")["words"] == list("the cat⏎")
    explain.main(["--checkpoint", out, "--text", "the cat", "--out", str(tmp_path / "it.png")])  # whose font has no ␠
    assert "␠" in [prediction["word"] for prediction in shown(tmp_path / "it.html")["predictions"]]
    assert "error: the text does not fit the model: the vocabulary has no <unk> and not the characters 'Q'" in message(
        ["--checkpoint", out, "--text", "Quick cat"], capsys
    )


def test_bad_input_ends_the_program_with_a_message(run, tmp_path, capsys):
    given = ["--checkpoint", run]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "dir.html").mkdir()
    for more, expected in (
        ([], "by either --text or --file"),
        (["--text", "cat", "--file", "x"], "by either --text or --file"),
        (["--text", ""], "the text is empty"),
        (["--text", "  "], "the text is empty"),
        (["--file", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--text", "caf\udce9"], "--text is not UTF-8"),
        (["--text", "cat", "--out", str(tmp_path / "dir.html")], "cannot be written: Is a directory"),
        (["--file", str(tmp_path / "latin.txt")], "is not UTF-8"),
        (["--text", "cat", "--layer", "3"], "--layer must be from 1 to 2"),
        (["--text", "cat", "--top", "0"], "--top must be a whole number, at least 1"),
        (["--text", "cat", "--out", "page.pdf"], "--out must end in .html"),
        (["--text", "cat", "--out", str(tmp_path / "no" / "page.html")], "must be in a directory that exists; got"),
        (
            ["--text", "cat " * 1001, "--out", str(tmp_path / "page.html")],
            "at most 1,000 tokens, and this text has 1,001",
        ),
    ):
        assert expected in message([*given, *more], capsys), more
    assert [path.name for path in tmp_path.glob("*.html")] == ["dir.html"]
    with pytest.raises(SystemExit):
        explain.main([*given, "--text", "cat", "--reduce", "mean"])


def test_a_text_too_long_for_the_memory_ends_the_program_with_a_message(run, monkeypatch, capsys):
    monkeypatch.setattr(explanation, "free_memory", lambda device: 100_000)
    expected = r"a text of 100 tokens takes \d+ MB of memory .* enough for about \d+ tokens"
    assert re.search(expected, message(["--checkpoint", run, "--text", "cat " * 100], capsys))


def test_a_figure_that_lacks_a_glyph_is_not_written(tmp_path):
    none = np.zeros(1)
    layer = explanation.Layer(none, none[:, None], none[:, None], none, none, np.ones((1, 1)))
    found = explanation.Explanation(["\u543e"], " ", "l2", 1, [layer], [])
    path = tmp_path / "map.png"
    with pytest.raises(UserError, match=r"Glyph 21566 .* Write a page \(.html\)"), explain.writing(path):
        render.draw_heat_map(found, 1, path)
    assert not list(tmp_path.iterdir())


def test_a_newline_at_the_end_of_a_file_is_a_token(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat\n")
    explain.main(["--checkpoint", run, "--file", str(tmp_path / "text.txt")])
    assert "2 ⏎" in capsys.readouterr().out


def test_a_file_is_read_as_training_reads_it(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r")
    options = explain.Options(checkpoint="", file=str(tmp_path / "text.txt"))
    assert explain.read_text(options) == "a\r\nb\r"


def test_a_run_of_another_cell_ends_the_program_with_a_message(tmp_path, capsys):
    out = trained(tmp_path, cell="lstm")
    assert "'lstm', whose states are not weighted sums" in message(["--checkpoint", out, "--text", "cat"], capsys)


def test_paths_may_start_with_a_tilde_and_suffixes_may_be_capitals(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(explanation, "DRAWN", 3)
    (tmp_path / "text.txt").write_text("the cat sat")  # as many as are drawn
    explain.main(["--checkpoint", run, "--file", "~/text.txt", "--out", "~/PAGE.HTML"])
    assert (tmp_path / "PAGE.HTML").read_text().startswith("<!doctype")
    assert len(base64.b64decode(shown(tmp_path / "PAGE.HTML")["layers"][0]["pairs"])) == 2 * 6


def test_options_have_their_documented_defaults():
    options = explain.Options(checkpoint="runs/x")
    assert dataclasses.asdict(options) == {
        "checkpoint": "runs/x", "text": None, "file": None, "layer": 1, "reduce": "l2", "top": 3, "out": None
    }  # fmt: skip
    with pytest.raises(UserError, match="either --text or --file"):
        explain.read_text(options)


def test_the_text_file_is_not_overwritten(run, tmp_path, capsys):
    path = tmp_path / "text.html"
    path.write_text(PETS)
    for out in (path, tmp_path / ".." / tmp_path.name / path.name):
        error = message(["--checkpoint", run, "--file", str(path), "--out", str(out)], capsys)
        assert "is the text of --file, and is left as it is" in error
    assert path.read_text() == PETS


def test_python_names_are_imported_on_first_use():
    assert ranjax.explain.explain is explanation.explain
    assert ranjax.explain.Explanation is explanation.Explanation
    with pytest.raises(AttributeError, match=r"module 'ranjax\.explain' has no attribute 'nothing'"):
        _ = explain.nothing
    code = "import sys, ranjax.explain; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
