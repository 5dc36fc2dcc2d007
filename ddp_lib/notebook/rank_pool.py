"""RankPool: starts the processes of one run_ranks, prints their output, collects results, ends them."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import cloudpickle
import psutil

from ddp_lib.errors import TransientError, UserError
from ddp_lib.notebook.errors import RankError, death_error, exception_error, hang_error
from ddp_lib.notebook.worker import Place, host_store, run_rank
from ddp_lib.processes.exit_status import first_cause
from ddp_lib.processes.forkserver import context, no_main_module
from ddp_lib.report.live_cell import LiveCell

# After a rank has failed: how long to wait for the other ranks' errors, one of which may be the cause.
GRACE_S = 1.0
# Bytes of a rank's output that are printed before its timeout is looked at again; and of a rank that was
# ended, as it may have printed for ever.
_AT_ONCE = 1 << 20
# What input() raises in a rank if it cannot be served.
_NOBODY = (
    "input() and breakpoint() find nobody to ask here: run the cell in JupyterLab, or print what you "
    "want to see"
)


_SERVER_GONE = (
    "the process that starts the ranks, or that hosts their store, has ended: start fewer ranks, if memory "
    "is short"
)


class _Child:
    """A process, and this process's end of the pipe between the two."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        self.connection, self._child_end = context().Pipe()
        self.process = context().Process(target=target, args=(self._child_end, *args))

    def start(self) -> None:
        self.process.start()
        self._child_end.close()

    def started(self) -> bool:
        return self.process.pid is not None


class Rank(_Child):
    """A rank's process, its answer, and the file `path` that its output goes to.

    `names`: what a rank of `%ranks` has in its namespace. request: see `live_cell`.
    """

    def __init__(
        self, place: Place, work: bytes, files: dict[str, str], path: Path, request: Path | None = None
    ) -> None:
        super().__init__(run_rank, work, files, place.environment(), os.getcwd(), str(path), request)
        self._begin(place.rank, path)

    def _begin(self, rank: int, path: Path) -> None:
        self.rank = rank
        self.file = open(path, "a+b")  # noqa: SIM115
        self.answer: Any = None  # the pickled result, or a RankError
        self.names: list[str] = []
        self._question: str | None = None
        self._stack: list[FrameSummary] | None = None
        self._printed = 0

    def ends(self) -> set[Any]:
        """What becomes readable if it sends a message, or ends."""
        return {self.connection, self.process.sentinel}

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it has died: `receive` notices
            self.connection.send(message)

    def receive(self) -> None:
        """Sets `answer` if the rank has sent it, or if its process has ended."""
        ended = not self.process.is_alive()  # asked first: it may have left its answer in the pipe
        with suppress(EOFError, OSError):
            while self.answer is None and self.connection.poll():
                self._take(*self.connection.recv())
        if ended and self.answer is None:
            self.answer = death_error(self.rank, self.process.exitcode, self._last_line())

    def _take(self, kind: str, value: Any) -> None:
        match kind:
            case "done":
                self.answer = value
            case "failed":
                self.answer = exception_error(self.rank, *value)
            case "names":
                self.names = value
            case "input":
                self._question = value
            case "stack":
                self._stack = value

    def _last_line(self) -> str:
        self.file.seek(max(0, self.file.seek(0, os.SEEK_END) - 10_000))
        lines = self.file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def serve_input(self, show: Callable[[], None]) -> float:
        """Asks the reader if the rank waits in input(); returns for how many seconds. show: called first."""
        if self._question is None:
            return 0.0
        began, prompt, self._question = time.monotonic(), self._question, None
        show()
        try:
            self.send(("answer", input(f"[rank {self.rank}] {prompt}")))
        except Exception:  # each kind of program that nobody sits at has its own
            self.send(("refused", _NOBODY))
        return time.monotonic() - began

    def stack(self, timeout_s: float = 2.0) -> list[FrameSummary] | None:
        """The rank's stack; None if it does not answer, or has sent its answer meanwhile."""
        self._stack = None
        with suppress(EOFError, OSError):
            self.connection.send("stack")
            deadline = time.monotonic() + timeout_s
            while self._stack is self.answer is None:
                if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                    break
                self._take(*self.connection.recv())
        return self._stack

    def print_new(self, ended: bool, most: int | None = None) -> None:
        """Prints the lines that are new since the last call; if `ended`, also an unfinished line. most: about
        how many bytes; of a rank that has ended, the last."""
        prefix = f"[rank {self.rank}] "
        size = os.fstat(self.file.fileno()).st_size
        left_out = size - self._printed - most if ended and most else 0
        if left_out > 0:
            print(f"{prefix}... {left_out:,} bytes are left out", flush=True)
            self._printed += left_out
        until = size if most is None else min(size, self._printed + most)
        self.file.seek(self._printed)
        for line in self.file:
            if self._printed >= until or not (ended or line.endswith(b"\n")):
                break
            self._printed += len(line)
            text = line.decode(errors="replace").rstrip()
            # What World and the training loop print has the prefix already.
            print(text if text.startswith(prefix) else prefix + text, flush=True)


