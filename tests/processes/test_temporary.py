"""A process's folder for temporary files goes with it, however it ends."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ddp_lib.processes import temporary
from tests.lab.processes import clean_environment
from tests.lab.project import ROOT

PROGRAM = """
import os, signal, sys
from pathlib import Path
from ddp_lib.processes.temporary import temporary_folder

(temporary_folder() / "file").touch()
assert temporary_folder() is temporary_folder()
if os.fork() == 0:
    sys.exit()  # a fork that ends leaves the folder there
os.wait()
print((temporary_folder() / "file").exists(), len([*Path(os.environ["TMPDIR"]).iterdir()]), flush=True)
if sys.argv[1:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder: Path, *args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment() | {"TMPDIR": str(folder)},
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


@pytest.mark.process
def test_the_folder_goes_at_the_end_or_when_the_next_process_starts(tmp_path):
    assert run(tmp_path) == (0, "True 1")
    assert [*tmp_path.iterdir()] == []
    for _ in range(2):  # each removes what the one before left
        assert run(tmp_path, "kill") == (-signal.SIGKILL, "True 1")
    assert run(tmp_path) == (0, "True 1")
    assert [*tmp_path.iterdir()] == []


def test_folders_of_living_processes_and_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "ddp_lib-of-mine").mkdir()
    (tmp_path / "ddp_lib-damaged" / ".in-use.lock").mkdir(parents=True)
    there = {*tmp_path.iterdir()}
    for _ in range(2):
        there.add(temporary.temporary_folder.__wrapped__())
    assert {*tmp_path.iterdir()} == there


def test_a_disk_without_locks_does(tmp_path, monkeypatch):
    def no_lock(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "FileLock", no_lock)
    assert all(temporary.temporary_folder.__wrapped__().exists() for _ in range(2))
    assert os.listdir(tmp_path)
