"""What runs in the processes that `run_ranks` and `%ranks` start: the ranks, and the host of their store.

They are forked from a server that has imported torch. The notebook's process imports this module too, to
refer to these functions, so torch is not imported at the top: the notebook would wait for it.
"""

import builtins
import gc
import io
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError, text_of
from ddp_lib.processes.forkserver import (
    collect_garbage,
    restore_start_method,
    set_threads,
    unblock_stop_signals,
)
from ddp_lib.processes.signals import kill_descendants
from ddp_lib.report import live_cell


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and on which machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    master: str

    def environment(self) -> dict[str, str]:
        """This process's environment and the variables that torchrun would add, except MASTER_PORT."""
        return {
            **os.environ,
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.master,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": "run_ranks",
            # A rank whose function returns at once must not end before the other ranks have connected.
            "TORCH_DIST_INIT_BARRIER": "1",
        }


def host_store(connection: Connection, host: str) -> None:
    """Hosts the ranks' store, as torchrun's agent does, until the other end of `connection` closes.

    host: 127.0.0.1, or the address of this machine that ranks on others use. Sends the store's port over
    `connection`, or the UserError why there is none. The port is open from the moment it is picked, so no
    other program can take it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ddp_lib.distributed import store
    from ddp_lib.distributed.addresses import Endpoint

    try:
        server = store.host_store(Endpoint(host, 0), 60.0, one_machine=host == "127.0.0.1")
    except UserError as error:
        connection.send(error)
        return
    connection.send(server.port)
    connection.poll(None)


class Link:
    """A rank's end of the pipe to the notebook's process, while the rank runs.

    A thread answers "stack" with ("stack", frames), raises KeyboardInterrupt in the main thread at
    "interrupt" (if the main thread handles SIGINT), and keeps other messages in `inbox`. If the notebook's
    process is gone, it ends this process and those below it. files: see `summaries`.
    """

    def __init__(self, connection: Connection, files: dict[str, str]) -> None:
        self._connection, self._files = connection, files
        self._sending, self._process = threading.Lock(), os.getpid()
        self._main = threading.main_thread().ident or 0
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._listen, name="send_stacks", daemon=True).start()

    def send(self, message: tuple[str, Any]) -> None:
        with self._sending:
            self._connection.send(message)

    def ask(self, prompt: object = "") -> str:
        """input() of a rank, and so breakpoint(): the notebook's process asks the reader."""
        if os.getpid() != self._process:
            raise EOFError("a process that a rank started cannot ask: call input() in the rank itself")
        sys.stdout.flush()
        self.send(("input", str(prompt)))
        kind, text = self.inbox.get()
        if kind == "refused":
            raise RuntimeError(text)
        return str(text)

    def _listen(self) -> None:
        try:
            while True:
                match self._connection.recv():
                    case "stack":
                        stack = traceback.extract_stack(sys._current_frames()[self._main])
                        self.send(("stack", summaries(stack, self._files)))
                    case "interrupt":
                        signal.pthread_kill(self._main, signal.SIGINT)
                    case message:
                        self.inbox.put(message)
        except (EOFError, OSError):
            kill_descendants()
            os._exit(1)


link: Link  # this rank's, set by run_rank


def run_rank(
    connection: Connection,
    work: bytes,
    files: dict[str, str],
    env: dict[str, str],
    folder: str,
    output: str,
    request: Path | None,
) -> None:
    """The main function of a rank's process; `work` is the pickled function with its arguments.

    Over `connection` it first receives the port of the store. It sends ("done", pickled result) or
    ("failed", arguments of `exception_error`); see `Link` for what else passes. `output`: the file for what
    it prints. `request`: see `live_cell`.
    """
    global link
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook's process handles the interrupt
    unblock_stop_signals()  # for programs that the function starts
    _redirect_output(output)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # the server's: TMPDIR may be another one now
    os.chdir(folder)
    import torch.distributed as dist

    live_cell.request = request
    collect_garbage()
    restore_start_method()
    dist.set_debug_level_from_env()  # torch reads TORCH_DISTRIBUTED_DEBUG when it loads
    set_threads()
    try:
        os.environ["MASTER_PORT"] = str(connection.recv())
    except EOFError:
        return  # the notebook's process is gone
    link = Link(connection, files)
    builtins.input = link.ask
    answer = _call_function(work, files)
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # the function has closed it
            stream.flush()
    link.send(answer)


def _redirect_output(output: str) -> None:
    """Redirects this process's output to a file, that of C++ code and of child processes included."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)


def _call_function(work: bytes, files: dict[str, str]) -> tuple[str, Any]:
    """Calls the function and returns the message about its end: see `run_rank`.

    This has a frame of its own, so that the function's locals (a DDP model) are freed when it returns.
    """
    try:
        function, args = cloudpickle.loads(work)
        result = function(*args)
    except BaseException as error:
        message = failure(error, files)
        traceback.clear_frames(error.__traceback__)
        return message
    try:
        return "done", cloudpickle.dumps(result)
    except Exception as error:
        text = f"what the function returned cannot be sent back: {text_of(error)}".strip()
        return "failed", (type(error).__name__, text, [], time.time())


def failure(error: BaseException, files: dict[str, str]) -> tuple[str, Any]:
    """The message about an exception of the reader's code."""
    text, frames = text_of(error).strip(), summaries(traceback.extract_tb(error.__traceback__), files)
    if isinstance(error, SyntaxError) and error.filename:  # its text has a made-up name of the cell's file
        text = error.msg
        frames.append(
            traceback.FrameSummary(error.filename, error.lineno or 0, "<module>", lookup_line=False)
        )
    return "failed", (type(error).__name__, text, frames, time.time())


def summaries(stack: traceback.StackSummary, files: dict[str, str]) -> list[traceback.FrameSummary]:
    """The frames without their code objects, which cannot be sent, and with the names of their files.

    cloudpickle sends a function without its file's name. `files` has it by the function's name, and as ""
    for functions inside the one that was sent.
    """
    frames = []
    for f in stack:
        file = files.get(f.name, files.get("", f.filename)) if f.filename == "<dynamic-code>" else f.filename
        frames.append(traceback.FrameSummary(file, f.lineno or 0, f.name, lookup_line=False))
    return frames
