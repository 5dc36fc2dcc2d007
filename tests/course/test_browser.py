"""The course as a reader takes it, and a run that is watched: JupyterLab in Chromium.

Skipped where no Chromium is installed; `.ci/run` installs it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import websocket

from ddp_lib.course.classroom import without_solutions
from ddp_lib.course.exercises import read_exercises, text
from tests.lab.logs import finish, grow
from tests.lab.notebooks import make_cell, make_notebook, read
from tests.lab.ports import free_port
from tests.lab.project import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# For a page to load or a kernel to start, and for a whole notebook to run, on a slow machine.
START_S, RUN_S = 120, 480

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium"),
]

# All cells on the page, also those that are scrolled out of sight.
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"}}
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"
OUTPUTS = ".jp-CodeCell .jp-OutputArea-output"
ERRORS = f"{OUTPUTS}[data-mime-type='application/vnd.jupyter.error']"


# A training by a cell's own ranks, which is drawn without being asked for.
FIT = """
from ddp_lib import TrainConfig, World, fit, run_ranks

def train(config):
    with World.join(backend="gloo") as world:
        fit(config, world)

run_ranks(train, 2, TrainConfig(data="shapes", run_dir="runs/own"))
""".strip()


def wait_until(there: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab server, as `make lab` starts it."""

    url: str
    project: Path

    def ask(self, path: str, method: str = "GET") -> Any:
        headers = {"Authorization": "token t"}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def is_up(self) -> bool:
        try:
            return bool(self.ask("/api/status"))
        except OSError:
            return False

    def kernel_is_idle(self, name: str) -> bool:
        states = {s["path"]: s["kernel"]["execution_state"] for s in self.ask("/api/sessions")}
        return states.get(f"work/{name}.ipynb") == "idle"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `make lab` needs, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a project")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)  # with their times: nothing is to be installed
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("home")
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port = free_port()
    # A home of its own: nothing of this machine's user changes what is seen, or is changed.
    env = os.environ | {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    options = f"--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token=t"
    log = home / "server.log"
    words = ["make", "lab", f"ARGS={options}"]
    with open(log, "w") as file:
        server = subprocess.Popen(
            words, env=env, cwd=project, stdout=file, stderr=file, start_new_session=True
        )
        try:
            here = Lab(f"http://127.0.0.1:{port}", project)
            wait_until(lambda: here.is_up() or server.poll() is not None, "JupyterLab answers", START_S)
            assert server.poll() is None, log.read_text()
            yield here
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    quiet = "--disable-gpu --no-first-run --disable-background-networking --disable-sync"
    # Chromium's sandbox refuses to run as root, as continuous integration does.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*quiet.split(), *root])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """Of a browser's user that has seen nothing; no script on it may fail."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(START_S * 1000)
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))
    yield page
    page.close()
    assert page_errors == []


def run_all(page, lab: Lab, name: str) -> None:
    """Opens a notebook of work/ and runs its cells."""
    from playwright.sync_api import TimeoutError

    page.goto(f"{lab.url}/lab/tree/work/{name}.ipynb?reset&token=t")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    wait_until(lambda: lab.kernel_is_idle(name), "the kernel is idle", START_S)
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
def test_the_first_notebook_runs_in_jupyterlab(lab, page, tmp_path):
    name = "00_start_here"
    path = lab.project / "work" / f"{name}.ipynb"
    notebook = read(path)
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
    for cell in cells:  # so that what the page shows comes from this run, not from the file
        cell.update(outputs=[], execution_count=None)
    path.write_text(json.dumps(notebook))
    run_all(page, lab, name)
    page.wait_for_function(
        f'() => {PROMPTS}.every(p => /^\\[\\d+\\]:$/.test(p)) || document.querySelector("{ERRORS}")',
        timeout=RUN_S * 1000,
    )
    page.screenshot(path=tmp_path / "end.png")

    assert page.locator(ERRORS).all_inner_texts() == []
    assert page.locator(".Toastify__toast").all_inner_texts() == []  # no question, no news
    assert page.evaluate(PROMPTS) == [f"[{n}]:" for n in range(1, len(cells) + 1)]
    widths = page.evaluate(
        f"[...document.querySelectorAll('{OUTPUTS} img')]"
        ".map(i => [i.naturalWidth, i.clientWidth, i.closest('.jp-OutputArea').clientWidth])"
    )
    assert len(widths) == pictures
    assert all(natural > 0 and shown <= room for natural, shown, room in widths), widths
    assert read(lab.project / "notebooks" / f"{name}.ipynb") == read(ROOT / "notebooks" / f"{name}.ipynb")


