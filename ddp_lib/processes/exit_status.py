"""Turns a failure into one line and an exit status, and finds which of several was the cause."""

import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from ddp_lib.errors import (
    MAY_PASS,
    WILL_FAIL_AGAIN,
    PeerError,
    TransientError,
    UserError,
    first_line,
    gpu_cause,
    is_peer_gone,
    is_timeout,
    limit_reached,
    text_of,
)
from ddp_lib.processes.signals import AGENT

Failure = TypeVar("Failure")


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The earliest failure that is not the consequence of another, if there is such a failure.

    A failure has a `time` and a `consequence`: 0 for a cause, 1 for a consequence of another rank's failure,
    2 if the launcher ended the rank. Of failures at the same time, the first in the order given.
    """
    return min(failures, key=attrgetter("consequence", "time"))


def print_error(line: str) -> None:
    """All failures are printed here, each in one line whatever a path or a value in it holds."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    try:
        print(f"ddp-launch: error: {shown}", file=sys.stderr, flush=True)
    except OSError:  # the disk that it is on is full: the exit status still says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except ValueError:  # the program has closed it
        pass


@dataclass
class Outcome:
    """How a process ends; `status` is its exit status."""

    status: int = 0
    reported: BaseException | None = None

    @contextmanager
    def reported_first(
        self, published_error: Callable[[], UserError | None], silent_ranks: Callable[[], UserError | None]
    ) -> Iterator[None]:
        """Reports an exception before it leaves the block: leaving the process group may hang.

        published_error, silent_ranks: return the cause, if known, for a rank that lost another rank, or that
        timed out.
        """
        try:
            yield
        except BaseException as error:
            self.report(error, published_error, silent_ranks)
            raise

    def report(
        self,
        error: BaseException,
        published_error: Callable[[], UserError | None] = lambda: None,
        silent_ranks: Callable[[], UserError | None] = lambda: None,
    ) -> None:
        """Sets the status, and prints one line or leaves it to the agent that started this rank."""
        if error is self.reported:
            return
        self.reported, self.status = error, getattr(error, "status", WILL_FAIL_AGAIN)
        text = text_of(error)
        text = ": ".join(gpu_cause(text) or [" ".join(text.split())[:300]])
        match error:
            case UserError():
                self._say(str(error), consequence=isinstance(error, PeerError))
            case KeyboardInterrupt():
                self.status = 130
            case BrokenPipeError():
                # The reader of the output (`| head`) has ended: nothing may be printed, even at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self.status = 128 + signal.SIGPIPE
                if AGENT in os.environ:  # the agent must say why a rank left
                    self._say("nothing reads the output any more: send it to a file")
            case SystemExit():
                self.status = error.code if isinstance(error.code, int) else int(bool(error.code))
            case OSError() | RuntimeError() | MemoryError() | ImportError() if limit := limit_reached(error):
                self.status = MAY_PASS
                self._say(f"{limit} ({first_line(error)})")
            case OSError(errno=errno.ENOSPC, filename=None):  # of a file, `name_disk_errors` has told
                self.status = MAY_PASS
                self._say("the disk that the output or /dev/shm is on is full: free it, or print elsewhere")
            case OSError(filename=str() | bytes() as path):
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                self.status = MAY_PASS if full else self.status
                cure = "free the disk" if full else "correct the path, or unlock it"
                self._say(f"{os.fsdecode(path)!r} cannot be used ({error.strerror}): {cure}")
            case _ if is_peer_gone(error):
                cause = published_error() or TransientError(
                    f"another rank is gone: see its own output ({text})"
                )
                self.status = cause.status
                self._say(str(cause), consequence=True)
            case _ if is_timeout(error):
                self.status = MAY_PASS
                silent = None if AGENT in os.environ else silent_ranks()  # an agent knows better
                line = f"timed out waiting for another rank, --timeout-s long ({text})"
                self._say(str(silent or line), consequence=True)
            case ValueError() if "Default process group has not been initialized" in text:
                self._say("the process group is gone: leave destroy_process_group out of the model")
            case _:
                traceback.print_exception(error)
                self._say(f"{type(error).__name__}: {text} (its traceback stands above)")

    def _say(self, line: str, consequence: bool = False) -> None:
        """Prints the line, or writes it to the file that the agent reads."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            now = time.time()
            # torch reads message, timestamp and py_callstack. ddp-launch also reads the others, to find the
            # cause among failures within the same second; it may have to end this process.
            extra: dict[str, Any] = {"timestamp": str(int(now)), "py_callstack": line}
            extra |= {"time": now, "consequence": consequence, "status": self.status}
            with suppress(OSError):  # the disk is full: then the agent knows the status only
                Path(f"{path}.new").write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
                os.replace(f"{path}.new", path)
        if AGENT not in os.environ:
            named = "RANK" not in os.environ or line.startswith("rank ")
            print_error(line if named else f"rank {os.environ['RANK']}: {line}")


@contextmanager
def may_pass_once(began: Callable[[], bool]) -> Iterator[None]:
    """Gives an exception that leaves the block status 1 if `began()`: what has worked for a while may work
    again. Before that, an exception will come again at the next start."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and began():
            error.status = 1  # type: ignore[attr-defined]
        raise


def show_all_names() -> None:
    """Lets print() show what the locale cannot, such as a file's name of another alphabet, with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def require_working_directory() -> None:
    """UserError if the working directory is gone, or this user may not look into it: relative paths, and much
    of Python, would fail in it."""
    try:
        os.stat(".")
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working directory {os.environ.get('PWD', '')} is gone, or closed to this user "
            f"({error.strerror}): cd to another one"
        ) from None


def _open_closed_streams() -> None:
    """A shell's `2>&-` closes a stream. The next file or socket would get its number, and what C++ prints."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, "w")  # noqa: SIM115
            os.dup2(nowhere.fileno(), number)
            setattr(sys, name, nowhere)


@contextmanager
def as_exit_status() -> Iterator[Outcome]:
    """Turns an exception into `outcome.status`, and reports it if that is not done yet."""
    _open_closed_streams()
    outcome = Outcome()
    show_all_names()
    try:
        yield outcome
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            raise
        outcome.report(error)
