"""explore.ipynb in JupyterLab in a real browser: run, switch the strategy, run again, look at what is on the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# where to leave the screenshots for people to look at; pytest's temporary folder where unset
SHOTS = os.environ.get("EAGLE_LAB_SCREENSHOTS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium or Chrome on this machine, so no page was looked at"
    ),
]
if BROWSER:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# small enough for the test's minute; the prompt is token ids, for the tiny target has no tokenizer
PARAMETERS = {
    "target": str(GOLDEN / "target"),
    "draft": str(GOLDEN / "draft_official"),
    "device": "cpu",
    "prompt": "1 124 306 281 69 192 471 312",
    "total_tokens": 63,
    "depth": 5,
    "top_k": 8,
    "max_new_tokens": 40,
    "compare_tokens": 4,
}
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"


def explore(folder: Path) -> None:
    """A copy of the notebook with the test's parameters, as papermill would inject them, and without outputs."""
    notebook = nbformat.read(ROOT / "notebooks" / "explore.ipynb", as_version=4)
    place = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    values = PARAMETERS | {"results_dir": str(folder / "results")}
    source = "\n".join(["# Parameters", *(f"{name} = {value!r}" for name, value in values.items())])
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source, id="injected"))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # stale outputs would look like a pass
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / "explore.ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free loopback port over a folder with the notebook; yields its address."""
    folder = tmp_path_factory.mktemp("lab")
    explore(folder)
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PLOTLY_RENDERER"},
        **own,
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.port_retries=0",
        ),
        *("--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"),
        f"--ServerApp.root_dir={folder}",
    ]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(
                f"JupyterLab did not answer within a minute: {(folder / 'server.log').read_text()[-2000:]}"
            )
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page(lab):
    """The notebook open in a browser of the test's own, all its cells run."""
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = started.chromium.launch(executable_path=BROWSER, args=options)
        # tall, for Lab draws no cell that is off the screen
        found = browser.new_page(viewport={"width": 1400, "height": 5200})
        found.set_default_timeout(90_000)
        found.goto(f"{lab}/doc/tree/explore.ipynb?reset")
        found.wait_for_selector(".jp-Notebook .jp-CodeCell")
        found.wait_for_function(f"() => {{ try {{ return {KERNEL} === 'idle' }} catch {{ return false }} }}")
        found.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        yield found
        browser.close()


def shoot(page, folder: Path, name: str) -> None:
    target = Path(SHOTS) if SHOTS else folder
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target / f"{name}.png")


def choose(page, label: str, option: str) -> None:
    page.locator(f".widget-dropdown:has(label:text-is('{label}')) select").select_option(label=option)


def press(page, name: str) -> None:
    page.locator(f"button.jupyter-button:text-is('{name}')").click()


def wait_idle(page) -> None:
    page.wait_for_selector("button.jupyter-button:text-is('Run'):not([disabled])")


def test_explore_in_jupyterlab(page, tmp_path):
    errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.all_inner_texts()
    page.wait_for_selector(".eagle-token")
    chart = page.locator(".widget-output .js-plotly-plot").first
    chart.locator(".subplot.xy .scatterlayer .point").first.wait_for()
    assert "accepted, and the bonus" in chart.locator(".gtitle").text_content()
    assert chart.locator(".subplot.xy .scatterlayer .trace").last.locator(".point").count() == 64
    assert chart.locator(".heatmaplayer image").count() == 1
    # some tokens were drafted and accepted, so more than the bonus' colour is on the page
    tints = page.locator(".widget-html .eagle-token").evaluate_all(
        "(all) => all.map((one) => one.style.background)"
    )
    assert len(set(tints)) > 1
    first = page.locator(".eagle-story").first.inner_text()

    # the strategy of the reader's own cell is among the choices; it decodes the same text
    before = page.locator(".eagle-meter").inner_text()
    choose(page, "strategy", "mine")
    press(page, "Run")
    page.wait_for_function(f"() => document.querySelector('.eagle-meter').innerText !== {json.dumps(before)}")
    wait_idle(page)
    assert page.locator(".eagle-story").first.inner_text() == first
    assert "equals the reference" in page.locator(".widget-html .eagle-finding").inner_text()

    # the mouse on a row of the mask lights up that node's path in the tree
    links = page.evaluate(
        "() => document.querySelector('.widget-output .js-plotly-plot').layout.meta.parents"
    )
    node, path = len(links) - 1, [len(links) - 1]
    while links[path[0]] >= 0:
        path.insert(0, links[path[0]])
    box = chart.locator(".heatmaplayer image").bounding_box()
    page.mouse.move(box["x"] + 6, box["y"] + box["height"] * (node + 0.5) / len(links))
    lit = page.wait_for_selector("polyline.eagle-path")
    assert lit.get_attribute("data-nodes") == " ".join(map(str, path))
    shoot(page, tmp_path, "explore-light")
    page.mouse.move(5, 5)
    page.wait_for_selector("polyline.eagle-path", state="detached")

    # no chart offers to send itself to a server
    assert page.locator("[data-title*='loud'], [data-title*='Share']").count() == 0

    choose(page, "strategy", "doubling")
    page.evaluate("() => document.querySelectorAll('.eagle-verdict').forEach((card) => card.remove())")
    press(page, "Compare")
    page.locator(".widget-html .eagle-verdict").wait_for()
    wait_idle(page)
    card = page.locator(".widget-html .eagle-verdict").inner_text()
    assert "doubling against rebuild" in card
    assert page.locator(".js-plotly-plot .gtitle").filter(has_text="grey band").count() == 2

    page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(1000)
    shoot(page, tmp_path, "explore-dark")
    assert chart.bounding_box()["height"] > 300, "the charts were lost with the theme"


def test_stop_ends_between_cycles(page):
    page.locator(".widget-hslider:has(label:text-is('new tokens')) .widget-readout").fill("512")
    page.keyboard.press("Enter")
    press(page, "Run")
    page.wait_for_selector("button.jupyter-button:text-is('Stop'):not([disabled])")
    page.wait_for_function("() => document.querySelector('.eagle-meter').innerText.includes('running')")
    press(page, "Stop")
    wait_idle(page)
    words = page.locator(".eagle-meter").inner_text()
    assert "stopped" in words
    assert 0 < int(re.search(r"(\d+) tokens in", words)[1]) < 512
