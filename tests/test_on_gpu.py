"""make gpu, where there is no GPU."""

import subprocess
import sys

import pytest

from tests.lab.project import ROOT


@pytest.mark.process
@pytest.mark.parametrize(
    ("flags", "status", "last"),
    [
        ([], 3, "make gpu: this machine has no GPU that torch can use"),
        (["--dry-run", "--parts=tests"], 0, "report: "),
        (["--parts=nothing"], 2, "--parts 'nothing' is unknown"),
    ],
)
def test_without_a_gpu_it_says_so_and_a_dry_run_works(monkeypatch, tmp_path, flags, status, last):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = tmp_path / "of" / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), f"--report={report}", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert last in (done.stdout + done.stderr).splitlines()[-1]
    if status == 0:
        assert "CPU, dry run" in report.read_text() and "## tests: works" in report.read_text()
    else:
        assert not report.exists()
