"""RankPool: starts the processes of one run_ranks, prints their output, collects results, ends them."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import cloudpickle
import psutil

from ddp_lib.errors import UserError
from ddp_lib.notebook.errors import RankError, death_error, exception_error, hang_error
from ddp_lib.notebook.worker import host_store, run_rank
from ddp_lib.processes.exit_status import first_cause
from ddp_lib.processes.forkserver import context, no_main_module
from ddp_lib.report.live_cell import LiveCell, somebody_looks

# After a rank has failed: how long to wait for the other ranks' errors, one of which may be the cause.
_GRACE_S = 1.0


class _Child:
    """A process, and this process's end of the pipe between the two."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        self.connection, self._child_end = context().Pipe()
        self.process = context().Process(target=target, args=(self._child_end, *args))

    def start(self) -> None:
        self.process.start()
        self._child_end.close()


class _Rank(_Child):
    """A rank's process, its answer, and the file `path` that its output goes to."""

    def __init__(
        self, rank: int, nproc: int, work: bytes, files: dict[str, str], path: Path, request: Path | None
    ) -> None:
        env = _environment(rank, nproc)
        super().__init__(run_rank, work, files, env, os.getcwd(), str(path), request)
        self.rank, self.path = rank, path
        self.answer: Any = None  # the pickled result, or a RankError
        self._printed = 0
        path.touch()

    def receive(self) -> None:
        """Sets `answer` if the rank has sent it, or if its process has ended."""
        ended = not self.process.is_alive()  # asked first: it may have left its answer in the pipe
        with suppress(EOFError, OSError):
            if self.connection.poll():
                kind, value = self.connection.recv()
                self.answer = value if kind == "done" else exception_error(self.rank, *value)
        if ended and self.answer is None:
            lines = self.path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.answer = death_error(self.rank, self.process.exitcode, lines[-1].strip() if lines else "")

    def stack(self) -> list[FrameSummary] | None:
        """The rank's stack; None if it does not answer."""
        with suppress(EOFError, OSError):
            self.connection.send("stack")
            if self.connection.poll(2.0):
                kind, value = self.connection.recv()
                return value if kind == "stack" else None
        return None

    def print_new(self, ended: bool) -> None:
        """Prints the lines that are new since the last call; if `ended`, also an unfinished line."""
        prefix = f"[rank {self.rank}] "
        with open(self.path, "rb") as file:
            file.seek(self._printed)
            for line in file:
                if not (ended or line.endswith(b"\n")):
                    break
                self._printed += len(line)
                text = line.decode(errors="replace").rstrip()
                # What World and the training loop print has the prefix already.
                print(text if text.startswith(prefix) else prefix + text, flush=True)


class RankPool:
    """The processes of one call of run_ranks: `nproc` ranks, and the host of their store.

    work, files: as in `worker.run_rank`. `folder` gets the ranks' output.
    """

    def __init__(self, nproc: int, work: bytes, files: dict[str, str], folder: Path) -> None:
        self.store_host = _Child(host_store)
        # There rank 0 names the run that it trains, which this process then draws.
        self.request, self.view = folder / "live_view" if somebody_looks() else None, LiveCell()
        paths = [folder / f"rank{r}.txt" for r in range(nproc)]
        self.ranks = [_Rank(r, nproc, work, files, path, self.request) for r, path in enumerate(paths)]

    def run(self, timeout_s: float) -> list[Any]:
        """What each rank's function returned, in rank order; meanwhile prints the ranks' output.

        Raises RankError if a rank fails or dies, or if ranks still run after `timeout_s` seconds.
        """
        try:
            with no_main_module():
                for child in (self.store_host, *self.ranks):
                    child.start()
            return self._results(timeout_s)
        finally:
            self._end()
            self._draw()
            self.view.close()

    def _results(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        self._send_store_port(timeout_s)
        errors: list[RankError] = []
        while (running := self._running()) and time.monotonic() <= deadline:
            wait([end for r in running for end in (r.connection, r.process.sentinel)], timeout=0.05)
            for rank in running:
                rank.receive()
            self._print_output()
            self._draw()
            errors = [rank.answer for rank in self.ranks if isinstance(rank.answer, RankError)]
            if errors:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if not errors and not running:
            self._print_output(to_the_end=True)
            return [cloudpickle.loads(rank.answer) for rank in self.ranks]
        error = _root_cause(errors) if errors else hang_error({r.rank: r.stack() for r in running}, timeout_s)
        self._end()
        self._print_output(to_the_end=True)
        raise error

    def _running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.answer is None]

    def _send_store_port(self, timeout_s: float) -> None:
        """Receives the store's port from its host and sends it to the ranks."""
        if not self.store_host.connection.poll(timeout_s):
            raise hang_error(dict.fromkeys(range(len(self.ranks))), timeout_s)
        try:
            port = self.store_host.connection.recv()
        except EOFError:
            raise UserError(
                "the process that hosts the ranks' store has ended: start fewer ranks, if memory is short"
            ) from None
        if isinstance(port, UserError):
            raise port
        for rank in self.ranks:
            with suppress(OSError):  # that rank has died: `receive` notices
                rank.connection.send(port)

    def _print_output(self, to_the_end: bool = False) -> None:
        """Prints rank 0's new output; when rank 0 has ended, also that of rank 1; and so on."""
        for rank in self.ranks:
            ended = to_the_end or rank.answer is not None
            rank.print_new(ended)
            if not ended:
                return

    def _draw(self) -> None:
        """The run that rank 0 has named, if any, as its logs have it now."""
        if self.request is not None and self.request.exists() and (folder := self.request.read_text()):
            self.view.show(Path(folder))
        self.view.tick()

    def _end(self) -> None:
        """Ends all ranks that still run, with the processes they started, and the store's host."""
        started = [child for child in (*self.ranks, self.store_host) if child.process.pid is not None]
        running, descendants = self._running(), []
        for child in started:
            with suppress(psutil.NoSuchProcess):
                descendants += psutil.Process(child.process.pid).children(recursive=True)
            if child in running and child.process.is_alive():
                child.process.kill()
        self.store_host.connection.close()  # which ends the store's host
        for child in started:
            child.process.join(5.0)
            if child.process.is_alive():  # it has answered, but does not end
                child.process.kill()
                child.process.join(5.0)
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for rank in self.ranks:
            rank.connection.close()


def _root_cause(errors: list[RankError]) -> RankError:
    """The first error that is not the consequence of another rank's error.

    If several ranks have this same error, it is that of the lowest rank, so that the answer does not depend
    on which rank was first.
    """
    first = first_cause(errors)
    same = (error for error in errors if error.text_without_rank == first.text_without_rank)
    return min(same, key=lambda error: error.rank)


def _environment(rank: int, nproc: int) -> dict[str, str]:
    """The caller's environment and the variables that torchrun would add, except MASTER_PORT."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "run_ranks",
        # A rank whose function returns at once must not end before the other ranks have connected.
        "TORCH_DIST_INIT_BARRIER": "1",
    }
