"""compare.ipynb and history.ipynb, as committed, in JupyterLab in a real browser: every chart is drawn, light and dark."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("EAGLE_LAB_SCREENSHOTS")  # where to leave pictures for people to look at
PLOTLY = "application/vnd.plotly.v1+json"
TOO_WIDE = """() => [...document.querySelectorAll('.jp-OutputArea-output table')]
    .filter(x => x.scrollWidth > x.closest('.jp-OutputArea-output').clientWidth + 1).length"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium or Chrome on this machine, so no page was looked at"
    ),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """JupyterLab over a copy of the notebooks, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    names = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    )
    own = {name: str(folder / name.lower()) for name in names}
    news = Path(own["JUPYTERLAB_SETTINGS_DIR"], "@jupyterlab", "apputils-extension")
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder / 'notebooks'}",
    ]  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log, cwd=folder)
    try:
        deadline, runtime = time.monotonic() + 90, Path(own["JUPYTER_RUNTIME_DIR"])
        while not (found := list(runtime.glob("jpserver-*.json")) if runtime.exists() else []):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[
                -2000:
            ]
            time.sleep(0.2)
        yield json.loads(found[0].read_text())["url"]
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.parametrize("name", ["compare", "history"])
def test_it_reads_in_jupyterlab_light_and_dark(address, name):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    charts = sum(PLOTLY in o.get("data", {}) for cell in cells for o in cell.get("outputs", []))
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = started.chromium.launch(executable_path=BROWSER, args=options)
        # tall, for Lab draws no cell that is off the screen
        page = browser.new_page(viewport={"width": 1400, "height": 6000})
        page.set_default_timeout(90_000)
        page.goto(f"{address}doc/tree/{name}.ipynb?reset")
        page.locator(".js-plotly-plot .main-svg").nth(charts - 1).wait_for(state="attached")
        for theme in ("JupyterLab Dark", "JupyterLab Light"):
            page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
            page.wait_for_function(f"() => document.body.dataset.jpThemeName === '{theme}'")
            assert page.locator(".js-plotly-plot").count() == charts > 0
            assert (
                page.locator(".jp-mod-stderr, [data-mime-type='application/vnd.jupyter.stderr']").count() == 0
            )
            assert page.evaluate(TOO_WIDE) == 0
            if SHOTS:
                page.screenshot(path=Path(SHOTS) / f"{name}-{theme.split()[-1].lower()}.png", full_page=True)
        browser.close()
