"""Every committed notebook as its HTML page at 1,100 pixels, in a real browser: nothing is wider than the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from make import BROWSER, needs_browser

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
WIDTH = 1100
TOO_WIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output table, .jp-OutputArea-output img')]
    .filter(x => x.getBoundingClientRect().right > innerWidth
        || x.scrollWidth > x.closest('.jp-OutputArea-output').clientWidth + 1)
    .map(x => x.outerHTML.slice(0, 200))"""

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = started.chromium.launch(executable_path=BROWSER, args=options)
        found = browser.new_page(viewport={"width": WIDTH, "height": 900})
        found.route("http*://**", lambda route: route.abort())  # mathjax, which no page needs
        yield found
        browser.close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_table_and_picture_fits_its_page(page, path, tmp_path):
    html = pytest.importorskip("nbconvert", reason="nbconvert is not installed").HTMLExporter()
    made = tmp_path / "page.html"
    made.write_text(f'<base href="{path.as_uri()}">{html.from_filename(str(path))[0]}', encoding="utf-8")
    page.goto(made.as_uri(), wait_until="domcontentloaded")
    page.wait_for_function("() => [...document.images].every(x => x.complete && x.naturalWidth > 0)")
    assert page.locator("img").count() > 0
    assert not page.evaluate(TOO_WIDE)


def test_a_wide_table_is_seen(page):
    cell = "<td>a column that no line may break</td>".replace(" ", "&nbsp;")
    row = f"<table><tr>{cell * 6}</tr></table>"
    page.set_content(f'<div class="jp-OutputArea-output" style="overflow:auto">{row}</div>')
    assert len(page.evaluate(TOO_WIDE)) == 1
