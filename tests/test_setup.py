"""`make setup` from an index of builds for CPUs alone, and without a network; a path with a space.

And the cell that installs the course on other people's machines. With packages that are made here: the
ordinary torch needs a CUDA library, the one for CPUs does not.
"""

import base64
import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_lib.course.buttons import install_code
from tests.lab.project import ROOT

pytestmark = pytest.mark.process

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "ddp-lib"
version = "1.0.0"
"""
# The project's wheel, as a build backend makes it.
BACKEND = """
import shutil
def build_wheel(folder, config=None, metadata=None):
    return shutil.copy("made/ddp_lib-1.0.0-py3-none-any.whl", folder).rpartition("/")[2]
build_editable = build_wheel
"""
PINS = "setuptools==99\ntorch==2.14.1\ncuda-library==13\nnotebook-tool==1\n"


def make_wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """An empty package."""
    info, module = f"{name}-{version}.dist-info", f"{name}.py"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: notebooks\n"
    files = {
        module: f"__version__ = {version!r}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        for path, text in files.items()
    }
    record = "".join(f"{path},sha256={digests[path]},{len(files[path])}\n" for path in files)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[str]:
    """The address of a server with two indexes: /usual and /cpu."""
    for name, version, *needs in (("setuptools", "99"), ("torch", "2.14.1", "cuda-library"),
                                  ("cuda_library", "13"), ("notebook_tool", "1")):  # fmt: skip
        make_wheel(tmp_path / "server" / "usual" / name.replace("_", "-"), name, version, *needs)
    make_wheel(tmp_path / "server" / "cpu" / "torch", "torch", "2.14.1+cpu")
    handler = functools.partial(Quiet, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    make_wheel(folder / "made", "ddp_lib", "1.0.0", "torch", "notebook-tool; extra == 'notebooks'")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "requirements.txt").write_text(PINS)
    return folder


def run(folder: Path, index: str, *words: str) -> str:
    """What a command prints that takes packages from this index alone."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{index}/usual", "PIP_NO_CACHE_DIR": "1"}
    env |= {"PIP_RETRIES": "0", "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(project: Path, index: str, *words: str) -> None:
    run(project, index, "make", f"PYTHON={sys.executable}", *words)


def installed(project: Path) -> set[str]:
    packages = project.glob(".venv/lib/python*/site-packages/*.dist-info")
    return {package.name.removesuffix(".dist-info") for package in packages}


NOWHERE = "http://127.0.0.1:1"
ALL = {"ddp_lib-1.0.0", "notebook_tool-1", "setuptools-99"}


def test_builds_for_cpus_come_without_cuda(project, indexes):
    make(project, indexes, "setup", f"INDEX={indexes}/cpu")
    assert {*ALL, "torch-2.14.1+cpu"} <= installed(project)
    assert "cuda_library-13" not in installed(project)


def test_wheels_install_without_a_network(project, indexes):
    make(project, indexes, "wheels")
    assert "torch-2.14.1" not in installed(project)
    (project / "wheels").rename(project / "wheels of 2026")
    make(project, NOWHERE, "setup", "WHEELS=wheels of 2026")
    assert {*ALL, "torch-2.14.1", "cuda_library-13"} <= installed(project)


def test_each_python_that_is_there_is_tried_once(tmp_path):
    """With what `make quick` is given instead of running it."""
    (tmp_path / "python3").symlink_to(sys.executable)
    version = ".".join(map(str, sys.version_info[:2]))
    pythons = f"PYTHONS={tmp_path / 'python3'} {sys.executable} /nowhere/python"
    done = subprocess.run(
        ["make", "--no-print-directory", "versions", "MAKE=echo", pythons],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    listed, tried, passed = done.stdout.splitlines()
    assert listed.startswith(f"{version} ") and f"VENV=.venv-{version}" in tried and version in passed
    assert done.stderr == "make: PYTHONS: '/nowhere/python' is no Python\n"


def test_no_python_at_all_is_an_error():
    command = ["make", "versions", "MAKE=echo", "PYTHONS="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.startswith("make: no Python found: name them")


def test_a_notebooks_first_cell_installs_the_course_where_it_is_missing(project, indexes, tmp_path):
    """As on Colab, in an environment that has only pip; later it does nothing, nor where all is prepared."""
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "all")):
        run(project, NOWHERE, *git, *words)
    run(tmp_path, NOWHERE, sys.executable, "-m", "venv", "bare")
    python, folder = str(tmp_path / "bare" / "bin" / "python"), tmp_path / "content"
    folder.mkdir()
    code = install_code(project.as_uri())
    shows = f"{code}\nimport ddp_lib, torch\nprint(ddp_lib.__version__, torch.__version__)"
    assert run(folder, indexes, python, "-c", shows) == "1.0.0 2.14.1\n"
    assert run(folder, NOWHERE, python, "-c", shows) == "1.0.0 2.14.1\n"
    assert [path.name for path in folder.iterdir()] == ["course"]
    assert run(ROOT, NOWHERE, sys.executable, "-c", code) == ""
    assert not (ROOT / "course").exists()
