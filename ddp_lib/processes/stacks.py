"""Python stacks: which lines are the reader's own, and where another process stands, by py-spy."""

import json
import linecache
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

from ddp_lib.errors import UserError

# Where code lies that is not the reader's: Python's, installed packages' and this package's. "<string>" and
# "<frozen ...>" are the code with which Python starts a process.
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parent.parent),
    "<",
)
# Functions of torch that only wrap the one that was called.
_WRAPPERS = {"wrapper", "_call_impl", "_wrapped_call_impl", "inner", "decorate_context"}


def is_library(file: str) -> bool:
    """Whether the file is not the reader's code."""
    return file.startswith(_LIBRARIES) or "site-packages" in file


def describe(frame: FrameSummary) -> str:
    """A line of code and where it stands; a notebook's cell has a made-up file name in each kernel."""
    where = "" if "ipykernel" in frame.filename else f"{os.path.basename(frame.filename)} "
    return f"{where}line {frame.lineno} in {frame.name}: {frame.line}".rstrip(": ")


def own_lines(frames: Sequence[FrameSummary]) -> list[str]:
    """The lines of a stack that are the reader's code, outermost first."""
    return [describe(frame) for frame in frames if not is_library(frame.filename)]


def library_call(frames: Sequence[FrameSummary]) -> str:
    """The library function that the reader's innermost line called; empty if it called none."""
    own = [index for index, frame in enumerate(frames) if not is_library(frame.filename)]
    below = frames[own[-1] + 1 :] if own else frames[::-1]
    return next((frame.name for frame in below if frame.name not in _WRAPPERS), "")


def stack_of(pid: int, timeout_s: float = 10.0) -> list[FrameSummary]:
    """The stack of another Python process's main thread, outermost frame first, also while it is in C++.

    UserError if py-spy is not installed, may not look (it reads the process's memory), or takes too long.
    """
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        raise UserError("py-spy is not installed: pip install py-spy")
    command, done = [program, "dump", "--json", "--pid", str(pid)], None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        threads = json.loads(done.stdout)
        main = next((thread for thread in threads if thread["os_thread_id"] == pid), threads[0])
    except subprocess.TimeoutExpired:
        raise UserError(f"py-spy did not read the stack of process {pid} within {timeout_s:g} s") from None
    except (ValueError, LookupError, OSError):
        reason = " ".join(done.stderr.split())[:200] if done else "it does not start"
        raise UserError(
            f"py-spy cannot look at process {pid} ({reason}): run this as the same user or with sudo; in a "
            "container, start it with --cap-add SYS_PTRACE"
        ) from None
    places = [(frame["filename"], frame["line"], frame["name"]) for frame in reversed(main["frames"])]
    return [FrameSummary(*place, line=linecache.getline(*place[:2]).strip()) for place in places]
