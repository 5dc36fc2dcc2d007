"""RankError: what went wrong, on which rank, and in which lines of the reader's code."""

import os
import signal
import sysconfig
import time
from pathlib import Path
from traceback import FrameSummary

from ddp_lib.errors import PEER_GONE

# Where code lies that is not the reader's: Python's, installed packages' and this package's. "<string>" and
# "<frozen ...>" are the code with which Python starts a process.
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(__file__).parent.parent),
    "<",
)
# Functions of torch that only wrap the one that was called.
_WRAPPERS = {"wrapper", "_call_impl", "_wrapped_call_impl", "inner", "decorate_context"}


class RankError(RuntimeError):
    """A rank failed, died or hung. `rank` is its number; the text is the same in every run.

    `consequence`: this rank failed only because another rank was gone. `time`: when it failed, in seconds
    since the epoch.
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


def exception_error(
    rank: int, kind: str, text: str, frames: list[FrameSummary], failed_at: float
) -> RankError:
    """The error for a rank whose function raised an exception of the type `kind` with this text."""
    lines = [f"rank {rank}: {kind}: {text}".rstrip(": "), *_own_lines(frames)]
    peer_gone = any(sign in text for sign in PEER_GONE)
    return RankError(rank, "\n".join(lines), peer_gone, failed_at)


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


def hang_error(stacks: dict[int, list[FrameSummary] | None], timeout_s: float) -> RankError:
    """The error for ranks that are still running; `stacks` by rank, None if a rank did not answer."""
    lines = [f"still running after {timeout_s:g} s"]
    for rank, frames in stacks.items():
        if frames is None:
            lines.append(f"rank {rank} does not answer when asked for its stack")
            continue
        call = _library_call(frames)
        lines.append(f"rank {rank} is in {call}" if call else f"rank {rank} runs its own code")
        lines += _own_lines(frames)
    return RankError(min(stacks), "\n".join(lines))


def _is_own(frame: FrameSummary) -> bool:
    """Whether the frame is the reader's code."""
    return not frame.filename.startswith(_LIBRARIES) and "site-packages" not in frame.filename


def _own_lines(frames: list[FrameSummary]) -> list[str]:
    """The lines of a stack that are the reader's code, outermost first."""
    lines = []
    for frame in filter(_is_own, frames):
        # A notebook's cell has a made-up file name, different in each kernel.
        where = "" if "ipykernel" in frame.filename else f"{os.path.basename(frame.filename)} "
        lines.append(f"  {where}line {frame.lineno} in {frame.name}: {frame.line}".rstrip(": "))
    return lines


def _library_call(frames: list[FrameSummary]) -> str | None:
    """The library function that the reader's innermost line called; None if it called none."""
    own = [index for index, frame in enumerate(frames) if _is_own(frame)]
    below = frames[own[-1] + 1 :] if own else frames[::-1]
    return next((frame.name for frame in below if frame.name not in _WRAPPERS), None)
