"""The folder for a process's temporary files."""

import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from filelock import FileLock

# How the folder's name begins, and the file in it that its process has locked.
_PREFIX, _LOCK = "ddp_lib-", ".in-use.lock"


@cache
def temporary_folder() -> Path:
    """This process's folder, in the system's folder for temporary files. It goes when the process ends, or
    if that was killed, when another one makes its own. OSError if it cannot be made."""
    _remove_those_of_killed_processes()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = None
    with suppress(OSError, NotImplementedError):  # a disk without locks
        new = folder / f"{_LOCK}.new"
        lock = FileLock(new, fallback_to_soft=False).acquire()
        new.rename(folder / _LOCK)  # with its lock: nobody ever sees the file without
    # After multiprocessing's own folder, which may be inside. A fork of this process does not remove it.
    Finalize(None, _remove, (folder, lock), exitpriority=-200)
    return folder


@cache
def remove_with_this_process(folder: Path) -> subprocess.Popen[bytes]:
    """Removes the folder as soon as this process has ended, also if it is killed, as Jupyter does with a
    kernel. The shell notices that its input is closed. (It is in a session of its own: it gets no signal.)"""
    command = ["sh", "-c", 'cat; rm -rf -- "$1"', "sh", str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _remove(folder: Path, lock: object) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _remove_those_of_killed_processes() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError, NotImplementedError), FileLock(path, 0, fallback_to_soft=False):
            shutil.rmtree(path.parent, ignore_errors=True)
