"""Notebook 04 and the report in a real browser: Chromium, driven by playwright."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from test_notebooks import NOTEBOOKS, TINY, code_of, environment, execute

pytestmark = pytest.mark.notebooks
MINUTE_MS = 60_000


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; where there is none, what to install."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def jupyter_lab(tmp_path):
    """Serve a copy of the notebooks with tiny phantoms prepared; give the address."""
    execute(NOTEBOOKS[0], tmp_path / "data", **TINY)
    folder = shutil.copytree(NOTEBOOKS[0].parent, tmp_path / "notebooks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}"]
    options += ["--no-browser", "--allow-root", "--IdentityProvider.token="]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    variables = environment(tmp_path / "data", **TINY)
    variables["JUPYTER_CONFIG_DIR"] = str(tmp_path / "config")
    variables.pop("MPLBACKEND", None)  # pictures inline, as users have them
    with open(tmp_path / "server.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=variables, cwd=folder
        )
    address = f"http://localhost:{port}/lab/tree"
    try:
        wait_for(address)
        yield address, folder
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, limit_s=60):
    """Return as soon as the address answers."""
    end = time.monotonic() + limit_s
    while True:
        try:
            return urllib.request.urlopen(address).close()
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def run_all(page, address, name):
    """Open a notebook in JupyterLab, run its cells by the menu, and save it."""
    page.goto(f"{address}/{name}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=MINUTE_MS)
    page.wait_for_function(
        "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
        "?.status === 'idle'",
        timeout=MINUTE_MS,
    )
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")


def errors_in(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert any("widget-view" in key for o in outputs for key in o.get("data", {}))
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


class Viewer:
    """The n-th slice browser of a page, by its parts."""

    def __init__(self, page, n):
        self.page = page
        self.picture = page.locator(".jp-OutputArea-output .widget-image").nth(n)
        self.box = self.picture.locator("xpath=..")
        self.picture.scroll_into_view_if_needed()

    def source(self):
        return self.picture.get_attribute("src")

    def changes(self, act):
        """Do something; wait until the picture is another; return what it is now."""
        before = self.source()
        act()
        end = time.monotonic() + 30
        while self.source() == before:
            assert time.monotonic() < end, "the picture has not changed"
            time.sleep(0.1)
        return self.source()

    def choose(self, description, option):
        label = self.box.locator(".widget-dropdown", has_text=description)
        return label.locator("select").select_option(option)


def test_notebook_04_is_run_and_walked_through_in_jupyterlab(
    browser, jupyter_lab, tmp_path
):
    address, folder = jupyter_lab
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    run_all(page, address, NOTEBOOKS[3].name)
    assert not errors_in(folder / NOTEBOOKS[3].name)

    viewer = Viewer(page, 0)
    handle = viewer.box.locator(".widget-slider .noUi-handle").first
    handle.focus()
    viewer.changes(lambda: handle.press("ArrowRight"))
    viewer.changes(lambda: viewer.choose("overlay", "nothing"))
    viewer.changes(lambda: viewer.choose("overlay", "uncertainty"))
    viewer.changes(lambda: viewer.choose("scan", "T2"))
    viewer.changes(lambda: viewer.box.get_by_role("button", name="coronal").click())
    page.screenshot(path=tmp_path / "uncertainty.png")

    cases = page.locator(".widget-dropdown", has_text="case").locator("select")
    walk = Viewer(page, 1)
    first = walk.source()
    cases.select_option(index=1)
    page.wait_for_function(
        "old => [...document.querySelectorAll('.widget-image')].at(-1)?.src !== old",
        arg=first,
    )
    walk = Viewer(page, 1)
    walk.changes(lambda: walk.choose("overlay", "errors"))
    page.screenshot(path=tmp_path / "cases.png")


def test_the_report_is_one_page_that_fetches_nothing(browser, tmp_path):
    report, here = tmp_path / "report.html", Path(sys.executable).parent
    command = ["make", "-o", ".venv/.installed", f"BIN={here}", f"REPORT={report}"]
    subprocess.run([*command, "report"], cwd=NOTEBOOKS[0].parents[1], check=True)
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    fetched, complaints = [], []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert [url for url in fetched if not url.startswith("data:")] == [report.as_uri()]
    assert not complaints
    widths = page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
    assert len(widths) >= 6 and min(widths) > 100
    text = page.inner_text("body")
    assert "Predict a whole scan" in text and "import numpy" not in text
    assert "HBox(" not in text and "VBox(" not in text
