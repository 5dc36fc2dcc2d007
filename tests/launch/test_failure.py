"""How a rank's end is read, from its status, its report and its log; and which rank was first."""

import json
import os
import shutil
import signal
import socket
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ddp_lib.launch.failure import cause_of, drop_half_written, read_failure, say_where
from ddp_lib.launch.rank_log import RankLogs
from tests.launch.test_rank_log import MAIN, STEP, traceback

CAUSE, LOST, HOST = 0, 1, socket.gethostname()
REFUSED = traceback(MAIN, ends="ValueError: bad")
CLOSED = "Connection closed by peer [10.0.0.2]:4711"
TORCH = ("/usr/lib/python3/site-packages/torch/distributed/c10d.py", 7, "all_reduce", "work.wait()")
SEMAPHORE = ("/usr/lib/python3.11/multiprocessing/synchronize.py", 57, "__init__", "SemLock(")
HUB = ("/usr/lib/python3/site-packages/hub/download.py", 7, "fetch", "raise")
C10D = ("/usr/lib/python3/site-packages/torch/distributed/c10d.py", 9, "barrier", "work = group.barrier()")
NCCL = """torch.distributed.DistBackendError: NCCL error in: ../c10d/NCCLUtils.cpp:77, {} (run with \
NCCL_DEBUG=WARN for details), NCCL version 2.27.5
{}: This usually reflects invalid usage of NCCL library.
Last error:
{}"""
TWICE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device c1000"
TWO = NCCL.format("invalid usage", "ncclInvalidUsage", TWICE)
FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
GONE = NCCL.format(
    "remote process exited", "ncclRemoteError", "socketProgress: Connection closed by remote peer"
)
FATAL = """
Fatal Python error: Segmentation fault

Thread 0x00007f (most recent call first):
  File "/usr/lib/python3/site-packages/tqdm/_monitor.py", line 60 in run

Current thread 0x00007e (most recent call first):
  File "/usr/lib/python3/site-packages/torch/nn.py", line 7 in forward
  File "/home/me/train.py", line 41 in step
  File "/home/me/train.py", line 90 in <module>

Extension modules: numpy (total: 1)
"""
LATER = "\n".join(f"step {n}" for n in range(50))
# Exit code, the log, what is expected: consequence, status, and words of the line.
ENDS = {
    "an exception": (1, REFUSED, CAUSE, 1, "ValueError: bad (train.py line 90"),
    "a program that is wrong": (1, traceback(MAIN, ends="NameError: x"), CAUSE, 2, "NameError: x"),
    "the package's own": (1, traceback(MAIN, ends="ddp_lib.errors.UserError: no"), CAUSE, 2, ": no"),
    "a crash in C": (-11, "step 1\n", CAUSE, 139, "died of SIGSEGV"),
    "a status of its own": (7, "bye\n", CAUSE, 7, "ended with status 7; it printed last: bye"),
    "a caught exception, and 1 much later": (1, REFUSED + LATER, CAUSE, 1, "it printed last: step 49"),
    "a lost peer": (1, traceback(MAIN, TORCH, ends=f"RuntimeError: {CLOSED}"), LOST, 75, CLOSED),
    "another library's peer": (1, traceback(MAIN, HUB, ends=f"RuntimeError: {CLOSED}"), CAUSE, 1, CLOSED),
    "no shared memory": (1, traceback(MAIN, SEMAPHORE, ends="OSError: [Errno 28]"), CAUSE, 1, "/dev/shm has"),
    "a killed rank": (-9, "step 1\n", CAUSE, 137, "died of SIGKILL"),
    "stopped from outside": (-15, "step 1\n", CAUSE, 143, "died of SIGTERM"),
    "NCCL's watchdog": (-6, f"{LATER}\nWatchdog caught collective operation timeout\n", LOST, 75, "watchdog"),
    "NCCL's lost peer": (-6, "what(): ncclSystemError: Connection reset by peer\n", LOST, 75, "lost it"),
    "NCCL's cause": (1, traceback(MAIN, C10D, ends=TWO), CAUSE, 1, f"{TWICE}: two ranks have taken one GPU"),
    "NCCL's cause, aborted": (-6, f"terminate called\nwhat(): {TWO}\n", CAUSE, 134, f"({TWICE}): two ranks"),
    "a full GPU": (1, traceback(MAIN, ends=FULL), CAUSE, 1, f" on {HOST}: {FULL}: the GPU is full"),
    "NCCL's lost peer, raised": (1, traceback(MAIN, C10D, ends=GONE), LOST, 75, "remote peer: another rank"),
    "a crash with stacks": (-11, f"step 1\n{FATAL}", CAUSE, 139, "SIGSEGV at train.py line 41 in step"),
    "an exception, then an abort": (-6, REFUSED + FATAL, CAUSE, 1, "ValueError: bad (train.py line 90"),
    "a crash of a worker": (1, FATAL + REFUSED, CAUSE, 1, "ValueError: bad (train.py line 90"),
    "an abort": (-6, "free(): invalid pointer\n", CAUSE, 134, "died of SIGABRT"),
}  # fmt: skip


