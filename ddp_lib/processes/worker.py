"""One rank, as ddp-launch starts it: a fork of a process that has imported torch."""

import faulthandler
import gc
import io
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

from ddp_lib.processes.forkserver import take_thread_budget


def prepare() -> None:
    """Makes this fork a rank as torchrun's would be: its threads, its output, its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _leave_with_agent()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(line_buffering=True)  # lines, and whole ones: ranks share the pipe
    faulthandler.disable()  # torch's agent switches it on; a death by signal is one line here
    take_thread_budget()
    gc.freeze()  # what was imported is not this rank's garbage: collecting passes it over
    from torch.multiprocessing import _set_thread_name

    _set_thread_name(f"ddp-rank{os.environ['RANK']}")  # for ps, top and pkill


def _leave_with_agent() -> None:
    """Makes this rank stop as by SIGTERM when the ddp-launch that started it is gone (killed)."""
    agent = multiprocessing.parent_process()
    if agent is None:
        return

    def watch() -> None:
        wait([agent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="agent", daemon=True).start()
