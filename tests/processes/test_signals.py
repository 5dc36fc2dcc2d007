"""StopSignal: how a rank leaves after a signal."""

import signal

import pytest

from ddp_lib.processes.signals import StopSignal, stop_signals
from tests.lab.processes import TIMEOUT_S, first_line, python

STOP = "import os, signal, sys, time\nfrom ddp_lib.processes.signals import StopSignal\n"

READY = 'print("ready")'

# Each: what the process does, and the status it has after SIGTERM and within the limit.
STOPS = {
    "at once": (f"with StopSignal() as stop:\n    {READY}\n    time.sleep(1000)", 143, ""),
    "cleans up": (
        "with StopSignal() as stop:\n    try:\n        "
        f"{READY}\n        time.sleep(1000)\n    finally:\n        print('cleaned')",
        143,
        "cleaned",
    ),
    "deferred": (
        f"with StopSignal() as stop:\n    stop.deferred = True\n    {READY}\n"
        "    while not stop.requested: time.sleep(0.01)\n    print(stop.requested)",
        0,
        "15",
    ),
    # A mutex that is locked twice waits without end, and runs no Python handler on a signal.
    "inside C": (
        "import ctypes\nlock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "mutex = ctypes.create_string_buffer(64)\nlock(mutex)\n"
        f"with StopSignal(grace_s=0.2) as stop:\n    {READY}\n    lock(mutex)",
        143,
        "",
    ),
    "never looks": (
        f"with StopSignal(grace_s=0.2) as stop:\n    stop.deferred = True\n    {READY}\n"
        "    while True: time.sleep(0.01)",
        143,
        "",
    ),
    "too late": (f"with StopSignal() as stop: pass\n{READY}\ntime.sleep(1000)", -15, ""),
    "not the main thread": (
        "import threading\ndef f():\n    with StopSignal() as stop: pass\n"
        "t = threading.Thread(target=f)\nt.start()\nt.join()\n"
        f"{READY}\ntime.sleep(1000)",
        -15,
        "",
    ),
    # libc's fork runs none of Python's hooks, as if the child hung before them.
    "a fork that has just begun": (
        "import ctypes\nlibc = ctypes.PyDLL(None)\n"
        "with StopSignal(grace_s=0) as stop:\n    stop.deferred = True\n"
        "    if not libc.fork(): libc['raise'](15), os._exit(0)\n"
        f"    os.wait()\n    time.sleep(0.2)\n    {READY}\n    while not stop.requested: time.sleep(0.01)\n"
        "    time.sleep(1000)",
        143,
        "",
    ),
    # A DataLoader ends its forked workers with SIGTERM: not a signal for this process.
    "forked child": (
        "with StopSignal(grace_s=0) as stop:\n    up, tell = os.pipe()\n    child = os.fork()\n"
        "    if not child: os.write(tell, b'up'), time.sleep(1000)\n"
        "    os.read(up, 2)\n    os.kill(child, signal.SIGTERM)\n"
        "    status = os.waitpid(child, 0)[1]\n    time.sleep(0.2)\n"
        f"    assert (status, stop.requested) == (15, 0)\n    {READY}\n    time.sleep(1000)",
        143,
        "",
    ),
}


@pytest.mark.process
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
@pytest.mark.parametrize(("code", "status", "output"), STOPS.values(), ids=STOPS)
def test_a_rank_leaves_after_a_signal(started, code, status, output):
    process = python(STOP + code)
    started.append(process)
    assert first_line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out.strip(), err) == (status, output, "")


@pytest.mark.process
def test_further_signals_do_not_lengthen_the_grace(started):
    process = python(
        STOP
        + f"with StopSignal(grace_s=1) as stop:\n    stop.deferred = True\n    {READY}\n    while True:\n"
        "        time.sleep(0.05)\n        os.kill(os.getpid(), signal.SIGINT)"
    )
    started.append(process)
    assert process.communicate(timeout=TIMEOUT_S)[0] == "ready\n"
    assert process.returncode == 130


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    fd = signal.set_wakeup_fd(-1)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert stop.requested == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(fd) == -1


def test_nohup_is_respected(no_nohup):
    assert signal.SIGHUP in stop_signals()
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, old)
