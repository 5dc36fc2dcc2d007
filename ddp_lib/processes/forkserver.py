"""Ranks forked from a server that has only imported torch: the server, and how a fork becomes a rank.

Used by run_ranks and by ddp-launch. Importing torch takes each process seconds and hundreds of megabytes. A
fork shares the memory and takes a tenth of a second.
"""

import errno
import faulthandler
import gc
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.util import Finalize, get_temp_dir
from types import ModuleType
from typing import Any

from ddp_lib.errors import TransientError, UserError, limit_reached
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.signals import default_grace_s, stop_signals
from ddp_lib.processes.temporary import temporary_folder

# The server's PYTHONSAFEPATH, which is not meant for the programs that a rank starts.
_SERVERS_OWN = "fork server"


def context() -> Any:
    """multiprocessing's context: the fork server, which has no threads that a fork would lose. Spawn if
    there is none, and on macOS, whose frameworks do not survive a fork."""
    forks = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return multiprocessing.get_context("forkserver" if forks else "spawn")


def start_server(preload: list[str]) -> None:
    """Starts the fork server, unless it runs already. Does not wait until it has imported `preload`, the
    modules that its forks share."""
    here = context()
    if here.get_start_method() != "forkserver":
        return
    from multiprocessing import resource_tracker
    from multiprocessing.forkserver import ensure_running

    here.set_forkserver_preload(["ddp_lib.processes.no_gc", *preload])
    # For the server: a process with threads must not be forked; and Python must not look for its own modules
    # in the working directory, where somebody's script may be called queue.py.
    with _environment(OMP_NUM_THREADS="1", PYTHONSAFEPATH=os.environ.get("PYTHONSAFEPATH") or _SERVERS_OWN):
        _make_socket_folder()
        resource_tracker.ensure_running()  # it would unblock Ctrl-C if it started inside
        with _block_stop_signals():
            ensure_running()


# The most bytes that the path of multiprocessing's folder for sockets may have: Linux allows a socket 107 and
# macOS 103, of which its name in the folder takes 18.
_SOCKET_FOLDER = 80


def _make_socket_folder() -> None:
    """Has multiprocessing, here and in the ranks, keep its sockets in this process's temporary folder, or in
    /tmp if TMPDIR is too long for them. UserError if they can be kept in neither."""
    old = tempfile.tempdir
    try:
        own = str(temporary_folder())
        long = len(os.fsencode(own)) + len("/pymp-12345678") > _SOCKET_FOLDER
        tempfile.tempdir = "/tmp" if long and os.path.isdir("/tmp") else own
        get_temp_dir()  # made once per process
    except OSError as error:
        raise _no_folder(error) from None
    finally:
        tempfile.tempdir = old


def _no_folder(error: OSError) -> UserError:
    """Why there is none. Python may have tried several places, and then says only that none can be used."""
    where = tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp"
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            file.write(b"x")
    except OSError as why:
        error = why
    limit, full = limit_reached(error), error.errno in (errno.ENOSPC, errno.EDQUOT)
    cure = f"{'free it, or ' if full else ''}set TMPDIR to a short path that can be written"
    kind = TransientError if limit or full else UserError
    return kind(f"cannot make a folder in {where}: {limit or f'{error.strerror}: {cure}'}")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables for the processes that are started inside."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _block_stop_signals() -> Iterator[None]:
    """A process started inside does not hear Ctrl-C, which a terminal and Jupyter send to every process, nor
    SIGTERM and SIGHUP, as SLURM, systemd and `timeout` do: the server would print a traceback while torch
    loads, or end, and nobody would wait until its ranks have saved. This process still gets them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def no_main_module() -> Iterator[None]:
    """Keeps multiprocessing from running the caller's script again in each process started inside."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def run_rank(function: str, *args: object) -> None:
    """Makes this fork a rank, with signals, output and threads as torchrun's; its exit status is what
    `function` returns. It is named as package.module:function, so that the launcher need not import it."""
    with as_exit_status() as outcome:  # torch would keep an exception in a file of its own
        _become_rank()
        module, _, name = function.partition(":")
        outcome.status = getattr(import_module(module), name)(*args) or 0
    agent = multiprocessing.parent_process()
    if agent and not agent.is_alive():  # torch would wait for it for ever
        sys.stdout.flush()
        os._exit(outcome.status)
    Finalize(None, _leave_threads, (outcome.status,), exitpriority=0)
    sys.exit(outcome.status)  # torch's agent knows no other success than 0


def _leave_threads(status: int) -> None:
    """At the process's end, which would wait for ever for a thread of the reader's code that never ends."""
    mine = (threading.main_thread(), threading.current_thread())
    left = [thread.name for thread in threading.enumerate() if not thread.daemon and thread not in mine]
    seconds = default_grace_s()

    def end() -> None:
        time.sleep(seconds)
        what = f"{', '.join(left)} of the model still runs {seconds:g} s after the end"
        print(f"[rank {os.environ['RANK']}] thread {what}: left", file=sys.stderr, flush=True)
        os._exit(status)

    if left:
        threading.Thread(target=end, daemon=True).start()


def _become_rank() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    unblock_stop_signals()
    if os.environ.get("PYTHONSAFEPATH") == _SERVERS_OWN:
        del os.environ["PYTHONSAFEPATH"]
    agent = multiprocessing.parent_process()
    if agent is not None:
        terminals = [file for file in (1, 2) if os.isatty(file)]
        threading.Thread(
            target=_stop_after, args=(agent.sentinel, terminals), name="agent", daemon=True
        ).start()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            # Whole lines, also with `python -u`: ranks share the pipe.
            stream.reconfigure(line_buffering=True, write_through=False)
    faulthandler.enable()  # a death by SIGSEGV or SIGABRT leaves its stacks
    set_threads()
    restore_start_method()
    collect_garbage()
    from torch.multiprocessing import _set_thread_name

    _set_thread_name(f"ddp-rank{os.environ['RANK']}")  # for ps, top and pkill


def _stop_after(sentinel: int, terminals: list[int]) -> None:
    """Sends this rank SIGTERM when the ddp-launch that started it is gone (killed). Its terminal may be gone
    too: what this rank prints while it saves must not fail. terminals: files that lead there."""
    wait([sentinel])
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in terminals:
        os.dup2(nowhere, file)
    os.kill(os.getpid(), signal.SIGTERM)


def restore_start_method() -> None:
    """In the fork: processes that it starts, such as a DataLoader's workers, get the platform's default start
    method, as in a rank of torchrun. Else they would come from a fork server of the fork's own."""
    multiprocessing.set_start_method(None, force=True)


def collect_garbage() -> None:
    """Turns garbage collection on, see no_gc.py; it skips all that was imported so far."""
    gc.freeze()
    gc.enable()


def set_threads() -> None:
    """Needed in a fork, since torch read OMP_NUM_THREADS when the server loaded it."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(int(threads))


def unblock_stop_signals() -> None:
    """In the fork: the server has them blocked, see `_block_stop_signals`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
