"""RankError: what went wrong on which rank, in the reader's own lines."""

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

from ddp_lib.notebook.worker import Failure, Frame
from ddp_lib.processes.exit_status import PEER_GONE

# Code that is not the reader's: Python's, installed packages', this package's.
_LIBRARIES = tuple(
    {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parent.parent)}
)
# Frames of torch that only wrap the call.
_WRAPPERS = {"wrapper", "_call_impl", "_wrapped_call_impl", "inner", "decorate_context"}


class RankError(RuntimeError):
    """A rank failed, died or hung. `rank` is its number; the text is the same from run to run."""

    def __init__(self, rank: int, text: str, consequence: bool = False, at: float = 0.0) -> None:
        super().__init__(text)
        self.rank = rank
        self.what = text.removeprefix(f"rank {rank}")
        self.consequence = consequence
        self.time = at or time.time()

    def _render_traceback_(self) -> list[str]:
        """For IPython: the launching process's own stack says nothing to the reader."""
        return [f"RankError: {self}"]


def source_files(fn: Callable[..., Any]) -> dict[str, str]:
    """File of each function of the reader's, by name, and of `fn` as ""; see `locate`."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return {}
    beside = [f for f in fn.__globals__.values() if isinstance(f, FunctionType)]
    return {f.__name__: f.__code__.co_filename for f in beside} | {
        fn.__name__: code.co_filename,
        "": code.co_filename,
    }


def locate(frames: list[Frame], files: dict[str, str]) -> list[Frame]:
    """Gives frames their files back: cloudpickle sends a function without the name of its file."""
    return [
        replace(frame, file=files.get(frame.function, files.get("", frame.file)))
        if frame.file == "<dynamic-code>"
        else frame
        for frame in frames
    ]


def is_consequence(error: RankError) -> bool:
    """Whether it only says that another rank was gone."""
    return error.consequence


def failed(rank: int, failure: Failure, files: dict[str, str]) -> RankError:
    own = _own(locate(failure.frames, files))
    lines = [f"rank {rank}: {failure.kind}: {failure.text}".rstrip(": "), *own]
    gone = any(sign in failure.text for sign in PEER_GONE)
    return RankError(rank, "\n".join(lines), gone, failure.time)


def died(rank: int, exit_code: int, last_line: str) -> RankError:
    if exit_code < 0:
        text = f"rank {rank}: died of {signal.Signals(-exit_code).name}"
    else:
        text = f"rank {rank}: ended with status {exit_code} before its function returned"
    # What C++ says as it aborts is the only clue there is.
    if exit_code == -signal.SIGABRT and "what():" in last_line:
        text += f" ({last_line.partition('what():')[2].rpartition('] ')[2].strip()})"
    return RankError(rank, text)


def stuck(
    places: dict[int, list[Frame] | None], timeout_s: float, files: dict[str, str]
) -> RankError:
    lines = [f"no end after {timeout_s:g} s"]
    for rank, frames in places.items():
        if frames is None:
            lines.append(f"rank {rank} does not say where it stands")
            continue
        frames = locate(frames, files)
        call = _library_call(frames)
        lines.append(f"rank {rank} stands in {call}" if call else f"rank {rank} runs its own code")
        lines += _own(frames)
    return RankError(min(places), "\n".join(lines))


def _is_own(frame: Frame) -> bool:
    # "<string>" and "<frozen ...>" are how Python itself starts a process.
    return not frame.file.startswith((*_LIBRARIES, "<")) and "site-packages" not in frame.file


def _own(frames: list[Frame]) -> list[str]:
    """The reader's lines of a stack, outermost first."""
    lines = []
    for frame in frames:
        if not _is_own(frame):
            continue
        source = linecache.getline(frame.file, frame.line).strip()
        # A notebook's cell has a made-up file name, another one in each kernel.
        is_cell = "ipykernel" in frame.file
        where = "" if is_cell else f"{os.path.basename(frame.file)} "
        lines.append(f"  {where}line {frame.line} in {frame.function}: {source}".rstrip(": "))
    return lines


def _library_call(frames: list[Any]) -> str | None:
    """The library's function that the reader's innermost line called."""
    own = [number for number, frame in enumerate(frames) if _is_own(frame)]
    for frame in frames[own[-1] + 1 :] if own else frames[::-1]:
        if frame.function not in _WRAPPERS:
            return str(frame.function)
    return None
