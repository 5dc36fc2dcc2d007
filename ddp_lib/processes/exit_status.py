"""Turns a failure into one line and an exit status, and finds which of several was the cause."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ddp_lib.errors import PeerError, UserError, is_peer_gone, is_timeout
from ddp_lib.processes.signals import AGENT


class Failure(Protocol):
    """When a rank failed, and whether another rank's failure was the reason."""

    @property
    def rank(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def consequence(self) -> int:
        """0: a cause; 1: consequence of another rank's failure; 2: ended by the launcher."""


AnyFailure = TypeVar("AnyFailure", bound=Failure)


def first_cause(failures: Iterable[AnyFailure]) -> AnyFailure:
    """The earliest failure that is not the consequence of another, if there is such a failure.

    Of failures at the same time, the first in the order given.
    """
    return min(failures, key=lambda failure: (failure.consequence, failure.time))


def print_error(line: str, prog: str = "ddp-launch") -> None:
    """All failures are printed here."""
    print(f"{prog}: error: {line}", file=sys.stderr, flush=True)


class Peers(Protocol):
    """Where other ranks' errors can be read: distributed.coordination.StoreGroup."""

    def published_error(self) -> str: ...


@dataclass
class Outcome:
    """How a process ends; `status` is its exit status."""

    prog: str = "ddp-launch"
    status: int = 0
    reported: BaseException | None = None

    @contextmanager
    def reported_first(self, peers: Peers | None) -> Iterator[None]:
        """Reports an exception before it leaves the block: leaving the process group may hang.

        peers: asked for the cause if this rank only lost another rank.
        """
        try:
            yield
        except BaseException as error:
            self.report(error, peers)
            raise

    def report(self, error: BaseException, peers: Peers | None = None) -> None:
        """Sets the status, and prints one line or leaves it to the agent that started this rank."""
        if error is self.reported:
            return
        self.reported = error
        text = " ".join(str(error).split())[:300]
        match error:
            case PeerError():
                self.status = 2
                self._say(str(error), consequence=True)
            case UserError():
                self.status = 2
                self._say(str(error))
            case KeyboardInterrupt():
                self.status = 130
            case BrokenPipeError():
                # The reader of the output (`| head`) has ended: nothing may be printed, even at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self.status = 128 + signal.SIGPIPE
                if AGENT in os.environ:  # the agent must say why a rank left
                    self._say("nothing reads the output any more: send it to a file")
            case SystemExit():
                code = error.code
                self.status = code if isinstance(code, int) else int(bool(code))
            case _ if is_peer_gone(error):
                self.status = 1
                cause = peers.published_error() if peers is not None else ""
                self._say(cause or f"another rank is gone: see its own output ({text})", consequence=True)
            case _ if is_timeout(error):
                self.status = 1
                self._say(
                    f"timed out waiting for another rank, --timeout-s long ({text})",
                    consequence=True,
                )
            case _:
                self.status = 1
                traceback.print_exception(error)
                self._say(f"{type(error).__name__}: {text} (its traceback stands above)")

    def _say(self, line: str, consequence: bool = False) -> None:
        """Prints the line, or writes it to the file that the agent reads."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            now = time.time()
            # torch reads message, timestamp and py_callstack. ddp-launch also reads the other two, to find
            # the cause among failures within the same second.
            extra = {
                "timestamp": str(int(now)),
                "py_callstack": line,
                "time": now,
                "consequence": consequence,
            }
            with open(path, "w") as file:
                json.dump({"message": {"message": line, "extraInfo": extra}}, file)
        if AGENT not in os.environ:
            named = "RANK" not in os.environ or line.startswith("rank ")
            print_error(line if named else f"rank {os.environ['RANK']}: {line}", self.prog)


@contextmanager
def as_exit_status(prog: str = "ddp-launch") -> Iterator[Outcome]:
    """Turns an exception into `outcome.status`, and reports it if that is not done yet."""
    outcome = Outcome(prog)
    try:
        yield outcome
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            raise
        outcome.report(error)
