"""`python -m ranjax.explain` as a user runs it; its page in a browser, where there is one."""

import base64
import dataclasses
import json
import re
import shutil
import time
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from ranjax import explain, explanation, train, views, weights
from ranjax.interpret.attribution import decompositions
from ranjax.training.config import Config
from ranjax.errors import UserError
from ranjax.evaluate import Run, load_run
from ranjax.lm import LanguageModel
from ranjax.data.vocabulary import Characters, Words

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
    assert len(predictions) == explanation.PREDICTIONS
    for line in predictions:  # the parts sum to the logit
        logit, parts = line.split(" = ")
        total = sum(float(part) for part in re.findall(r"[+-]\d+\.\d+", parts))
        assert total == pytest.approx(float(logit.split("logit ")[1]), abs=0.05)


def test_shares_are_of_the_models_own_logits(run):
    loaded = load_run(run)
    found = explanation.explain(loaded, PETS)
    ids = loaded.vocabulary.encode(PETS)
    logits, _ = loaded.model.apply({"params": loaded.params}, ids[None], deterministic=True)
    probabilities = jax.nn.softmax(logits[0, -1])
    for prediction in found.predictions:
        token = next(
            i for i in range(len(loaded.vocabulary)) if explanation.piece(loaded.vocabulary, i) == prediction.word
        )
        assert prediction.logit == pytest.approx(float(logits[0, -1, token]), abs=1e-5)
        assert prediction.probability == pytest.approx(float(probabilities[token]), abs=1e-6)
    layer = found.layers[0]
    assert layer.pairs.shape == (len(ids), len(ids))
    assert not np.any(layer.sources == np.arange(len(ids))[:, None])
    np.testing.assert_allclose(layer.weights[-1], np.sort(layer.pairs[-1, :-1])[::-1][:3], rtol=1e-5)


def test_words_that_are_not_known_are_shown_as_such(run, capsys):
    explain.main(["--checkpoint", run, "--text", "the aardvark sat"])
    assert "1 <unk>" in capsys.readouterr().out


