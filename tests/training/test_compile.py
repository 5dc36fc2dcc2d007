"""--compile True."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.lab.project import ROOT

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_a_compiled_model_trains_alike_or_says_what_is_missing(
    tmp_path, images_folder, shared_cache, compiler
):
    flags = f"--data {images_folder} --data-dir {shared_cache} --model tests.lab.models:Linear --epochs 1"
    flags += " --global-batch-size 210 --precision fp64"
    # One thread: else torch starts a pool of processes, each of which imports torch.
    environ = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if compiler:
        environ["CXX"] = compiler
    elif not shutil.which("g++"):
        pytest.skip("no C++ compiler here: apt install g++")
    ends = []
    for compiled in ("True",) if compiler else ("False", "True"):
        command = [sys.executable, "-m", "ddp_lib.train", *flags.split(), "--compile", compiled]
        command += ["--run-dir", str(tmp_path / compiled)]
        done = subprocess.run(
            command,
            env=environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
        )
        if compiler:
            (line,) = done.stderr.splitlines()
            assert "--compile True" in line and "install a C++ compiler" in line
            assert done.returncode == 2
            return
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / compiled / "cifar_net.pth", weights_only=True))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-9)
