"""Turns a failure into one line and an exit status, and finds which of several was the cause."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from ddp_lib.errors import PeerError, UserError, is_peer_gone, is_timeout
from ddp_lib.processes.signals import AGENT

Failure = TypeVar("Failure")


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The earliest failure that is not the consequence of another, if there is such a failure.

    A failure has a `time` and a `consequence`: 0 for a cause, 1 for a consequence of another rank's failure,
    2 if the launcher ended the rank. Of failures at the same time, the first in the order given.
    """
    return min(failures, key=attrgetter("consequence", "time"))


def print_error(line: str) -> None:
    """All failures are printed here."""
    print(f"ddp-launch: error: {line}", file=sys.stderr, flush=True)


@dataclass
class Outcome:
    """How a process ends; `status` is its exit status."""

    status: int = 0
    reported: BaseException | None = None

    @contextmanager
    def reported_first(self, published_error: Callable[[], str]) -> Iterator[None]:
        """Reports an exception before it leaves the block: leaving the process group may hang.

        published_error: returns the cause, if known, for a rank that only lost another rank.
        """
        try:
            yield
        except BaseException as error:
            self.report(error, published_error)
            raise

    def report(self, error: BaseException, published_error: Callable[[], str] = lambda: "") -> None:
        """Sets the status, and prints one line or leaves it to the agent that started this rank."""
        if error is self.reported:
            return
        self.reported, self.status = error, 1
        text = " ".join(str(error).split())[:300]
        match error:
            case UserError():
                self.status = 2
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
            case _ if is_peer_gone(error):
                cause = published_error() or f"another rank is gone: see its own output ({text})"
                self._say(cause, consequence=True)
            case _ if is_timeout(error):
                self._say(f"timed out waiting for another rank, --timeout-s long ({text})", consequence=True)
            case _:
                traceback.print_exception(error)
                self._say(f"{type(error).__name__}: {text} (its traceback stands above)")

    def _say(self, line: str, consequence: bool = False) -> None:
        """Prints the line, or writes it to the file that the agent reads."""
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            now = time.time()
            # torch reads message, timestamp and py_callstack. ddp-launch also reads the other two, to find
            # the cause among failures within the same second.
            extra = dict(timestamp=str(int(now)), py_callstack=line, time=now, consequence=consequence)
            with open(path, "w") as file:
                json.dump({"message": {"message": line, "extraInfo": extra}}, file)
        if AGENT not in os.environ:
            named = "RANK" not in os.environ or line.startswith("rank ")
            print_error(line if named else f"rank {os.environ['RANK']}: {line}")


@contextmanager
def as_exit_status() -> Iterator[Outcome]:
    """Turns an exception into `outcome.status`, and reports it if that is not done yet."""
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            raise
        outcome.report(error)
