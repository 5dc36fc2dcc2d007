"""What all tests share: data sets, the order in which they run, and the check of their markers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from ddp_lib.notebook.run_ranks import PRELOAD
from tests.lab.images import write_images
from tests.lab.once import Once
from tests.lab.processes import TIMEOUT_S

# Several tests at once (pytest -n auto), one more than there are cores: of the time of a test about half
# is waiting. More would only make each of them slower.
MORE_WORKERS_THAN_CORES = 1
# What takes longest starts first, in this order, so that nobody waits for it at the end.
LONGEST_FIRST = """
    platforms/test_containers.py platforms/test_slurm.py course/test_browser.py training/test_compile.py
    course/test_exercises.py notebooks/ hosts/test_faults.py course/test_sanitizer.py course/test_devices.py
    training/ hosts/ platforms/ distributed/ launch/ notebook/ run_dir/
""".split()
# Their tests run one after the other, by one worker: one SLURM, image, kernel, JupyterLab.
TOGETHER = {
    "tests/platforms/test_slurm.py",
    "tests/platforms/test_containers.py",
    "tests/notebook/test_magic.py",
    "tests/course/test_browser.py",
}
# Each of these also means `process`.
PROCESS_MARKERS = {"ranks", "hosts", "platforms", "browser"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    if config.option.numprocesses != "auto":
        return None  # -n logical: one per core, for tests that compute
    return MORE_WORKERS_THAN_CORES + len(psutil.Process().cpu_affinity())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Each test to the next free worker, but whole notebooks, since a notebook's cells share a
    kernel, and whole files of TOGETHER. (xdist's own groups are marks; pytest 9.2 ignores them.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in TOGETHER or file.endswith(".ipynb") else nodeid

    return Scheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, so that the tests do the same on every machine, except from those marked gpu."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if PROCESS_MARKERS & marks or ".ipynb::" in item.nodeid:  # a notebook's cells: in its kernel
            item.add_marker(pytest.mark.process)
    items.sort(key=lambda item: rank_of(item.nodeid))


def rank_of(nodeid: str) -> int:
    name = nodeid.removeprefix("tests/")
    return next((n for n, start in enumerate(LONGEST_FIRST) if name.startswith(start)), len(LONGEST_FIRST))


# A test that starts a process says so by a marker: `make quick` leaves it out.

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
processes_started: list[str] = []


def note_process(event: str, arguments: tuple[Any, ...]) -> None:
    if event in STARTS and not looks_for_a_library():
        processes_started.append(f"{event} {arguments[:1]}")
    # multiprocessing's fork server has no event of its own, but is asked for each process.
    elif event == "socket.connect" and arguments[1] == forkserver._forkserver._forkserver_address:
        processes_started.append("a process of the fork server")


def looks_for_a_library() -> bool:
    """Whether it is ctypes that starts ldconfig or a compiler, as the first import of torch makes it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("ctypes/util.py"):
        frame = frame.f_back
    return frame is not None


sys.addaudithook(note_process)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    processes_started.clear()
    if item.get_closest_marker("gpu"):
        import torch  # asks for GPUs only here: CUDA refuses forks of a process that has asked

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    if processes_started and item.get_closest_marker("process") is None:
        pytest.fail(f"starts a process without the marker `process`: {processes_started[0]}")


# What tests with ranks import besides what run_ranks preloads itself: once instead of in each rank.
PRELOAD.extend(["torchvision.datasets", "torchvision.transforms"])


# Fixtures


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """once(name, make): the folder that make(folder) has filled, once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    return Once(folder if worker_id == "master" else folder.parent)


@pytest.fixture(scope="session")
def images_folder(once: Once) -> Path:
    """A small data set of someone's own: three global batches of 210 images, and a test set that no
    number of ranks divides."""
    return once("images", lambda folder: write_images(folder, train=630, test=131))


@pytest.fixture(scope="session")
def shared_cache(once: Once) -> str:
    """A --data-dir for all tests: the small data set is decoded once."""
    return str(once("decoded", lambda folder: None))


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """Processes that the test starts react to SIGHUP, also if the tests run under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end, with all below them, however the test ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(TIMEOUT_S)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
