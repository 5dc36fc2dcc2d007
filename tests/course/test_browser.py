"""The course as a reader takes it, and a run that is watched: JupyterLab in Chromium.

Skipped where no Chromium is installed; `.ci/run` installs it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import websocket

from ddp_lib.course.classroom import without_solutions
from ddp_lib.course.exercises import read_exercises, text
from ddp_lib.course.site import write_site
from ddp_lib.course.slides import write_slides
from tests.lab.logs import finish, grow
from tests.lab.notebooks import NOTEBOOKS, make_cell, make_notebook
from tests.lab.ports import free_port
from tests.lab.project import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# For a page to load or a kernel to start, and for a whole notebook to run, on a slow machine.
START_S, RUN_S = 120, 480

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium"),
]

# No news, no dialogs; and all cells on the page, also those that are scrolled out of sight.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"
OUTPUTS = ".jp-CodeCell .jp-OutputArea-output"
ERRORS = f"{OUTPUTS}[data-mime-type='application/vnd.jupyter.error']"


def wait_until(there: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab server, as `make lab` starts it."""

    url: str
    log: Path

    def get(self, path: str) -> list | dict:
        request = urllib.request.Request(self.url + path, headers={"Authorization": "token t"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def is_up(self) -> bool:
        try:
            return bool(self.get("/api/status"))
        except OSError:
            return False

    def kernel_is_idle(self) -> bool:
        return [s["kernel"]["execution_state"] for s in self.get("/api/sessions")] == ["idle"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that `make lab` needs, in a folder with a space in its name."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)  # with their times: nothing is to be installed
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.fixture
def lab(tmp_path: Path, project: Path) -> Iterator[Lab]:
    for name, values in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port = free_port()
    # A home of its own: nothing of this machine's user changes what is seen, or is changed.
    env = os.environ | {"HOME": str(tmp_path), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    options = f"--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token=t"
    log = tmp_path / "server.log"
    words = ["make", "lab", f"ARGS={options}"]
    with open(log, "w") as file:
        server = subprocess.Popen(
            words, env=env, cwd=project, stdout=file, stderr=file, start_new_session=True
        )
        try:
            here = Lab(f"http://127.0.0.1:{port}", log)
            wait_until(here.is_up, "JupyterLab answers", START_S)
            yield here
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture
def page(tmp_path: Path) -> Iterator:
    from playwright.sync_api import sync_playwright

    quiet = "--disable-gpu --no-first-run --disable-background-networking --disable-sync"
    # Chromium's sandbox refuses to run as root, as continuous integration does.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*quiet.split(), *root])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(START_S * 1000)
        yield page
        browser.close()


def run_all(page, lab: Lab) -> None:
    from playwright.sync_api import TimeoutError

    wait_until(lab.kernel_is_idle, "the kernel is idle", START_S)
    for _ in range(10):  # before the page itself has reached its kernel, it drops a Run All
        page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        try:
            page.wait_for_function(f"() => {PROMPTS}.some(p => /[0-9*]/.test(p))", timeout=4000)
            return
        except TimeoutError:
            continue
    raise AssertionError("Run All Cells starts nothing")


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["00_start_here", "01_process_groups", "04_training_run"])
def test_a_notebook_runs_in_jupyterlab(name, lab, page, project, tmp_path):
    path = project / "work" / f"{name}.ipynb"
    notebook = json.loads(path.read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    lines = ["".join(line for o in c["outputs"] for line in o.get("text", "")) for c in cells]
    # For a person, a training by fit is drawn.
    pictures += sum(bool(re.search(r"\[rank 0\] epoch \d+/\d+ batch", text)) for text in lines)
    for cell in cells:  # so that what the page shows comes from this run, not from the file
        cell.update(outputs=[], execution_count=None)
    path.write_text(json.dumps(notebook))
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))

    page.goto(f"{lab.url}/lab/tree/work/{name}.ipynb?reset&token=t")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    run_all(page, lab)
    page.wait_for_function(
        f'() => {PROMPTS}.every(p => /^\\[\\d+\\]:$/.test(p)) || document.querySelector("{ERRORS}")',
        timeout=RUN_S * 1000,
    )
    page.screenshot(path=tmp_path / "end.png")

    assert page.locator(ERRORS).all_inner_texts() == []
    assert page.evaluate(PROMPTS) == [f"[{n}]:" for n in range(1, len(cells) + 1)]
    widths = page.evaluate(
        f"[...document.querySelectorAll('{OUTPUTS} img')]"
        ".map(i => [i.naturalWidth, i.clientWidth, i.closest('.jp-OutputArea').clientWidth])"
    )
    assert len(widths) == pictures
    assert all(natural > 0 and shown <= room for natural, shown, room in widths), widths
    assert page_errors == []
    original = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    assert json.loads((project / "notebooks" / f"{name}.ipynb").read_text()) == original


def test_the_terminal_finds_ddp_launch(lab, project):
    request = urllib.request.Request(
        f"{lab.url}/api/terminals", method="POST", headers={"Authorization": "token t"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        name = json.load(answer)["name"]
    address = f"{lab.url.replace('http', 'ws')}/terminals/websocket/{name}?token=t"
    with closing(websocket.create_connection(address, timeout=START_S)) as terminal:
        terminal.send(json.dumps(["stdin", "command -v ddp-launch; pwd\r"]))
        shown = ""
        while str(project) not in shown.replace(f"{project}/.venv/bin/ddp-launch", ""):
            kind, *texts = json.loads(terminal.recv())
            shown += "".join(texts) if kind == "stdout" else ""
    assert f"{project}/.venv/bin/ddp-launch" in shown


@pytest.mark.parametrize("width", [390, 1200])
def test_the_site_fits_the_screen_and_is_searched(width, page, once):
    site = once("site", lambda folder: write_site(ROOT / "notebooks", folder))
    page.set_viewport_size({"width": width, "height": 800})
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], path.name
        unseen = "[...document.images].filter(i => !i.naturalWidth || i.clientWidth > innerWidth).length"
        assert page.evaluate(unseen) == 0, path.name
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("header button")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.fill("header input", "set_epoch order")
    page.click(".results li:first-child a")
    page.wait_for_url("**/*.html#*")
    assert "set_epoch" in page.inner_text("main")
    assert page_errors == []


def test_the_slides_fit_the_screen_and_the_paper(page, once, tmp_path):
    decks = once("slides", lambda folder: write_slides(NOTEBOOKS, folder))
    page.set_viewport_size({"width": 1280, "height": 720})
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))
    for path in sorted(decks.glob("*.html")):
        page.goto(path.as_uri())
        cut = "s => s.scrollHeight > s.clientHeight || parseFloat(getComputedStyle(s).fontSize) < 11"
        wide = "e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth"
        for what, judge in (("section", cut), ("pre, table, img", wide)):
            faulty = f"[...document.querySelectorAll('{what}')].filter({judge}).map(e => e.outerHTML)"
            assert page.evaluate(faulty) == [], path.name
    page.goto((decks / "01_process_groups.html").as_uri())
    for key, number in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert page.evaluate("scrollY / innerHeight") == number
        page.screenshot(path=tmp_path / f"slide-{number}.png")
    assert page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n") == page.locator("section").count()
    assert page_errors == []


def test_a_students_notebook_shows_no_solution(lab, page, project, tmp_path):
    original = json.loads((ROOT / "notebooks" / "01_process_groups.ipynb").read_text())
    (project / "work" / "student.ipynb").write_text(json.dumps(without_solutions(original)))
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(f"{lab.url}/lab/tree/work/student.ipynb?reset&token=t")
    page.wait_for_selector(".jp-MarkdownOutput:has-text('Onward')")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = page.inner_text(".jp-Notebook")
    assert "Exercises" in shown and "# your code" in shown and "Solution" not in shown
    code = "".join(text(cell) for cell in original["cells"] if cell["cell_type"] == "code")
    for exercise in read_exercises(original)[1]:
        hidden = [line for line in exercise.solution.splitlines() if line.strip() not in code]
        assert hidden and not any(line.strip() in shown for line in hidden), exercise.number
    wide = "e => e.scrollWidth > e.clientWidth + 1 || (e.naturalWidth && e.clientHeight > 600)"
    what = ".jp-MarkdownOutput, .jp-OutputArea-output pre, .jp-OutputArea-output img"
    faulty = f"[...document.querySelectorAll('{what}')].filter({wide}).map(e => e.outerHTML.slice(0, 99))"
    assert page.evaluate(faulty) == []
    page.locator(".jp-MarkdownOutput:has-text('Exercises')").last.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "student.png")


