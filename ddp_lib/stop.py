"""Ctrl-C and SIGTERM in a rank: leave in order, together, and soon."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Inside `with StopSignal() as stop:` a signal ends the process with status 128 + its number.

    At once, by SystemExit, but within `stop.deferred()` it only sets `stop.requested`, for a loop
    that agrees with the other ranks on the step at which to leave. A rank that is blocked inside a
    collective runs no Python handler: a thread ends it `grace_s` seconds after the signal.

    Outside the main thread, and without `with`, it does nothing: notebooks keep their own handlers.
    """

    def __init__(self, grace_s: float = 4.0) -> None:
        self.requested = 0
        self.grace_s = grace_s
        self._deferred = False
        self._old: dict[int, Any] = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._writer.close()  # the thread reads the end and leaves

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if not self._deferred:
            raise SystemExit(128 + number)

    def _watch(self) -> None:
        """Runs in a thread: Python writes each signal's number to the socket as it arrives, also
        while the main thread is inside C++."""
        with self._reader:
            while received := self._reader.recv(1):
                if received[0] in _SIGNALS:
                    self._reader.settimeout(self.grace_s)
                    deadline = time.monotonic() + self.grace_s
                    try:
                        while self._reader.recv(1) and time.monotonic() < deadline:
                            pass  # further signals do not lengthen the grace
                        if time.monotonic() < deadline:
                            return
                    except TimeoutError:
                        pass
                    os._exit(128 + received[0])


AGENT = "DDP_LIB_AGENT"  # process number of the ddp-launch that started this rank


def leave_with_agent() -> None:
    """Makes this rank stop as by SIGTERM when the ddp-launch that started it is gone (killed)."""
    agent = os.environ.get(AGENT)
    if agent is None:
        return

    def watch() -> None:
        while os.getppid() == int(agent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="agent", daemon=True).start()
