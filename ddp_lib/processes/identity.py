"""Which process is meant: a number alone may belong to another one later, or in another container."""

import os
from contextlib import suppress

import psutil


def identify(pid: int) -> list[object]:
    """The system's namespace of process numbers, this number, and when the process began; empty if no such
    process runs. Values that JSON holds."""
    namespace = ""
    with suppress(OSError):  # only Linux has it
        namespace = os.readlink("/proc/self/ns/pid")
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return [namespace, pid, process.create_time()]
    return []
