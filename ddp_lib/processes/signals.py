"""Ctrl-C, SIGTERM and a closed terminal: leave in order, together, and soon."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class StopSignal:
    """Inside `with StopSignal() as stop:` a signal ends the process with status 128 + its number.

    At once, by SystemExit; but while `stop.deferred` is true it only sets `stop.requested`, for a loop
    that agrees with the other ranks on the step at which to leave. A process that is blocked inside
    C++, as a rank in a collective is, runs no Python handler: a thread calls `at_last` (with the
    signal's number; default: leave with 128 + it) `grace_s` seconds after the first signal, or, with
    `impatient`, at the second.

    Outside the main thread, and without `with`, it does nothing: notebooks keep their own handlers.
    """

    def __init__(
        self,
        grace_s: float = 4.0,
        at_last: Callable[[int], None] | None = None,
        impatient: bool = False,
    ) -> None:
        self.requested = 0
        self.grace_s = grace_s
        self._at_last = at_last or (lambda number: os._exit(128 + number))
        self._impatient = impatient
        self.deferred = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old = {n: signal.signal(n, self._handle) for n in stop_signals()}
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="stop", daemon=True).start()
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            self._restore()
            self._writer.close()  # the thread reads the end and leaves

    def _restore(self) -> None:
        """Also in a forked child (a worker of a DataLoader): its signals are not this process's."""
        old, self._old = self._old, {}
        if old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in old.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if not self.deferred:
            raise SystemExit(128 + number)

    def _watch(self) -> None:
        """Runs in a thread: Python writes each signal's number to the socket as it arrives, also
        while the main thread is inside C++."""
        with self._reader:
            number, deadline = 0, 0.0
            while True:
                try:
                    if number:
                        self._reader.settimeout(max(0.001, deadline - time.monotonic()))
                    received = self._reader.recv(1)
                except TimeoutError:
                    break
                if not received:
                    return
                if received[0] in _SIGNALS:
                    if number and self._impatient:
                        break
                    if not number:  # further signals do not lengthen the grace
                        number, deadline = received[0], time.monotonic() + self.grace_s
            self._at_last(number)


def stop_signals() -> list[signal.Signals]:
    """Those that ask to leave; not the closed terminal's where `nohup` has switched that off."""
    return [
        number
        for number in _SIGNALS
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN
    ]


def kill_descendants() -> None:
    """Ends every process that this one started, and theirs, at once.

    All but multiprocessing's resource tracker, which ends after this one, and tidies up.
    """
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
        except psutil.NoSuchProcess:
            continue


AGENT = "DDP_LIB_AGENT"  # in the environment of ranks that a ddp-launch has started