def test_one_word_and_other_tokenizers(tmp_path, run, capsys):
    explain.main(["--checkpoint", run, "--text", "cat", "--out", str(tmp_path / "one.html")])
    explain.main(["--checkpoint", run, "--text", "cat", "--out", str(tmp_path / "one.png")])
    assert len(shown(tmp_path / "one.html")["words"]) == 1
    out = trained(tmp_path, tokenizer="character", gates="input", activation="identity", layers=1)
    explain.main(["--checkpoint", out, "--text", "the cat\n", "--top", "50", "--out", str(tmp_path / "it.html")])
    assert shown(tmp_path / "it.html")["words"] == list("the cat⏎")
    explain.main(["--checkpoint", out, "--text", "the cat", "--out", str(tmp_path / "it.png")])  # whose font has no ␠
    assert "␠" in [prediction["word"] for prediction in shown(tmp_path / "it.html")["predictions"]]
    assert "error: the text does not fit the model: the vocabulary has no <unk> and not the characters 'Q'" in said(
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


def test_a_figure_that_lacks_a_character_is_not_written(tmp_path):
    none = np.zeros(1)
    layer = explanation.Layer(none, none[:, None], none[:, None], none, none, np.ones((1, 1)))
    found = explanation.Explanation(["\u543e"], " ", "l2", 1, [layer], [])
    with pytest.raises(UserError, match=r"Glyph 21566 .* Write a page \(.html\)"):
        explain.write(found, 1, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [12, 80])
def test_a_figure_has_states_across_and_sources_down(tmp_path, count):
    from matplotlib.image import imread

    pairs, none = np.tril(np.ones((count, count))), np.zeros(count)
    layer = explanation.Layer(none, none[:, None], none[:, None], none, none, pairs)
    found = explanation.Explanation(["$word"] * count, " ", "l2", 1, [layer], [])
    explain.write(found, 1, tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., 0]
    height, width = pixels.shape
    assert pixels[height // 3, width * 3 // 5] == 0  # an earlier word in a later state
    assert pixels[height * 3 // 5, width // 3] == 1  # a later word in an earlier state


def test_bad_input_is_named(run, tmp_path, monkeypatch, capsys):
    given = ["--checkpoint", run]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "dir.html").mkdir()
    for more, message in (
        ([], "by either --text or --file"),
        (["--text", "cat", "--file", "x"], "by either --text or --file"),
        (["--text", ""], "the text is empty"),
        (["--text", "  "], "the text is empty"),
        (["--file", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--text", "caf\udce9"], "--text is not UTF-8"),
        (["--text", "cat", "--out", str(tmp_path / "dir.html")], "cannot be written: Is a directory"),
        (["--file", str(tmp_path / "latin.txt")], "is not UTF-8"),
        (["--text", "cat", "--layer", "3"], "--layer must be from 1 to 2"),
        (["--text", "cat", "--top", "0"], "--top must be at least 1"),
        (["--text", "cat", "--out", "page.pdf"], "--out must end in .html"),
        (["--text", "cat", "--out", str(tmp_path / "no" / "page.html")], "must be in a directory that exists; got"),
        (
            ["--text", "cat " * 1001, "--out", str(tmp_path / "page.html")],
            "at most 1,000 tokens, and this text has 1,001",
        ),
    ):
        assert message in said([*given, *more], capsys), more
    assert [path.name for path in tmp_path.glob("*.html")] == ["dir.html"]
    monkeypatch.setattr(explanation, "free_memory", lambda: 100_000)
    takes = types.SimpleNamespace(temp_size_in_bytes=60_000, output_size_in_bytes=40_000)
    explanation._check_memory(takes, 5)
    takes.output_size_in_bytes += 1
    with pytest.raises(UserError, match="a text of 5 tokens takes"):
        explanation._check_memory(takes, 5)
    assert re.search(
        r"a text of 100 tokens takes \d+ MB of memory .* enough for about \d+ tokens",
        said([*given, "--text", "cat " * 100], capsys),
    )
    with pytest.raises(SystemExit):
        explain.main([*given, "--text", "cat", "--reduce", "mean"])


def test_the_memory_of_cached_files_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(explanation, "GROUP", tmp_path)
    monkeypatch.setattr(explanation, "MACHINE", tmp_path / "meminfo")
    assert explanation.free_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    assert explanation.free_memory() == 2000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("999000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 690000\ninactive_file 600000\nactive_file 80000\n")
    assert explanation.free_memory() == 681_000
    (tmp_path / "memory.current").write_text("2000000\n")
    assert explanation.free_memory() == 0


def test_a_file_with_an_end_of_line_is_read_as_it_is(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat\n")
    explain.main(["--checkpoint", run, "--file", str(tmp_path / "text.txt")])
    assert "2 ⏎" in capsys.readouterr().out


def test_a_file_is_read_as_training_reads_it(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r")
    options = explain.Options(checkpoint="", file=str(tmp_path / "text.txt"))
    assert explain.read_text(options) == "a\r\nb\r"


def test_an_lstm_is_refused(tmp_path, capsys):
    out = trained(tmp_path, cell="lstm")
    assert "'lstm', whose states are not weighted sums" in said(["--checkpoint", out, "--text", "cat"], capsys)


def test_paths_may_begin_with_a_tilde_and_names_be_in_capitals(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(explanation, "DRAWN", 3)
    (tmp_path / "text.txt").write_text("the cat sat")  # as many as are drawn
    explain.main(["--checkpoint", run, "--file", "~/text.txt", "--out", "~/PAGE.HTML"])
    assert (tmp_path / "PAGE.HTML").read_text().startswith("<!doctype")
    assert len(base64.b64decode(shown(tmp_path / "PAGE.HTML")["layers"][0]["pairs"])) == 2 * 6


def test_tokens_are_shown_by_signs():
    assert [explanation.piece(Characters("\t\n\x1ba"), n) for n in range(4)] == ["⇥", "⏎", "\\x1b", "a"]
    assert explanation.visible("  ") == "␠␠"
    assert explanation._horizon(5000) == explanation.HORIZON < 2500
    assert views._json({"text": "</script>\u2028"}) == '{"text": "\\u003c/script>\\u2028"}'


def test_what_adds_to_a_logit_is_green_and_what_is_strong_is_bold(monkeypatch, capsys):
    prediction = explanation.Prediction("cat", 0.5, np.array([2.0, -1.0]), 0.0)
    assert [str(span.style) for span in views._prediction(prediction, ["a", "b"]).spans] == ["bold", "green", "red"]
    weights = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.1], [0.0, 0.0]])
    sources = np.array([[-1, -1], [0, -1], [1, 0], [-1, -1]])
    own, none = np.ones(4), np.zeros(4)
    for horizon in (2, 3):
        layer = explanation.Layer(own, weights, sources, none, np.array([1.0]), None)
        found = explanation.Explanation(["the", "w" * 10, "sat", "on"], " ", "l2", horizon, [layer], [])
        console = Console(force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
        monkeypatch.setattr(views, "Console", lambda console=console, **_: console)
        views.print_sources(found, 1)
        said = capsys.readouterr().out
        assert ("Half-lives of the 1 components" in said) == (horizon > 2)
    assert f"\x1b[1m{'w' * 10}\x1b" in said
    for code, what in (("1;32", "the 1"), ("36", "w" * 10 + " 0.5"), ("2", "the 0.1")):  # bold green, cyan, dim
        assert f"\x1b[{code}m  {what}" in said


def test_five_hundred_tokens_of_a_medium_model_in_ten_seconds(tmp_path):
    """2 x 650, untrained; the page below 3 MB."""
    words = (*(f"w{n}" for n in range(9_998)), "<unk>", "<eos>")
    model = LanguageModel(len(words), features=650)
    ids = np.random.default_rng(0).integers(0, len(words), 500).astype(np.int32)
    params = model.init(jax.random.key(0), ids[None, :2], deterministic=True)["params"]
    run = Run(Config(), Words(words), model, params)
    began = time.process_time()
    found = explanation.explain(run, " ".join(words[i] for i in ids))
    views.write_page(found, 1, tmp_path / "page.html")
    assert time.process_time() - began < 15  # of two cores' 20 seconds
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
    own, weight = data["layers"][1]["own"][6], data["layers"][1]["weights"][6][0]
    said = re.match(r"⏎ \(step 6\): itself ([\d.]+), (.*?) ([\d.]+) \(\d+ back\)", tab.inner_text("#sources"))
    assert said
    assert said[2] == source
    assert (float(said[1]), float(said[3])) == (pytest.approx(own, rel=5e-3), pytest.approx(weight, rel=5e-3))
    tab.select_option("#layer", "0")
    assert data["words"][data["layers"][0]["sources"][6][0]] in tab.inner_text("#sources")
    tab.select_option("#view", "keepers")
    lit = coloured(tab)
    assert not any(lit[:6])
    assert lit[7]
    lasting, words = data["layers"][0]["lasting"][6], data["words"]
    until = "only in its own" if lasting == 1 else f"until {words[5 + lasting]}, {lasting - 1} steps later"
    assert f"more than half of its weight {until}" in tab.inner_text("#sources")
    rows = [re.split(r"\t", line) for line in tab.inner_text("#lives").splitlines()[1:]]
    assert sum(int(row[1]) for row in rows) == 8  # components
    assert int(rows[0][1]) == sum(life == 1 for life in data["layers"][0]["halfLives"])
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
    assert tab.inner_text("#heard") == tab.inner_text("#sources")
    before = tab.inner_text("#sources")
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#sources").startswith("the (step 7)")  # below the first word of the first line
    tab.keyboard.press("ArrowUp")
    assert "(step 0)" in tab.inner_text("#sources")
    tab.hover(".word >> nth=3")
    tab.keyboard.press("ArrowRight")  # goes on from the word that has the focus
    assert "(step 1)" in tab.inner_text("#sources")
    assert before != tab.inner_text("#sources")
    assert wrong == []


def test_the_page_colours_the_text_for_a_prediction(browser, page):
    tab, wrong = opened(browser, page)
    prediction = shown(page)["predictions"][1]
    weights_shown = tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background)")
    tab.focus(".predictions button >> nth=1")
    tab.keyboard.press("Enter")
    assert tab.get_attribute(".predictions button >> nth=1", "aria-pressed") == "true"
    colours = tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background)")
    most = max(map(abs, prediction["words"]))
    for colour, share in zip(colours, prediction["words"]):
        assert ("--for" in colour) == (share / most >= 0.01)
        assert ("--against" in colour) == (share / most <= -0.01)
    rows = tab.eval_on_selector_all(
        "#shares tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    largest = sorted(prediction["words"], key=abs, reverse=True)[:10]
    assert [float(row[2]) for row in rows] == pytest.approx(largest, abs=0.006)
    said = re.match(r"With the other words (.*) and the biases (.*): the logit of (.*), (.*)", tab.inner_text("#sum"))
    assert said
    total = sum(float(row[2]) for row in rows) + float(said[1]) + float(said[2])
    assert total == pytest.approx(float(said[4]), abs=0.08)
    assert (said[3], float(said[4])) == (prediction["word"], pytest.approx(prediction["logit"], abs=0.006))
    tab.hover(".word >> nth=2")  # the colours stay while the text is looked at
    assert tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background)") == colours
    tab.click(".predictions button >> nth=1")
    assert tab.inner_text("#shares") == tab.inner_text("#sum") == ""
    tab.hover(f".word >> nth={len(colours) - 1}")
    assert tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background)") == weights_shown
    assert wrong == []


def test_the_page_fits_a_narrow_window(browser, page):
    tab, _ = opened(browser, page, viewport={"width": 360, "height": 700})
    tab.click(".predictions button")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def contrast(one, other):
    """WCAG's contrast of two colours, `(red, green, blue)` from 0 to 1."""
    light = [np.dot((0.2126, 0.7152, 0.0722), np.power((np.array(c) + 0.055) / 1.055, 2.4)) for c in (one, other)]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_reads_well_in_light_and_dark(browser, page, scheme):
    """Contrast of the text on paper, on the strongest weight and on the strongest share is at least 4.5 to 1."""
    tab, wrong = opened(browser, page, color_scheme=scheme)

    def colours(where, what):
        found = tab.eval_on_selector_all(where, f"all => all.map(e => getComputedStyle(e).{what})")
        return [[float(number) for number in re.findall(r"[\d.]+", colour)] for colour in found]

    def plain(colour):
        return [n / 255 for n in colour[:3]]

    paper, ink, faint = (
        plain(colours(where, what)[0])
        for where, what in (("body", "backgroundColor"), ("body", "color"), (".note", "color"))
    )
    assert (sum(paper) > 1.5) == (scheme == "light")
    assert min(contrast(paper, ink), contrast(paper, faint)) >= 4.5
    for press in (None, 0, 1):
        if press is not None:
            tab.click(f".predictions button >> nth={press}")
        *tint, alpha = max((c for c in colours(".word", "backgroundColor") if len(c) == 4), key=lambda c: c[-1])
        assert alpha > 0.4
        assert contrast([alpha * t + (1 - alpha) * p for t, p in zip(tint, paper)], ink) >= 4.5
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
    with pytest.raises(UserError, match="either --text or --file"):
        explain.read_text(options)


def test_half_lives_and_spans_are_those_of_all_weights(run):
    loaded, text = load_run(run), "the cat sat on the mat\nthe dog sat\n"
    ids = loaded.vocabulary.encode(text)
    for reduce in ("l2", "contribution"):
        layer, _ = explanation.explain(loaded, text, reduce=reduce).layers
        made, _ = decompositions(loaded.model, loaded.params, ids)
        pairs, w, time = np.array(weights.reduced(made, reduce)), np.array(weights.full(made)), len(ids)

        def until(kept, half, most):
            return min(next((n for n in range(1, len(kept)) if kept[n] <= half), most), most)

        np.testing.assert_allclose(layer.pairs, pairs, rtol=1e-5)
        np.testing.assert_allclose(layer.own, np.diag(pairs), rtol=1e-5)
        assert layer.lasting.tolist() == [until(pairs[j:, j], pairs[j, j] / 2, time) for j in range(time)]
        horizon = time // 2 + 1
        lives = [[until(w[j:, j, k], w[j, j, k] / 2, horizon) for j in range(time - horizon + 1)] for k in range(8)]
        assert layer.half_lives.tolist() == [sorted(of)[(len(of) - 1) // 2] for of in lives]
    assert views._quartiles(np.array([1, 2, 2, 3, 9]), 9) == "quartiles 2, 2, 3 steps"
    assert views._quartiles(np.array([1, 2, 2, 3, 9]), 3) == "quartiles 2, 2, 3 or more steps"


def test_the_page_holds_all_pairs(run, tmp_path):
    found = explanation.explain(load_run(run), "the cat sat on the mat\n")
    views.write_page(found, 1, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["layers"][0]
    pairs = found.layers[0].pairs
    roots = np.frombuffer(base64.b64decode(data["pairs"]), "<u2") / 65535
    np.testing.assert_allclose(roots**2 * data["largest"], pairs[np.tril_indices(len(pairs))], atol=1e-4)


def test_the_text_is_not_overwritten(run, tmp_path, capsys):
    path = tmp_path / "text.html"
    path.write_text(PETS)
    for out in (path, tmp_path / ".." / tmp_path.name / path.name):
        error = said(["--checkpoint", run, "--file", str(path), "--out", str(out)], capsys)
        assert "is the text of --file, and is left as it is" in error
    assert path.read_text() == PETS


def test_a_vocabulary_of_two_has_two_predictions():
    model = LanguageModel(2, features=4, layers=1)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32), deterministic=True)["params"]
    found = explanation.explain(Run(Config(), Characters("ab"), model, params), "abba")
    assert sorted(prediction.word for prediction in found.predictions) == ["a", "b"]
