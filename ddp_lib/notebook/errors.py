"""RankError: what went wrong, on which rank, and in which lines of the reader's code."""

import linecache
import os
import signal
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

from ddp_lib.errors import PEER_GONE
from ddp_lib.notebook.worker import Failure, Frame

# Where code lies that is not the reader's: Python's, installed packages' and this package's.
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parent.parent)}
)
# Functions of torch that only wrap the one that was called.
_WRAPPERS = {"wrapper", "_call_impl", "_wrapped_call_impl", "inner", "decorate_context"}


class RankError(RuntimeError):
    """A rank failed, died or hung. `rank` is its number; the text is the same in every run.

    `consequence`: this rank failed only because another rank was gone. `time`: when it failed, in
    seconds since the epoch.
    """

    def __init__(self, rank: int, text: str, consequence: bool = False, failed_at: float = 0.0) -> None:
        super().__init__(text)
        self.rank = rank
        self.text_without_rank = text.removeprefix(f"rank {rank}")
        self.consequence = consequence
        self.time = failed_at or time.time()

    def _render_traceback_(self) -> list[str]:
        """For IPython: only the error, because the notebook's own stack would not help the reader."""
        return [f"RankError: {self}"]


def source_files(fn: Callable[..., Any]) -> dict[str, str]:
    """The file of each function beside `fn`, by name, and that of `fn` as ""; see `restore_files`."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return {}
    functions = [f for f in fn.__globals__.values() if isinstance(f, FunctionType)]
    return {f.__name__: f.__code__.co_filename for f in functions} | {
        fn.__name__: code.co_filename,
        "": code.co_filename,
    }


def restore_files(frames: list[Frame], files: dict[str, str]) -> list[Frame]:
    """Fills in the frames' file names: cloudpickle sends a function without them."""
    return [
        replace(frame, file=files.get(frame.function, files.get("", frame.file)))
        if frame.file == "<dynamic-code>"
        else frame
        for frame in frames
    ]


def exception_error(rank: int, failure: Failure, files: dict[str, str]) -> RankError:
    """The error for a rank whose function raised an exception."""
    own_lines = _own_lines(restore_files(failure.frames, files))
    lines = [f"rank {rank}: {failure.kind}: {failure.text}".rstrip(": "), *own_lines]
    peer_gone = any(sign in failure.text for sign in PEER_GONE)
    return RankError(rank, "\n".join(lines), peer_gone, failure.time)


def death_error(rank: int, exit_code: int, last_line: str) -> RankError:
    """The error for a rank whose process ended; `last_line` is the last one that it printed."""
    if exit_code < 0:
        text = f"rank {rank}: died of {signal.Signals(-exit_code).name}"
    else:
        text = f"rank {rank}: ended with status {exit_code} before its function returned"
    # The only clue to the cause of an abort is what C++ prints.
    if exit_code == -signal.SIGABRT and "what():" in last_line:
        text += f" ({last_line.partition('what():')[2].rpartition('] ')[2].strip()})"
    return RankError(rank, text)


def hang_error(stacks: dict[int, list[Frame] | None], timeout_s: float, files: dict[str, str]) -> RankError:
    """The error for ranks that are still running; `stacks` by rank, None if a rank did not answer."""
    lines = [f"still running after {timeout_s:g} s"]
    for rank, frames in stacks.items():
        if frames is None:
            lines.append(f"rank {rank} does not answer when asked for its stack")
            continue
        frames = restore_files(frames, files)
        call = _library_call(frames)
        lines.append(f"rank {rank} is in {call}" if call else f"rank {rank} runs its own code")
        lines += _own_lines(frames)
    return RankError(min(stacks), "\n".join(lines))


def _is_own(frame: Frame) -> bool:
    """Whether the frame is the reader's code."""
    # "<string>" and "<frozen ...>" are the code with which Python starts a process.
    return not frame.file.startswith((*_LIBRARIES, "<")) and "site-packages" not in frame.file


def _own_lines(frames: list[Frame]) -> list[str]:
    """The lines of a stack that are the reader's code, outermost first."""
    lines = []
    for frame in frames:
        if not _is_own(frame):
            continue
        source = linecache.getline(frame.file, frame.line).strip()
        # A notebook's cell has a made-up file name, different in each kernel.
        is_cell = "ipykernel" in frame.file
        where = "" if is_cell else f"{os.path.basename(frame.file)} "
        lines.append(f"  {where}line {frame.line} in {frame.function}: {source}".rstrip(": "))
    return lines


def _library_call(frames: list[Any]) -> str | None:
    """The library function that the reader's innermost line called; None if it called none."""
    own = [index for index, frame in enumerate(frames) if _is_own(frame)]
    for frame in frames[own[-1] + 1 :] if own else frames[::-1]:
        if frame.function not in _WRAPPERS:
            return str(frame.function)
    return None
