"""A limit of the system or of the user is named, whoever meets it."""

import errno
import os
import signal
import socket
import sys
from multiprocessing import Pipe
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest

import ddp_lib.distributed.store
from ddp_lib.distributed.addresses import Endpoint
from ddp_lib.distributed.store import host_store
from ddp_lib.errors import TransientError, UserError, limit_reached
from ddp_lib.launch import run_agent
from ddp_lib.notebook import worker
from ddp_lib.notebook.errors import in_one_line
from ddp_lib.processes.exit_status import as_exit_status, print_error
from ddp_lib.run_dir.checkpoint_file import write_atomic
from ddp_lib.run_dir.log import name_disk_errors

MET = {
    "files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
    "processes": (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
    "threads": (RuntimeError("can't start new thread"), "ulimit -u"),
    "faulthandler's thread": (RuntimeError("unable to start watchdog thread"), "ulimit -u"),
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


@pytest.mark.parametrize(("error", "named"), MET.values(), ids=MET)
def test_so_it_is_in_a_notebook(error, named):
    with pytest.raises(TransientError, match=named), in_one_line("the ranks have"):
        raise error


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


def test_a_path_below_a_file_is_no_full_disk(tmp_path):
    with pytest.raises(UserError) as wrong, name_disk_errors(tmp_path / "log", "kept"):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    assert wrong.value.status == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_standard_error_on_a_full_disk_leaves_the_exit_status(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with as_exit_status() as outcome:
            raise UserError("nobody can read this")
    assert outcome.status == 2


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


def test_a_loopback_interface_that_is_down_is_named(monkeypatch):
    eth0 = SimpleNamespace(address="10.0.0.7", family=socket.AF_INET)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth0": [eth0]})
    with pytest.raises(UserError, match=r"the loopback interface of .* is down.*ip link set lo up"):
        host_store(Endpoint("127.0.0.1", 0), 1.0, one_machine=True)


def test_why_there_is_no_store_reaches_the_notebook(monkeypatch):
    refused = Mock(side_effect=UserError("the loopback interface is down"))
    monkeypatch.setattr(ddp_lib.distributed.store, "host_store", refused)
    monkeypatch.setattr(signal, "signal", Mock())
    here, there = Pipe()
    worker.host_store(there, "127.0.0.1")
    assert str(here.recv()) == "the loopback interface is down"


def test_shared_memory_without_which_no_rank_starts_is_named():
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))  # as multiprocessing's semaphores say it
    with pytest.raises(TransientError, match="/dev/shm has no room or cannot be written"):
        run_agent._run(Mock(run=Mock(side_effect=refused)), Mock(), 1.0)


def test_an_exception_that_cannot_be_printed_is_one(capfd):
    class Odd(RuntimeError):
        def __str__(self) -> str:
            raise ValueError("no text")

    with as_exit_status() as outcome:
        raise Odd
    assert outcome.status == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("ddp-launch: error: Odd: ")


def test_a_path_that_cannot_be_used_is_one_line(capfd, tmp_path):
    with as_exit_status() as outcome:
        os.stat(tmp_path / ("x" * 300))
    out, error = capfd.readouterr()
    assert (outcome.status, out, error.count("\n")) == (2, "", 1)
    assert "xxx' cannot be used (File name too long)" in error


def test_a_line_stays_one_whatever_a_name_in_it_holds(capfd):
    print_error("a\nb \x1b[31m \udcff \u732b")
    assert capfd.readouterr().err == "ddp-launch: error: a\\nb \\x1b[31m \\udcff \u732b\n"
