"""All records of data/results/ as one HTML page, opened in a real browser without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from make import BROWSER, needs_browser

from eagle_lab.report.charts.history import html
from eagle_lab.verdict import history


def test_an_empty_folder_is_said():
    assert "There is no record here yet." in html([], [])


def test_names_are_escaped():
    rows, _ = history.load()
    assert "<b>torn</b>" not in html(rows, ["<b>torn</b>"])


@pytest.mark.slow
@needs_browser
def test_the_page_draws_and_filters_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    rows, skipped = history.load()
    (tmp_path / "history.html").write_text(html(rows, skipped), encoding="utf-8")
    machines = [row.machine for row in rows]
    one = machines[0]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.route("http*://**", lambda route: faults.append(route.request.url))
        page.goto((tmp_path / "history.html").as_uri())
        page.wait_for_selector("section .main-svg")
        rows_seen = "tbody tr:not([hidden])"
        assert page.locator(rows_seen).count() == len(rows)
        page.select_option("#machine", one)
        assert page.locator(rows_seen).count() == machines.count(one)
        page.select_option("#machine", "")
        page.select_option("#arm", "rebuild")
        with_rebuild = [r for r in history.compared(rows) if "rebuild" in {a.strategy for a in r.arms}]
        assert page.locator(rows_seen).count() == len(with_rebuild) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 1100
        browser.close()
    assert not faults and Path(tmp_path / "history.html").stat().st_size < 8e6
