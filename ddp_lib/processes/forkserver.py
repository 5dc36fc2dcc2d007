"""Processes that share what torch's import costs: forked from one that has imported it, and no more.

The server, and what a fork does first to become a rank.

Used by run_ranks and by ddp-launch. Importing torch takes each process seconds and hundreds of
megabytes; a fork shares both, and takes a tenth of a second.
"""

import faulthandler
import gc
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any


def context() -> Any:
    """multiprocessing's context: fork server where there is one, for it has never computed, and no
    thread is lost in the fork. Spawn elsewhere, and on macOS, whose frameworks do not survive a fork."""
    methods = multiprocessing.get_all_start_methods()
    forkserver = "forkserver" in methods and sys.platform != "darwin"
    return multiprocessing.get_context("forkserver" if forkserver else "spawn")


def start_server(preload: list[str]) -> None:
    """Starts the fork server, if it does not run yet; returns before it has imported `preload`, the
    modules that its forks share."""
    here = context()
    if here.get_start_method() != "forkserver":
        return
    from multiprocessing.forkserver import ensure_running

    here.set_forkserver_preload(preload)
    with _one_thread(), _ignore_sigint():
        ensure_running()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A process with threads must not be forked."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


@contextmanager
def _ignore_sigint() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C, which a terminal and Jupyter send to all: the
    server would print a traceback if it came while torch loads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


@contextmanager
def no_main_module() -> Iterator[None]:
    """Keeps multiprocessing from running the caller's script again in each process started inside."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def become_rank() -> None:
    """Makes this fork a rank as torchrun's would be: its threads, its output, its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _stop_with_agent()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(line_buffering=True)  # lines, and whole ones: ranks share the pipe
    faulthandler.disable()  # torch's agent switches it on; a death by signal is one line here
    set_threads()
    gc.freeze()  # what was imported is not this rank's garbage: collecting passes it over
    from torch.multiprocessing import _set_thread_name

    _set_thread_name(f"ddp-rank{os.environ['RANK']}")  # for ps, top and pkill


def _stop_with_agent() -> None:
    """Makes this rank stop as by SIGTERM when the ddp-launch that started it is gone (killed)."""
    agent = multiprocessing.parent_process()
    if agent is None:
        return

    def watch() -> None:
        wait([agent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="agent", daemon=True).start()


def set_threads() -> None:
    """In the fork: torch read OMP_NUM_THREADS when the server loaded it."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
