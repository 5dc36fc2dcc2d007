"""Ctrl-C, SIGTERM and a closed terminal: all ranks stop together, soon and cleanly."""

import math
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_relayed: list[int] = []  # signals that this process has sent itself
# In the environment of ranks that a ddp-launch has started: its process id, its --grace-s, and how many times
# it had started the ranks before.
AGENT, GRACE, STARTS = "DDP_LIB_AGENT", "DDP_LIB_GRACE_S", "DDP_LIB_STARTS"
_GRACE_S = 30.0
# A person's second Ctrl-C comes later than this. A notebook's interrupt of `!ddp-launch` sends Ctrl-C,
# SIGHUP, SIGINT and SIGKILL within half a second; the ranks then save by themselves.
AGAIN_S = 1.0
# Linux's struct ucred: process, user and group id of who wrote to a socket.
_PID, _CREDENTIALS = struct.Struct("i"), socket.CMSG_SPACE(struct.calcsize("3i"))
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(SystemExit):
    """A signal has ended this rank; the code is 128 + its number."""


class StopSignal:
    """Inside `with StopSignal() as stop:` a signal ends the process with status 128 + its number.

    Raises Stopped, a SystemExit, at once. While `stop.deferred` is true it only sets `stop.requested`, for a
    loop that agrees with the other ranks on the step at which to stop. A process blocked inside C++, such as
    a rank in a collective, runs no Python handler. So a thread calls `at_last` with the signal's number
    (default: exit with 128 + number) `grace_s` seconds after the first signal (default: what ddp-launch was
    given as --grace-s, else 30) or, if `impatient`, at the second Ctrl-C.

    Does nothing outside the main thread or without `with`: notebooks keep their own handlers.
    """

    def __init__(
        self,
        grace_s: float | None = None,
        at_last: Callable[[int], None] | None = None,
        impatient: bool = False,
    ) -> None:
        self.requested = 0
        self.deferred = False
        self._grace_s = default_grace_s() if grace_s is None else grace_s
        self._at_last = at_last or (lambda number: os._exit(128 + number))
        self._impatient = impatient
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            if hasattr(socket, "SO_PASSCRED"):  # Linux: each byte comes with its writer's process id
                self._reader.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._old = {n: signal.signal(n, self._handle) for n in stop_signals()}
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="stop", daemon=True).start()
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            self._restore()
            self._writer.close()  # the thread reads end of file and ends

    def _restore(self) -> None:
        """Also called in a forked child (a DataLoader's worker), which handles its own signals."""
        old, self._old = self._old, {}
        if old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in old.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: object) -> None:
        self.requested = number
        if not self.deferred:
            raise Stopped(128 + number)

    def _watch(self) -> None:
        """Runs in a thread. Python writes each signal's number to the socket as it arrives, even while the
        main thread is inside C++."""
        with self._reader:
            number, deadline, presses, pressed_s = 0, 0.0, 0, -math.inf
            while True:
                try:
                    if number:
                        self._reader.settimeout(max(0.001, deadline - time.monotonic()))
                    received, ancillary, _, _ = self._reader.recvmsg(1, _CREDENTIALS)
                except TimeoutError:
                    break
                if not received:
                    return
                # A fork that has just begun still writes here: its signals are its own.
                others = any(_PID.unpack_from(data)[0] != os.getpid() for _, _, data in ancillary)
                if received[0] in _SIGNALS and not others:
                    if received[0] in _relayed:
                        _relayed.remove(received[0])
                    elif received[0] == signal.SIGINT and time.monotonic() - pressed_s > AGAIN_S:
                        pressed_s = time.monotonic()
                        presses += 1  # a second SIGTERM may be the same stop, heard from another machine
                    if self._impatient and presses == 2:
                        break
                    if not number:  # further signals do not extend the grace time
                        number, deadline = received[0], time.monotonic() + self._grace_s
            self._at_last(number)


def default_grace_s() -> float:
    """The --grace-s of the ddp-launch that has started this rank."""
    return float(os.environ.get(GRACE, _GRACE_S))


def stop_signals() -> list[signal.Signals]:
    """The signals that ask to stop; without SIGHUP if `nohup` has switched it off."""
    return [each for each in _SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]


def relay(number: int) -> None:
    """Sends this process a signal that another machine has got: nobody has pressed Ctrl-C here."""
    _relayed.append(number)
    os.kill(os.getpid(), number)


def kill_descendants() -> None:
    """Kills every process that this process started, and their children.

    Spares multiprocessing's resource tracker, which ends after this process and tidies up.
    """
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended, or is another user's
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