@pytest.fixture
def fail(tmp_path):
    """fail(rank, code, log, error=None, age_s=0): a rank that ended so, as torch says it, and its log."""

    def make(rank: int, code: int, text: str, error: dict | None = None, age_s: float = 0.0):
        log, error_file = tmp_path / f"rank{rank}.log", tmp_path / f"{rank}.json"
        log.write_text(text)
        written = log.stat().st_mtime - age_s
        os.utime(log, (written, written))
        if error:
            extra = {"timestamp": str(int(written)), "py_callstack": "", "time": written, **error}
            error_file.write_text(json.dumps({"message": {"message": extra.pop("line"), "extraInfo": extra}}))
        return ProcessFailure(rank, 100 + rank, code, str(error_file)), log

    return make


@pytest.mark.parametrize("how", ENDS)
def test_an_end_is_read_from_status_and_log(fail, how):
    code, text, consequence, status, words = ENDS[how]
    failure = read_failure(3, *fail(3, code, text))
    assert (failure.consequence, failure.status) == (consequence, status)
    assert failure.line.startswith("rank 3 on ") and words in failure.line


@pytest.mark.parametrize("free", [0, 1])
def test_the_full_disk_of_a_log_is_named(fail, monkeypatch, tmp_path, free):
    process, log = fail(0, 1, "step 1\n")
    logs = RankLogs(tmp_path, None, None)
    logs.paths[0] = log
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=free))
    line = cause_of({0: process}, logs).line
    assert f"; its log: {log}" in line and line.endswith(", whose disk is full") is (free == 0)


def test_a_machine_is_named_once(fail):
    report = {"line": f"{HOST}: its disk is full", "consequence": False}
    assert read_failure(1, *fail(1, 1, "", report)).line == f"rank 1 on {HOST}: its disk is full"
    for text in (
        f"rank 1 on {HOST}: no",
        f"{HOST} (10.0.0.1) did not come",
        f"Python differs on {HOST}, but",
    ):
        assert say_where(text) == text
    assert say_where(f"the disk of {HOST}-2 is full") == f"{HOST}: the disk of {HOST}-2 is full"


def test_what_a_rank_reported_stands_though_it_was_killed_afterwards(fail):
    report = {"line": "--data x is no folder", "consequence": False, "status": 2}
    failure = read_failure(0, *fail(0, -signal.SIGKILL, "", report))
    assert failure.status == 2 and failure.line.endswith(": --data x is no folder")


@pytest.mark.parametrize(("age_s", "first"), [(3.0, 0), (60.0, 1)])
def test_an_exception_of_a_rank_that_was_ended_counts_if_it_was_new(fail, tmp_path, age_s, first):
    """Rank 0 hangs after its exception, rank 1 fails for it; or rank 0 has caught one long ago."""
    logs = RankLogs(tmp_path, None, None)
    failures = {}
    for rank, code, text, age in (0, -15, REFUSED, age_s), (1, 1, traceback(STEP, ends="KeyError: 1"), 0.0):
        failures[rank], logs.paths[rank] = fail(rank, code, text, age_s=age)
    assert cause_of(failures, logs, ended={0}).rank == first


def test_the_line_of_another_rank_is_not_waiting_for_an_unknown_one(fail):
    heard = {"line": "rank 0 on a: no room", "consequence": True, "status": 75}
    own = {"line": f"another rank is gone ({CLOSED})", "consequence": True, "status": 75}
    assert not read_failure(1, *fail(1, 75, "", heard)).waited
    assert read_failure(1, *fail(1, 75, "", own)).waited


@pytest.mark.parametrize(("text", "stays"), [('{"message": {}}', True), ('{"mess', False), ("", False)])
def test_a_half_written_error_file_goes(tmp_path, text, stays):
    path = tmp_path / "error.json"
    drop_half_written(path)  # there is none
    path.write_text(text)
    drop_half_written(path)
    assert path.exists() == stays
