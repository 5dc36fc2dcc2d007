"""RankError: what went wrong, on which rank, and in which lines of the reader's code."""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import FrameSummary

from ddp_lib.errors import PEER_GONE, TransientError, first_line, limit_reached
from ddp_lib.processes.stacks import library_call, own_lines


class RankError(RuntimeError):
    """A rank failed, died or hung. `rank` is its number; the text is the same in every run.

    `lines`: those of the reader's own code that an exception came through; `text` is without them.
    `consequence`: this rank failed only because another rank was gone. `time`: when it failed, in seconds
    since the epoch.
    """

    def __init__(
        self,
        rank: int,
        text: str,
        consequence: bool = False,
        failed_at: float = 0.0,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__("\n".join([text, *(f"  {line}" for line in lines)]))
        self.rank, self.text, self.lines = rank, text, lines
        self.text_without_rank = re.sub(rf"\brank {rank}\b", "rank", str(self))  # torch names it, too
        self.consequence = consequence
        self.time = failed_at or time.time()

    def followed_by(self, *lines: str) -> "RankError":
        """This error with more lines."""
        return RankError(self.rank, "\n".join([str(self), *lines]), self.consequence, self.time)

    def _render_traceback_(self) -> list[str]:
        """For IPython: only the error, because the notebook's own stack would not help the reader."""
        return [f"RankError: {self}"]


class Interrupted(KeyboardInterrupt):
    """The kernel's interrupt: ranks and commands have been ended."""

    def _render_traceback_(self) -> list[str]:
        """For IPython: where this process waited for them says nothing."""
        return [f"KeyboardInterrupt: {self}"]


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """A KeyboardInterrupt that leaves the block, or a limit of the system that is reached, is one line in a
    notebook. what: "the ranks have"."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{what} been ended") from None
    except (OSError, RuntimeError, MemoryError, ImportError) as error:
        limit = "" if isinstance(error, RankError) else limit_reached(error)
        if not limit:
            raise
        raise TransientError(f"{limit} ({first_line(error)})") from None


def exception_error(
    rank: int, kind: str, text: str, frames: list[FrameSummary], failed_at: float
) -> RankError:
    """The error for a rank whose function raised an exception of the type `kind` with this text."""
    peer_gone = any(sign in text for sign in PEER_GONE)
    line = f"rank {rank}: {kind}: {text}".rstrip(": ")
    return RankError(rank, line, peer_gone, failed_at, own_lines(frames))


def death_error(rank: int, exit_code: int | None, last_line: str) -> RankError:
    """The error for a rank whose process ended (exit code None: with its machine); `last_line` is the last
    one that it printed."""
    if exit_code is None:
        return RankError(rank, f"rank {rank}: its machine is gone")
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
    return RankError(min(stacks), "\n".join([f"still running after {timeout_s:g} s", *standing(stacks)]))


def standing(stacks: dict[int, list[FrameSummary] | None]) -> list[str]:
    """Lines that say where each rank stands; see `hang_error`."""
    lines = []
    for rank, frames in stacks.items():
        if frames is None:
            lines.append(f"rank {rank} does not answer when asked for its stack")
            continue
        call = library_call(frames)
        lines.append(f"rank {rank} is in {call}" if call else f"rank {rank} runs its own code")
        lines += [f"  {line}" for line in own_lines(frames)]
    return lines


def readable(text: str) -> str:
    """An error's message without what differs from run to run and from build to build: addresses, C++ file
    names, and whether the system says that a connection was closed, reset or broken."""
    text = re.sub(r"\[/\S+:\d+\] ?", "", text).partition("\n Original exception")[0]
    text = re.sub(r", TensorDtypes=.*?\)\)\)", ")", text).partition(".Collectives differ")[0]
    return re.sub(r".*(Connection (closed|reset) by peer|Broken pipe).*", "Connection closed by peer", text)
