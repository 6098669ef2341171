"""Explanations in the terminal, as a figure and as a page; the page in a browser where one is installed."""

import base64
import json
import re
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from pets_run import PETS, pets_run
from rich.console import Console

from ranjax.data.vocabulary import Words
from ranjax.interpret import explanation, render
from ranjax.lm import LanguageModel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run():
    return pets_run()


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    render.write_page(explanation.explain(run, PETS), 2, path)
    return path


def shown(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


def explained(words, pairs):
    """An explanation of one layer with these pairs."""
    none = np.zeros(len(words))
    layer = explanation.Layer(none, none[:, None], none[:, None], none, none, pairs)
    return explanation.Explanation(words, " ", "l2", 1, [layer], [])


def test_the_terminal_colours_shares_by_sign_and_sources_by_weight(monkeypatch, capsys):
    prediction = explanation.Prediction("cat", 0.5, np.array([2.0, -1.0]), 0.0)
    line = render._prediction(prediction, ["a", "b"])
    assert line.plain.endswith("  a +2.00 -1  b -1.00 -0")
    assert [str(span.style) for span in line.spans] == ["bold", "green", "dim", "red", "dim"]
    weights = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.1], [0.0, 0.0]])
    sources = np.array([[-1, -1], [0, -1], [1, 0], [-1, -1]])
    own, none = np.ones(4), np.zeros(4)
    for horizon in (2, 3):
        layer = explanation.Layer(own, weights, sources, none, np.array([1.0]), None)
        found = explanation.Explanation(["the", "w" * 10, "sat", "on"], " ", "l2", horizon, [layer], [])
        console = Console(force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
        monkeypatch.setattr(render, "Console", lambda console=console, **_: console)
        render.print_sources(found, 1)
        printed = capsys.readouterr().out
        assert ("Half-lives of the 1 components" in printed) == (horizon > 2)
    assert f"\x1b[1m{'w' * 10}\x1b" in printed
    for code, what in (("1;32", "the 1"), ("36", "w" * 10 + " 0.5"), ("2", "the 0.1")):  # bold green, cyan, dim
        assert f"\x1b[{code}m  {what}" in printed


def test_quartiles_beyond_the_horizon_are_printed_as_or_more():
    assert render._quartiles(np.array([1, 2, 2, 3, 9]), 9) == "quartiles 2, 2, 3 steps"
    assert render._quartiles(np.array([1, 2, 2, 3, 9]), 3) == "quartiles 2, 2, 3 or more steps"


@pytest.mark.parametrize("count", [12, 80])
def test_a_figure_has_states_across_and_sources_down(tmp_path, count):
    render.draw_heat_map(explained(["$word"] * count, np.tril(np.ones((count, count)))), 1, tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., 0]
    height, width = pixels.shape
    assert pixels[height // 3, width * 3 // 5] == 0  # an earlier word in a later state
    assert pixels[height * 3 // 5, width // 3] == 1  # a later word in an earlier state


@pytest.mark.parametrize(("draw", "name"), [(render.draw_heat_map, "map.png"), (render.write_page, "page.html")])
def test_a_file_that_cannot_be_replaced_is_kept_and_nothing_is_left_beside_it(tmp_path, draw, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        draw(explained(["cat"], np.ones((1, 1))), 1, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_json_in_a_page_cannot_end_its_element():
    assert render._json({"text": "</script>\u2028"}) == '{"text": "\\u003c/script>\\u2028"}'


def test_the_page_loads_nothing_and_escapes_its_text(page):
    html, data = page.read_text("utf-8"), shown(page)
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)\s*=|@import|url\(", html)
    assert html.count("<script") == 2
    assert "<script>alert(1)</script>" in data["words"]
    assert data["layer"] == 1
    assert len(data["layers"]) == 2


def test_the_page_holds_all_pairs(run, tmp_path):
    found = explanation.explain(run, "the cat sat on the mat\n")
    render.write_page(found, 1, tmp_path / "page.html")
    data = shown(tmp_path / "page.html")["layers"][0]
    pairs = found.layers[0].pairs
    roots = np.frombuffer(base64.b64decode(data["pairs"]), "<u2") / 65535
    np.testing.assert_allclose(roots**2 * data["largest"], pairs[np.tril_indices(len(pairs))], atol=1e-4)


def test_five_hundred_tokens_of_a_medium_model_take_ten_seconds_and_three_megabytes(tmp_path):
    """2 x 650, untrained."""
    words = (*(f"w{n}" for n in range(9_998)), "<unk>", "<eos>")
    model = LanguageModel(len(words), features=650)
    ids = np.random.default_rng(0).integers(0, len(words), 500).astype(np.int32)
    params = model.init(jax.random.key(0), ids[None, :2], deterministic=True)["params"]
    run = SimpleNamespace(model=model, params=params, vocabulary=Words(words))
    start = time.process_time()
    found = explanation.explain(run, " ".join(words[i] for i in ids))
    render.write_page(found, 1, tmp_path / "page.html")
    assert time.process_time() - start < 15  # of two cores' 20 seconds
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
    """The page in a browser, and the errors, messages and requests that it causes."""
    tab, wrong = browser.new_context(**options).new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
    tab.goto(page.as_uri())
    return tab, wrong


def coloured(tab):
    return tab.eval_on_selector_all(".word", "words => words.map(word => word.style.background !== '')")


def test_the_page_highlights_the_sources_of_a_word(browser, page):
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


def test_the_page_is_operated_by_keyboard(browser, page):
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
    tab.keyboard.press("ArrowRight")  # continues from the focused word
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
    tab.hover(".word >> nth=2")  # the colours stay while the pointer moves
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
def test_the_page_has_the_contrast_of_wcag_in_light_and_dark(browser, page, scheme):
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


def test_rows_and_columns_of_the_map_carry_their_words(browser, page):
    tab, wrong = opened(browser, page)
    words = shown(page)["words"]
    size = tab.locator("#map").bounding_box()
    for where, start, length in (("#rows", "y", "height"), ("#columns", "x", "width")):
        labels = tab.locator(f"{where} .label")
        assert labels.all_inner_texts() == words
        for n in (0, 5, len(words) - 1):
            box = labels.nth(n).bounding_box()
            assert box[start] + box[length] / 2 == pytest.approx(
                size[start] + (n + 0.5) / len(words) * size[length], abs=2
            )
    assert wrong == []


def test_of_a_long_text_the_map_carries_as_many_words_as_fit(browser, tmp_path):
    words = [f"w{n}" for n in range(300)]
    render.write_page(explained(words, np.tril(np.ones((300, 300)))), 1, tmp_path / "page.html")
    tab, _ = opened(browser, tmp_path / "page.html")
    for width in (1000, 400):
        tab.set_viewport_size({"width": width, "height": 700})
        tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # drawn
        labels = tab.locator("#rows .label")
        shown = labels.all_inner_texts()
        every = 300 // len(shown) + (300 % len(shown) > 0)
        assert shown == words[::every]
        tops = [labels.nth(n).bounding_box()["y"] for n in (0, 1)]
        assert 11 <= tops[1] - tops[0] < 30


def test_a_click_on_the_map_chooses_the_word(browser, page):
    tab, _ = opened(browser, page)
    size, count = tab.locator("#map").bounding_box(), len(shown(page)["words"])
    at = {"x": (3.5 / count) * size["width"], "y": (1.5 / count) * size["height"]}
    tab.hover("#map", position=at)
    assert tab.inner_text("#pair").startswith("cat (step 1) in the state at on (step 3): ")
    tab.click("#map", position=at)
    assert "(step 3)" in tab.inner_text("#sources")
