"""A limit of the system or of the user is named, whoever meets it."""

import errno
import os
import sys

import pytest

from ddp_lib.errors import TransientError, limit_reached
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.run_dir.checkpoint_file import write_atomic
from ddp_lib.run_dir.log import name_disk_errors

MET = {
    "files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    "processes": (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
    "threads": (RuntimeError("can't start new thread"), "ulimit -u"),
    "memory": (MemoryError(), "the memory"),
    "torch's memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory"),
    "torch itself": (ImportError("libtorch_cuda.so: failed to map segment from shared object"), "the memory"),
    "file size": (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "ulimit -f"),
    "shm": (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "/dev/shm"),
}


@pytest.mark.parametrize(("error", "named"), MET.values(), ids=MET)
def test_a_limit_is_one_line(capfd, error, named):
    with as_exit_status() as outcome:
        try:
            raise error
        except Exception as first:
            raise RuntimeError("something else") from first
    out, err = capfd.readouterr()
    assert outcome.status == 75
    assert (out, err.count("\n")) == ("", 1) and named in err


def test_output_to_a_full_disk_is_one_line(capfd):
    with as_exit_status() as outcome:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert outcome.status == 75 and capfd.readouterr().err.count("\n") == 1


def test_other_errors_are_no_limits():
    for error in (ValueError("x"), OSError(errno.ENOENT, "No such file"), RuntimeError("Connection reset")):
        assert limit_reached(error) == ""


def test_ulimit_f_is_named_with_the_file(tmp_path):
    with (
        pytest.raises(TransientError, match=r"log.*ulimit -f.*kept"),
        name_disk_errors(tmp_path / "log", "kept"),
    ):
        raise MET["file size"][0]


def test_a_folder_that_refuses_fsync_keeps_the_file(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    write_atomic(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_closed_standard_error_takes_no_file(monkeypatch, tmp_path):
    kept = os.dup(2)
    try:
        os.close(2)
        monkeypatch.setattr(sys, "stderr", None)
        with as_exit_status(), open(tmp_path / "a", "w") as file:
            assert file.fileno() != 2
            print("to nobody", file=sys.stderr)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
