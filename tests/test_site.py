"""The documentation site builds without a warning, and every page of it fits a narrow window, light and dark."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="needs the extra `docs`")
pytest.importorskip("myst_nb", reason="needs the extra `docs`")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; in CONTRIBUTING.md's command the folder is build/docs."""
    out = tmp_path_factory.mktemp("site")
    command = ["-W", "--keep-going", "-c", "docs", "."]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", *command, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return out


def pages(site):
    return [page for page in sorted(site.rglob("*.html")) if page.name not in ("search.html", "genindex.html")]


def test_every_page_and_notebook_is_in_the_site(site):
    names = {str(page.relative_to(site).with_suffix("")) for page in pages(site)}
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    sources += [*(ROOT / "experiments").rglob("README.md"), ROOT / "benchmarks" / "README.md"]
    assert {str(source.relative_to(ROOT).with_suffix("")) for source in sources} <= names


def test_no_page_shows_a_function_by_its_address(site):
    for page in pages(site):
        assert not re.search(r" at 0x|&lt;function|&lt;locals", page.read_text("utf-8")), page


def test_the_reference_has_equations_tables_and_examples(site):
    page = (site / "docs" / "api" / "recurrences.html").read_text("utf-8")
    assert 'class="math' in page
    assert "<table" in page
    assert "| ---" not in page
    assert "&gt;&gt;&gt; " in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_the_window(site, width, scheme):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.route(lambda url: not url.startswith("file:"), lambda route: route.abort())
        wrong, wide = [], {}
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for path in pages(site):
            page.goto(path.as_uri(), wait_until="load")
            if page.locator(".math").count():
                page.wait_for_function("window.MathJax?.startup?.promise", timeout=30_000)
                page.evaluate("window.MathJax.startup.promise")
            beyond = page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
            if beyond > 0:
                wide[str(path.relative_to(site))] = beyond
        browser.close()
    assert wide == {}
    assert wrong == []
