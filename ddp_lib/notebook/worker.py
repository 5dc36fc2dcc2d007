"""What runs in the processes that `run_ranks` starts: the ranks, and the host of their store.

They are forked from a server that has imported torch. The notebook's process imports this module too, to
refer to these functions, so torch is not imported at the top: the notebook would wait for it.
"""

import gc
import io
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError, text_of
from ddp_lib.processes.forkserver import (
    collect_garbage,
    restore_start_method,
    set_threads,
    unblock_sigint,
)
from ddp_lib.report import live_cell


def host_store(connection: Connection) -> None:
    """Hosts the ranks' store, as torchrun's agent does, until the other end of `connection` closes.

    Sends the store's port over `connection`, or the UserError why there is none. The port is open from the
    moment it is picked, so no other program can take it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ddp_lib.distributed import store
    from ddp_lib.distributed.addresses import Endpoint

    try:
        server = store.host_store(Endpoint("127.0.0.1", 0), 60.0, one_machine=True)
    except UserError as error:
        connection.send(error)
        return
    connection.send(server.port)
    connection.poll(None)


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
    ("failed", arguments of `exception_error`), and ("stack", frames) for each message that it gets while
    it runs. `files`: see `_frames`. `output`: the file for what it prints.
    `request`: see `live_cell`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook's process handles the interrupt
    unblock_sigint()  # for programs that the function starts
    _redirect_output(output)
    os.environ.clear()
    os.environ.update(env)
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
    sending = threading.Lock()

    def send_stacks() -> None:
        try:
            while True:
                connection.recv()  # the only request there is: the stack of this rank
                main = sys._current_frames()[threading.main_thread().ident or 0]
                with sending:
                    connection.send(("stack", _frames(traceback.extract_stack(main), files)))
        except (EOFError, OSError):
            os._exit(1)  # the notebook's process is gone

    threading.Thread(target=send_stacks, name="send_stacks", daemon=True).start()
    answer = _call_function(work, files)
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    with sending:
        connection.send(answer)


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
        frames = _frames(traceback.extract_tb(error.__traceback__), files)
        traceback.clear_frames(error.__traceback__)
        return "failed", (type(error).__name__, text_of(error).strip(), frames, time.time())
    try:
        return "done", cloudpickle.dumps(result)
    except Exception as error:
        text = f"what the function returned cannot be sent back: {text_of(error)}".strip()
        return "failed", (type(error).__name__, text, [], time.time())


def _frames(stack: traceback.StackSummary, files: dict[str, str]) -> list[traceback.FrameSummary]:
    """The frames without their code objects, which cannot be sent, and with the names of their files.

    cloudpickle sends a function without its file's name. `files` has it by the function's name, and as ""
    for functions inside the one that was sent.
    """
    frames = []
    for f in stack:
        file = files.get(f.name, files.get("", f.filename)) if f.filename == "<dynamic-code>" else f.filename
        frames.append(traceback.FrameSummary(file, f.lineno or 0, f.name, lookup_line=False))
    return frames
