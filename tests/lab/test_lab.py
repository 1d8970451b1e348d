"""JupyterLab as a reader meets it: a real server on loopback, a real browser, the tour opened, looked at and run."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: it comes with the extra dev")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(os.environ.get("NEMOTRON_SCREENSHOTS", ROOT / "output" / "screenshots"))
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"  # its promise may never resolve, so it is not waited for
OUTPUTS = """() => {
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
    const images = [...document.querySelectorAll('.jp-OutputArea-output img')];
    return {
        cells: cells.length,
        waiting: cells.filter(c => (c.querySelector('.jp-InputPrompt')?.innerText || '').includes('*')).length,
        numbered: cells.filter(c => /\\[\\d+\\]/.test(c.querySelector('.jp-InputPrompt')?.innerText || '')).length,
        errors: [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"] pre, .jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]')].map(e => e.innerText),
        images: images.length,
        broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
        mute: images.filter(i => !i.closest('.jp-RenderedImage') && !(i.alt || '').trim()).length,  // of PNG outputs JupyterLab drops the text, which stands in their metadata
        colours: [...document.querySelectorAll('.jp-RenderedHTMLCommon [style*="background"]')].filter(e => getComputedStyle(e).backgroundColor !== 'rgba(0, 0, 0, 0)').length,
    };
}"""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, seconds: float) -> None:
    """Until the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("JupyterLab did not start")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab on a copy of the notebooks, with a home of its own: nothing there has ever been trusted."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    # All cells stand in the page at once; by default only those in sight do.
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    port, token = free_port(), secrets.token_hex(8)
    env = os.environ | {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root", f"--ServerApp.root_dir={home}", f"--IdentityProvider.token={token}", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"]
    with open(home / "lab.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", process, 60)
        yield f"http://127.0.0.1:{port}", token
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def open_notebook(browser, lab, name: str):
    """A page with the notebook open and drawn as a whole."""
    url, token = lab
    page = browser.new_page(viewport={"width": 1400, "height": 1600})
    page.goto(f"{url}/lab/tree/nbs/{name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.model?.cells?.length > 10", timeout=60_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }")
    scroll_through(page)
    return page


def scroll_through(page) -> None:
    """JupyterLab draws what is in sight; so everything is brought into sight once."""
    for cell in page.query_selector_all(".jp-Notebook .jp-Cell"):
        try:
            cell.scroll_into_view_if_needed(timeout=2000)
        except sync_api.Error:  # it was replaced while the page was drawn
            continue
    page.wait_for_timeout(500)


def shoot(page, name: str) -> None:
    """Leave a screenshot for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_untrusted_the_stored_pictures_of_the_tour_show(lab, browser):
    page = open_notebook(browser, lab, "tour.ipynb")
    trusted = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.cells.get(3).trusted")
    found = page.evaluate(OUTPUTS)
    page.evaluate("() => document.querySelector('.jp-Notebook .jp-Cell').scrollIntoView()")
    shoot(page, "tour-untrusted")
    page.close()
    assert not trusted, "the copy must be untrusted, or this proves nothing"
    assert found["images"] >= 3 and found["broken"] == 0 and found["mute"] == 0, found
    assert found["colours"] >= 50, "the token strips have lost their colours"


def test_the_tour_runs_from_first_cell_to_last(lab, browser):
    page = open_notebook(browser, lab, "tour.ipynb")
    before = page.evaluate(OUTPUTS)
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=60_000)
    page.evaluate(RUN_ALL)
    page.wait_for_timeout(1000)
    page.wait_for_function(f"() => {{ const o = ({OUTPUTS})(); return o.errors.length || (o.waiting === 0 && o.numbered === o.cells); }}", timeout=600_000)
    scroll_through(page)
    found = page.evaluate(OUTPUTS)
    shoot(page, "tour-run")
    page.close()
    assert found["errors"] == [], found["errors"]
    assert found["numbered"] == found["cells"] == before["cells"]
    assert found["images"] >= 3 and found["broken"] == 0 and found["mute"] == 0, found