def test_the_terminal_finds_ddp_launch(lab):
    name = lab.ask("/api/terminals", "POST")["name"]
    address = f"{lab.url.replace('http', 'ws')}/terminals/websocket/{name}?token=t"
    with closing(websocket.create_connection(address, timeout=START_S)) as terminal:
        terminal.send(json.dumps(["stdin", "command -v ddp-launch; echo end$((40 + 2))\r"]))
        shown = ""
        while "end42" not in shown:
            kind, *texts = json.loads(terminal.recv())
            shown += "".join(texts) if kind == "stdout" else ""
    assert f"{lab.project}/.venv/bin/ddp-launch" in shown


@pytest.mark.parametrize("width", [390, 1200])
def test_the_site_fits_the_screen_and_is_searched(width, page, site_folder):
    page.set_viewport_size({"width": width, "height": 800})
    for path in sorted(site_folder.glob("*.html")):
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


def test_the_slides_fit_the_screen_and_the_paper(page, class_folder, tmp_path):
    decks = class_folder / "slides"
    page.set_viewport_size({"width": 1280, "height": 720})
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


def test_a_students_notebook_shows_no_solution(lab, page, tmp_path):
    original = json.loads((ROOT / "notebooks" / "01_process_groups.ipynb").read_text())
    (lab.project / "work" / "student.ipynb").write_text(json.dumps(without_solutions(original)))
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


def change_theme(page) -> None:
    theme = "Dark" if page.get_attribute("body", "data-jp-theme-light") == "true" else "Light"
    page.click(".lm-MenuBar-itemLabel:text-is('Settings')")
    page.hover(".lm-Menu-itemLabel:text-is('Theme')")
    page.click(f".lm-Menu-itemLabel:text-is('JupyterLab {theme}')")
    page.wait_for_selector(f"body[data-jp-theme-light='{str(theme == 'Light').lower()}']", state="attached")
    page.wait_for_selector("#jupyterlab-splash", state="detached")


def picture(page, cell: int, path: Path) -> None:
    """Of a cell, in both themes; what stands there can be read and is not cut off."""
    for change in (False, True):
        if change:
            change_theme(page)
        page.locator(".jp-CodeCell").nth(cell).scroll_into_view_if_needed()
        is_light = page.get_attribute("body", "data-jp-theme-light")
        page.screenshot(path=path.with_name(f"{path.name}-{'light' if is_light == 'true' else 'dark'}.png"))
    cut = f"[...document.querySelectorAll('{OUTPUTS} pre')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(cut) == 0


@pytest.mark.ranks
def test_watch_shows_a_run_and_raises_its_alarms(lab, page, tmp_path, started):
    """Of 2 ranks, of which one is stopped for a while; of 8, of which one is slow; and of 2 that the cell
    itself starts."""
    folder = lab.project / "work"
    code = [f"from ddp_lib import watch\nwatch({name!r})" for name in ("runs/two", "runs/eight")]
    cells = [make_cell(None, text) for text in (*code, FIT)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else the page asks which one
    (folder / "watch.ipynb").write_text(json.dumps(make_notebook(*cells) | {"metadata": kernel}))
    command = "-m ddp_lib.launch train --data shapes --nproc-per-node 2 --epochs 1000 --run-dir runs/two"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen([sys.executable, *command.split()], cwd=folder, **quiet)
    started.append(run)

    run_all(page, lab, "watch")
    page.wait_for_selector(f"{OUTPUTS}:has-text('images/s')")
    page.wait_for_selector(f"{OUTPUTS} img")
    [*ranks] = (p for p in psutil.Process(run.pid).children(recursive=True) if p.name() == "ddp-rank1")
    ranks[0].suspend()
    page.wait_for_selector(f"{OUTPUTS}:has-text('no line for')")
    picture(page, 0, tmp_path / "two-stopped")
    ranks[0].resume()
    page.wait_for_selector(f"{OUTPUTS}:has-text('no line for')", state="detached")
    run.send_signal(signal.SIGTERM)
    page.wait_for_selector(f"{OUTPUTS}:has-text('runs/two: signal 15, 2 ranks')")

    over = threading.Event()
    slow = threading.Thread(target=grow, args=(folder / "runs" / "eight", 8, 5, over))
    slow.start()
    try:
        page.wait_for_selector(f"{OUTPUTS}:has-text('! rank 5 is slow: it works 8')")
        page.wait_for_selector(f"{OUTPUTS} img >> nth=1")
        picture(page, 1, tmp_path / "eight-slow")
    finally:
        over.set()
        slow.join()
    finish(folder / "runs" / "eight", 8)
    page.wait_for_selector(f"{OUTPUTS}:has-text('runs/eight: finished, 8 ranks')")
    page.wait_for_selector(f"{OUTPUTS} img >> nth=2")
    picture(page, 2, tmp_path / "own")
    assert page.locator(f"{OUTPUTS} img").count() == 3
    assert page.locator(ERRORS).all_inner_texts() == []