def set_theme(page, theme: str) -> None:
    page.click(".lm-MenuBar-itemLabel:text-is('Settings')")
    page.hover(".lm-Menu-itemLabel:text-is('Theme')")
    page.click(f".lm-Menu-itemLabel:text-is('JupyterLab {theme}')")
    dark = str(theme == "Light").lower()
    page.wait_for_selector(f"body[data-jp-theme-light='{dark}']", state="attached")
    page.wait_for_selector("#jupyterlab-splash", state="detached")


def picture(page, path: Path) -> None:
    """Of the notebook, in both themes; what stands there can be read and is not cut off."""
    for theme in ("Dark", "Light"):
        set_theme(page, theme)
        page.locator(".jp-CodeCell").last.scroll_into_view_if_needed()
        page.screenshot(path=path.with_name(f"{path.name}-{theme.lower()}.png"))
    cut = f"[...document.querySelectorAll('{OUTPUTS} pre')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(cut) == 0


@pytest.mark.ranks
def test_watch_shows_a_run_and_raises_its_alarms(lab, page, project, tmp_path, started):
    """Of 2 ranks, of which one is stopped for a while; and of 8, of which one is slow."""
    folder = project / "work"
    code = "from ddp_lib import watch\nwatch({!r})"
    cells = [make_cell(None, code.format(name)) for name in ("runs/two", "runs/eight")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else the page asks which one
    (folder / "watch.ipynb").write_text(json.dumps(make_notebook(*cells) | {"metadata": kernel}))
    command = "-m ddp_lib.launch train --data shapes --nproc-per-node 2 --epochs 1000 --run-dir runs/two"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen([sys.executable, *command.split()], cwd=folder, **quiet)
    started.append(run)

    page.goto(f"{lab.url}/lab/tree/work/watch.ipynb?reset&token=t")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    run_all(page, lab)
    page.wait_for_selector(f"{OUTPUTS}:has-text('images/s')")
    page.wait_for_selector(f"{OUTPUTS} img")
    picture(page, tmp_path / "two")
    [*ranks] = (p for p in psutil.Process(run.pid).children(recursive=True) if p.name() == "ddp-rank1")
    ranks[0].suspend()
    page.wait_for_selector(f"{OUTPUTS}:has-text('no line for')")
    picture(page, tmp_path / "two-stopped")
    ranks[0].resume()
    page.wait_for_selector(f"{OUTPUTS}:has-text('no line for')", state="detached")
    run.send_signal(signal.SIGTERM)
    page.wait_for_selector(f"{OUTPUTS}:has-text('runs/two: signal 15, 2 ranks')")
    picture(page, tmp_path / "two-ended")

    over = threading.Event()
    slow = threading.Thread(target=grow, args=(folder / "runs" / "eight", 8, 5, over))
    slow.start()
    try:
        page.wait_for_selector(f"{OUTPUTS}:has-text('! rank 5 is slow: it works 8')")
        page.wait_for_selector(f"{OUTPUTS} img >> nth=1")
        picture(page, tmp_path / "eight-slow")
    finally:
        over.set()
        slow.join()
    finish(folder / "runs" / "eight", 8)
    page.wait_for_selector(f"{OUTPUTS}:has-text('runs/eight: finished, 8 ranks')")
    picture(page, tmp_path / "eight-ended")
    assert page.locator(ERRORS).all_inner_texts() == []
