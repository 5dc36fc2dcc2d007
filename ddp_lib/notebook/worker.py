"""The inside of the processes that `run_ranks` starts: the ranks, and the host of their store.

They are forked from a server that has imported torch. The notebook's process imports this module too,
to name these functions, and does not wait for torch.
"""

import gc
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from ddp_lib.processes.forkserver import take_thread_budget


@dataclass(frozen=True)
class Frame:
    """One line of a stack: where it is, and in which function."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Failure:
    """An exception in a rank, without its objects, which may not outlive the process."""

    kind: str
    text: str
    frames: list[Frame]
    time: float


def _frames(summary: traceback.StackSummary) -> list[Frame]:
    return [Frame(f.filename, f.lineno or 0, f.name) for f in summary]


def host_store(connection: Connection) -> None:
    """Hosts the ranks' store, as torchrun's agent does, and sends its port; until the other end of
    `connection` closes. So no port is picked that another program could take before rank 0 opens it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch.distributed as dist

    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )
    connection.send(port)
    connection.poll(None)
    del store


def run(connection: Connection, work: bytes, env: dict[str, str], folder: str, output: str) -> None:
    """The body of a rank. Is sent the port of the store; sends ("done", pickled result), ("failed",
    Failure) and, when asked while it runs, ("stands", frames)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook's process decides
    _print_to(output)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    import torch.distributed as dist

    gc.freeze()  # what was imported is not this rank's garbage: collecting passes it over
    dist.set_debug_level_from_env()  # torch reads TORCH_DISTRIBUTED_DEBUG when it loads
    take_thread_budget()
    try:
        os.environ["MASTER_PORT"] = str(connection.recv())
    except EOFError:
        return  # the notebook's process is gone
    sending = threading.Lock()

    def listen() -> None:
        main = threading.main_thread().ident
        try:
            while True:
                connection.recv()  # the only question: where does this rank stand?
                stack = traceback.extract_stack(sys._current_frames()[main or 0])
                with sending:
                    connection.send(("stands", _frames(stack)))
        except (EOFError, OSError):
            os._exit(1)  # the notebook's process is gone

    threading.Thread(target=listen, name="listen", daemon=True).start()
    answer = _answer(work)
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    with sending:
        connection.send(answer)


def _print_to(output: str) -> None:
    """Sends this process's output, also that of C++ code and of children, to a file."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)


def _answer(work: bytes) -> tuple[str, Any]:
    """Runs the function in a frame of its own, so that its locals (a DDP model) are gone after."""
    try:
        function, args = cloudpickle.loads(work)
        result = function(*args)
        try:
            return "done", cloudpickle.dumps(result)
        except Exception as error:
            what = f"what the function returned cannot be sent back: {_text(error)}"
            return "failed", Failure(type(error).__name__, what, [], time.time())
    except BaseException as error:
        frames = _frames(traceback.extract_tb(error.__traceback__))
        traceback.clear_frames(error.__traceback__)
        return "failed", Failure(type(error).__name__, _text(error), frames, time.time())


def _text(error: BaseException) -> str:
    return str(error).strip()
