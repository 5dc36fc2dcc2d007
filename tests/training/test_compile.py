"""--compile True."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from ddp_lib import run_ranks
from tests.lab.project import ROOT
from tests.lab.runs import config, train

pytestmark = pytest.mark.ranks

TIMEOUT_S = 400


@pytest.fixture
def compiling(monkeypatch, tmp_path, images_folder, shared_cache):
    """compiling(compiled): trains the least model for an epoch, as one rank; returns the run's folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    # One thread: else torch starts a pool of processes, each of which imports torch.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")

    def run(compiled: bool):
        folder = tmp_path / str(compiled)
        changes = {"model": "tests.lab.models:Linear", "precision": "fp64", "epochs": 1, "compile": compiled}
        run_ranks(train, 1, config(folder, images_folder, shared_cache, **changes), timeout_s=TIMEOUT_S)
        return folder

    return run


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here: apt install g++")
def test_a_compiled_model_trains_alike(compiling, tmp_path):
    plain, compiled = (
        torch.load(compiling(how) / "cifar_net.pth", weights_only=True) for how in (False, True)
    )
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name], rtol=0, atol=1e-9)
    assert any((tmp_path / "cache").rglob("*.cpp"))  # it was compiled


def test_a_missing_compiler_is_named(tmp_path, images_folder, shared_cache):
    """In a process of its own: torch reads CXX when it loads."""
    flags = f"--data {images_folder} --data-dir {shared_cache} --model tests.lab.models:Linear --epochs 1"
    flags += f" --global-batch-size 210 --run-dir {tmp_path} --compile True"
    environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "ddp_lib.train", *flags.split()]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    (line,) = done.stderr.splitlines()
    assert "--compile True" in line and "install a C++ compiler" in line
    assert done.returncode == 2
