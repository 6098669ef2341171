"""`python -m ranjax.explain` as a user runs it; its page in a browser, where there is one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ranjax import explain, train, views, weights
from ranjax.attribution import decompositions
from ranjax.config import Config
from ranjax.errors import UserError
from ranjax.evaluate import Run, load_run
from ranjax.lm import LanguageModel
from ranjax.vocabulary import Words

PETS = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the <script>alert(1)</script> dog\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    explain.main(["--checkpoint", run, "--text", PETS, "--out", str(path), "--layer", "2"])
    return path


def said(arguments, capsys):
    """What the program prints on standard error before it ends with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        explain.main(arguments)
    assert ended.value.code == 1
    return capsys.readouterr().err


def shown(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


@pytest.mark.quick
def test_the_terminal_names_the_strongest_sources_of_each_word(run, capsys):
    explain.main(["--checkpoint", run, "--text", "the cat sat on the mat", "--top", "2", "--reduce", "max"])
    lines = capsys.readouterr().out.splitlines()
    loaded = load_run(run)
    made = decompositions(loaded.model, loaded.params, loaded.vocabulary.encode("the cat sat on the mat"))[0]
    pairs = np.array(weights.reduced(made, "max"))
    row = next(line for line in lines if line.startswith("    4 the"))
    first, second = np.argsort(-pairs[4, :4])[:2]
    words = ["the", "cat", "sat", "on"]
    expected = f"{pairs[4, 4]:.3g}   {words[first]} {pairs[4, first]:.3g} -{4 - first}"
    assert expected in row
    assert row.endswith(f"{words[second]} {pairs[4, second]:.3g} -{4 - second}")
    assert any(line.startswith("Half-lives of the 8 components") for line in lines)
    predictions = [line for line in lines if " = biases " in line]
    assert len(predictions) == explain.PREDICTIONS
    for line in predictions:  # the parts sum to the logit
        logit, parts = line.split(" = ")
        total = sum(float(part) for part in re.findall(r"[+-]\d+\.\d+", parts))
        assert total == pytest.approx(float(logit.split("logit ")[1]), abs=0.05)


def test_shares_are_of_the_models_own_logits(run):
    loaded = load_run(run)
    found = explain.explain(loaded, PETS, drawn=True)
    ids = loaded.vocabulary.encode(PETS)
    logits, _ = loaded.model.apply({"params": loaded.params}, ids[None], deterministic=True)
    probabilities = jax.nn.softmax(logits[0, -1])
    for prediction in found.predictions:
        token = next(i for i in range(len(loaded.vocabulary)) if explain.piece(loaded.vocabulary, i) == prediction.word)
        assert prediction.logit == pytest.approx(float(logits[0, -1, token]), abs=1e-5)
        assert prediction.probability == pytest.approx(float(probabilities[token]), abs=1e-6)
    layer = found.layers[0]
    assert layer.pairs.shape == (len(ids), len(ids))
    np.testing.assert_allclose(layer.own, np.diag(layer.pairs), rtol=1e-5)
    assert not np.any(layer.sources == np.arange(len(ids))[:, None])
    np.testing.assert_allclose(layer.weights[-1], np.sort(layer.pairs[-1, :-1])[::-1][:3], rtol=1e-5)


def test_words_that_are_not_known_are_shown_as_such(run, capsys):
    explain.main(["--checkpoint", run, "--text", "the aardvark sat"])
    assert "1 <unk>" in capsys.readouterr().out


def test_one_word_and_other_tokenizers(tmp_path, run, capsys):
    explain.main(["--checkpoint", run, "--text", "cat", "--out", str(tmp_path / "one.html")])
    assert len(shown(tmp_path / "one.html")["words"]) == 1
    out = trained(tmp_path, tokenizer="character", gates="input", activation="identity", layers=1)
    explain.main(["--checkpoint", out, "--text", "the cat\n", "--top", "50", "--out", str(tmp_path / "it.html")])
    assert shown(tmp_path / "it.html")["words"] == list("the cat⏎")
    assert "error: the vocabulary has no <unk> and not the characters 'Q'" in said(
        ["--checkpoint", out, "--text", "Quick cat"], capsys
    )


def test_the_page_needs_nothing_but_itself_and_its_text_is_escaped(page):
    html, data = page.read_text("utf-8"), shown(page)
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)\s*=|@import|url\(", html)
    assert html.count("<script") == 2
    assert "<script>alert(1)</script>" in data["words"]
    assert data["layer"] == 1
    assert len(data["layers"]) == 2


def test_a_figure_is_written(run, tmp_path):
    for name, text in (("few.png", PETS), ("many.png", PETS * 4)):
        explain.main(["--checkpoint", run, "--text", text, "--out", str(tmp_path / name)])
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named(run, tmp_path, monkeypatch, capsys):
    given = ["--checkpoint", run]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for more, message in (
        ([], "by --text or by --file"),
        (["--text", "cat", "--file", "x"], "by one of them"),
        (["--text", ""], "the text is empty"),
        (["--text", "  "], "the text is empty"),
        (["--file", str(tmp_path / "none")], "is not a file"),
        (["--file", str(tmp_path / "latin.txt")], "is not UTF-8"),
        (["--text", "cat", "--layer", "3"], "--layer must be from 1 to 2"),
        (["--text", "cat", "--top", "0"], "--top must be at least 1"),
        (["--text", "cat", "--out", "page.pdf"], "--out must end in .html"),
        (["--text", "cat", "--out", str(tmp_path / "no" / "page.html")], "which is not a directory"),
        (
            ["--text", "cat " * 2001, "--out", str(tmp_path / "page.html")],
            "at most 2,000 tokens, and this text has 2,001",
        ),
    ):
        assert message in said([*given, *more], capsys), more
    assert list(tmp_path.glob("*.html")) == []
    monkeypatch.setattr(explain, "free_memory", lambda: 10_000)
    assert re.search(
        r"a text of 100 tokens takes .* enough for 9 tokens", said([*given, "--text", "cat " * 100], capsys)
    )
    with pytest.raises(SystemExit):
        explain.main([*given, "--text", "cat", "--reduce", "mean"])


def test_a_file_with_an_end_of_line_is_read_as_it_is(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat\n")
    explain.main(["--checkpoint", run, "--file", str(tmp_path / "text.txt")])
    assert "2 ⏎" in capsys.readouterr().out


def test_an_lstm_is_refused(tmp_path, capsys):
    out = trained(tmp_path, cell="lstm")
    assert "'lstm', whose states are not weighted sums" in said(["--checkpoint", out, "--text", "cat"], capsys)


def test_help_is_there_at_once():
    began = time.monotonic()
    command = [sys.executable, "-m", "ranjax.explain", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    assert time.monotonic() - began < 5
    assert all(
        flag in out.stdout for flag in ("--checkpoint", "--text", "--file", "--layer", "--reduce", "--top", "--out")
    )


def test_five_hundred_tokens_of_a_medium_model_in_ten_seconds(tmp_path):
    """2 x 650, untrained; the page below 3 MB."""
    words = (*(f"w{n}" for n in range(9_998)), "<unk>", "<eos>")
    model = LanguageModel(len(words), features=650)
    ids = np.random.default_rng(0).integers(0, len(words), 500).astype(np.int32)
    params = model.init(jax.random.key(0), ids[None, :2], deterministic=True)["params"]
    run = Run(Config(), Words(words), model, params)
    began = time.process_time()
    found = explain.explain(run, " ".join(words[i] for i in ids), drawn=True)
    views.write_page(found, 1, tmp_path / "page.html")
    assert time.process_time() - began < 20  # seconds of two cores
    assert (tmp_path / "page.html").stat().st_size < 3e6


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install it (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, page, **options):
    """The page as a browser shows it, and what went wrong in it."""
    tab, wrong = browser.new_context(**options).new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
    tab.goto(page.as_uri())
    return tab, wrong


def coloured(tab):
    return tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background !== '')")


def test_the_page_lights_what_a_word_remembers(browser, page):
    tab, wrong = opened(browser, page)
    data = shown(page)
    assert tab.eval_on_selector_all(".word", "words => words.map(word => word.textContent)") == data["words"]
    tab.hover(".word >> nth=6")
    lit = coloured(tab)
    assert lit[5]
    assert lit[6]
    assert not any(lit[7:])
    source = data["words"][data["layers"][1]["sources"][6][0]]
    assert tab.inner_text("#sources").startswith(f"⏎ (step 6): itself {data['layers'][1]['own'][6]:.3g}"[:18])
    assert source in tab.inner_text("#sources")
    tab.select_option("#layer", "0")
    assert data["words"][data["layers"][0]["sources"][6][0]] in tab.inner_text("#sources")
    tab.select_option("#view", "keepers")
    lit = coloured(tab)
    assert not any(lit[:6])
    assert lit[7]
    assert wrong == []


def test_the_page_is_used_by_keyboard(browser, page):
    tab, wrong = opened(browser, page)
    tab.focus(".word[tabindex='0']")
    for key, step in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", len(shown(page)["words"]) - 1),
    ):
        tab.keyboard.press(key)
        assert f"(step {step})" in tab.inner_text("#sources")
    assert tab.eval_on_selector_all(".word", "words => words.filter(word => word.tabIndex === 0).length") == 1
    tab.focus(".predictions button")
    tab.keyboard.press("Enter")
    assert tab.get_attribute(".predictions button", "aria-pressed") == "true"
    prediction = shown(page)["predictions"][0]
    assert tab.inner_text("#sum").endswith(f"the logit of {prediction['word']}, {prediction['logit']:.2f}")
    assert any(coloured(tab))
    assert wrong == []


def test_the_page_reads_well_in_light_and_dark(browser, page):
    """Contrast of text on paper, by WCAG's formula, is at least 4.5 to 1; the map is drawn in both."""
    for scheme in ("light", "dark"):
        tab, wrong = opened(browser, page, color_scheme=scheme)
        paper, *inks = (
            [
                int(n) / 255
                for n in re.findall(r"\d+", tab.eval_on_selector(where, f"e => getComputedStyle(e).{what}"))[:3]
            ]
            for where, what in (("body", "backgroundColor"), ("body", "color"), (".note", "color"))
        )
        light = [np.dot((0.2126, 0.7152, 0.0722), np.power((np.array(c) + 0.055) / 1.055, 2.4)) for c in (paper, *inks)]
        assert (light[0] > 0.5) == (scheme == "light")
        for ink in light[1:]:
            assert (max(ink, light[0]) + 0.05) / (min(ink, light[0]) + 0.05) >= 4.5
        drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert tab.eval_on_selector("#map", drawn) > 20
        assert wrong == []


def test_a_press_on_the_map_chooses_the_word(browser, page):
    tab, _ = opened(browser, page)
    size, count = tab.locator("#map").bounding_box(), len(shown(page)["words"])
    at = {"x": (3.5 / count) * size["width"], "y": (1.5 / count) * size["height"]}
    tab.hover("#map", position=at)
    assert tab.inner_text("#pair").startswith("cat (step 1) in the state at on (step 3): ")
    tab.click("#map", position=at)
    assert "(step 3)" in tab.inner_text("#sources")


def test_options_have_their_documented_defaults():
    options = explain.Options(checkpoint="runs/x")
    assert dataclasses.asdict(options) == {
        "checkpoint": "runs/x", "text": None, "file": None, "layer": 1, "reduce": "l2", "top": 3, "out": None
    }  # fmt: skip
    with pytest.raises(UserError, match="--text or by --file"):
        explain.read_text(options)
