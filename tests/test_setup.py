"""`make setup` from an index of builds for CPUs alone, and without a network; a path with a space.

With packages that are made here: the ordinary torch needs a CUDA library, the one for CPUs does not.
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


def make(project: Path, index: str, *words: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{index}/usual", "PIP_NO_CACHE_DIR": "1"}
    env |= {"PIP_RETRIES": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", *words], cwd=project, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def installed(project: Path) -> set[str]:
    packages = project.glob(".venv/lib/python*/site-packages/*.dist-info")
    return {package.name.removesuffix(".dist-info") for package in packages}


ALL = {"ddp_lib-1.0.0", "notebook_tool-1", "setuptools-99"}


def test_builds_for_cpus_come_without_cuda(project, indexes):
    make(project, indexes, "setup", f"INDEX={indexes}/cpu")
    assert {*ALL, "torch-2.14.1+cpu"} <= installed(project)
    assert "cuda_library-13" not in installed(project)


def test_wheels_install_without_a_network(project, indexes):
    make(project, indexes, "wheels")
    shutil.rmtree(project / ".venv")
    nowhere = "http://127.0.0.1:1"
    (project / "wheels").rename(project / "wheels of 2026")
    make(project, nowhere, "setup", "WHEELS=wheels of 2026")
    assert {*ALL, "torch-2.14.1", "cuda_library-13"} <= installed(project)