def local_ranks(
    nproc: int,
    work: bytes,
    folder: Path,
    files: dict[str, str] | None = None,
    world_size: int | None = None,
    master: str = "127.0.0.1",
    request: Path | None = None,
) -> list[Rank]:
    """Ranks 0 to nproc - 1, on this machine, not started yet. work, files, request: as in `worker.run_rank`;
    `folder` gets their output."""
    places = [Place(r, world_size or nproc, r, nproc, 0, master) for r in range(nproc)]
    return [Rank(own, work, files or {}, folder / f"rank{own.rank}.txt", request) for own in places]


class RankPool:
    """Ranks, and the host of their store. host: see `worker.host_store`. request: the file in which rank 0
    names the run that it trains, which this process then draws."""

    def __init__(self, ranks: list[Rank], host: str = "127.0.0.1", request: Path | None = None) -> None:
        self.store_host = _Child(host_store, host)
        self.ranks = ranks
        self.request, self.view = request, LiveCell()

    def start(self) -> None:
        try:
            with no_main_module():
                for child in (self.store_host, *self.ranks):
                    child.start()
        except EOFError:
            raise TransientError(_SERVER_GONE) from None

    def run(self, timeout_s: float) -> list[Any]:
        """What each rank's function returned, in rank order; meanwhile prints the ranks' output.

        Raises RankError if a rank fails or dies, or if ranks still run after `timeout_s` seconds.
        """
        try:
            self.start()
            return self._results(timeout_s)
        finally:
            self.end()
            self._draw()
            self.view.close()
            self.close_files()

    def _results(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        self.send_store_port(timeout_s)
        errors: list[RankError] = []
        while (running := self._running()) and time.monotonic() <= deadline:
            receive(running)
            deadline += sum(rank.serve_input(partial(rank.print_new, ended=False)) for rank in running)
            self._print_output(most=_AT_ONCE)
            self._draw()
            errors = [rank.answer for rank in self.ranks if isinstance(rank.answer, RankError)]
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not errors and not running:
            self._print_output(to_the_end=True)
            return [cloudpickle.loads(rank.answer) for rank in self.ranks]
        error = root_cause(errors) if errors else hang_error({r.rank: r.stack() for r in running}, timeout_s)
        self.end()
        self._print_output(to_the_end=True, most=_AT_ONCE)
        raise error

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.answer is None]

    def send_store_port(self, timeout_s: float) -> None:
        """Receives the store's port from its host and sends it to the ranks."""
        if not self.store_host.connection.poll(timeout_s):
            raise hang_error(dict.fromkeys(range(len(self.ranks))), timeout_s)
        try:
            port = self.store_host.connection.recv()
        except EOFError:
            raise TransientError(_SERVER_GONE) from None
        if isinstance(port, UserError):
            raise port
        for rank in self.ranks:
            rank.send(port)

    def _print_output(self, to_the_end: bool = False, most: int | None = None) -> None:
        """Prints rank 0's new output; when rank 0 has ended, also that of rank 1; and so on. most: see
        `print_new`."""
        for rank in self.ranks:
            ended = to_the_end or rank.answer is not None
            rank.print_new(ended, most if to_the_end or not ended else None)
            if not ended:
                return

    def _draw(self) -> None:
        """The run that rank 0 has named, if any, as its logs have it now."""
        if self.request is not None and self.request.exists() and (folder := self.request.read_text()):
            self.view.show(Path(folder))
        self.view.tick()

    def end(self) -> None:
        """Ends all ranks that still run, with the processes they started, and the store's host."""
        self.store_host.connection.close()  # which ends the store's host
        end_ranks(self.ranks, self.store_host)

    def close_files(self) -> None:
        for rank in self.ranks:
            rank.file.close()


def end_ranks(ranks: list[Rank], *others: _Child) -> None:
    """Kills the ranks without an answer, and waits until all these processes, and those below, have ended."""
    started = [child for child in (*ranks, *others) if child.process.pid]
    descendants = []
    for child in started:
        with suppress(psutil.NoSuchProcess):
            descendants += psutil.Process(child.process.pid).children(recursive=True)
        if isinstance(child, Rank) and child.answer is None and child.process.is_alive():
            child.process.kill()
    for child in started:
        child.process.join(5.0)
        if child.process.is_alive():  # it has answered, but does not end
            child.process.kill()
            child.process.join(5.0)
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for rank in ranks:
        rank.connection.close()


def receive(running: list[Rank]) -> None:
    """Waits shortly for a message or the end of these ranks, and receives what there is."""
    wait(set().union(*(rank.ends() for rank in running)), timeout=0.05)
    for rank in running:
        rank.receive()


def root_cause(errors: list[RankError]) -> RankError:
    """The first error that is not the consequence of another rank's error.

    If several ranks have this same error, it is that of the lowest rank, so that the answer does not depend
    on which rank was first.
    """
    first = first_cause(errors)
    same = (error for error in errors if error.text_without_rank == first.text_without_rank)
    return min(same, key=lambda error: error.rank)
