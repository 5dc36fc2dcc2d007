"""RankPool: starts the processes of one run_ranks, prints their output, collects results, ends them."""

import os
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError
from ddp_lib.notebook.errors import RankError, death_error, exception_error, hang_error
from ddp_lib.notebook.worker import host_store, run_rank
from ddp_lib.processes.exit_status import first_cause
from ddp_lib.processes.forkserver import context, no_main_module

# After a rank has failed: how long to wait for the other ranks' errors, one of which may be the cause.
_GRACE_S = 1.0


class RankPool:
    """The processes of one call of run_ranks: `nproc` ranks, and the host of their store.

    `work` is the pickled function with its arguments; `folder` gets the ranks' output; `files` is
    what `source_files` returns.
    """

    def __init__(self, nproc: int, work: bytes, folder: Path, files: dict[str, str]) -> None:
        mp = context()
        self.files = files
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.outputs = [_Output(rank, folder / f"rank{rank}.txt") for rank in range(nproc)]
        self.answers: dict[int, Any] = {}
        self.store_connection, child_end = mp.Pipe()
        self.store_host = mp.Process(target=host_store, args=(child_end,))
        try:
            with no_main_module():
                self.store_host.start()
                child_end.close()
                for rank in range(nproc):
                    parent_end, child_end = mp.Pipe(duplex=True)
                    process = mp.Process(
                        target=run_rank,
                        args=(
                            child_end,
                            work,
                            _environment(rank, nproc),
                            os.getcwd(),
                            str(self.outputs[rank].path),
                        ),
                    )
                    self.connections.append(parent_end)
                    self.processes.append(process)
                    process.start()
                    child_end.close()
        except BaseException:
            self.end()
            raise

    def results(self, timeout_s: float) -> list[Any]:
        """What each rank's function returned, in rank order; meanwhile prints the ranks' output.

        Raises RankError if a rank fails or dies, or if ranks still run after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        errors: dict[int, RankError] = {}
        self._send_store_port(timeout_s)
        while len(self.answers) < len(self.processes):
            self._receive(0.05)
            self._print_output()
            errors |= {r: error for r, error in self._errors().items() if r not in errors}
            if errors:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
        if errors:
            self.end()
            self._print_output(to_the_end=True)
            raise _root_cause(list(errors.values()))
        if len(self.answers) < len(self.processes):
            error = hang_error(self._stacks(), timeout_s, self.files)
            self.end()
            self._print_output(to_the_end=True)
            raise error
        self._print_output(to_the_end=True)
        return [cloudpickle.loads(self.answers[rank][1]) for rank in range(len(self.processes))]

    def _send_store_port(self, timeout_s: float) -> None:
        """Receives the store's port from its host and sends it to the ranks."""
        if not self.store_connection.poll(timeout_s):
            raise hang_error(dict.fromkeys(range(len(self.processes))), timeout_s, self.files)
        try:
            port = self.store_connection.recv()
        except EOFError:
            raise UserError(
                "the process that hosts the ranks' store has ended: start fewer ranks, if memory is short"
            ) from None
        for connection in self.connections:
            with suppress(OSError):  # that rank has died: _receive notices
                connection.send(port)

    def _receive(self, timeout_s: float) -> None:
        """Receives what ranks have sent; waits up to `timeout_s` for the first message."""
        pending = {
            self.connections[rank]: rank for rank in range(len(self.processes)) if rank not in self.answers
        }
        sentinels = [self.processes[rank].sentinel for rank in pending.values()]
        ready = wait([*pending, *sentinels], timeout=timeout_s)
        for connection, rank in pending.items():
            # A rank that has ended may have left its answer in the pipe.
            if connection in ready or self.processes[rank].sentinel in ready:
                try:
                    while rank not in self.answers and connection.poll():
                        kind, value = connection.recv()
                        if kind != "stack":
                            self.answers[rank] = (kind, value)
                except (EOFError, OSError):
                    pass
                if rank not in self.answers and not self.processes[rank].is_alive():
                    self.answers[rank] = ("died", self.processes[rank].exitcode)

    def _errors(self) -> dict[int, RankError]:
        """The errors of the ranks that have failed or died, by rank."""
        errors = {}
        for rank, (kind, value) in self.answers.items():
            if kind == "failed":
                errors[rank] = exception_error(rank, value, self.files)
            elif kind == "died":
                errors[rank] = death_error(rank, value, self.outputs[rank].last_line())
        return errors

    def _stacks(self) -> dict[int, Any]:
        """The stack of each rank that has not ended, as frames; None if the rank does not answer."""
        running = [r for r in range(len(self.processes)) if r not in self.answers]
        stacks: dict[int, Any] = dict.fromkeys(running)
        for rank in running:
            try:
                self.connections[rank].send("stack")
                if self.connections[rank].poll(2.0):
                    kind, value = self.connections[rank].recv()
                    stacks[rank] = value if kind == "stack" else None
            except (EOFError, OSError):
                continue
        return stacks

    def _print_output(self, to_the_end: bool = False) -> None:
        """Prints rank 0's new output; when rank 0 has ended, also that of rank 1; and so on."""
        for rank, output in enumerate(self.outputs):
            ended = to_the_end or rank in self.answers
            output.print_new(ended)
            if not ended:
                return

    def end(self) -> None:
        """Ends all ranks that still run, with the processes they started, and the store's host."""
        import psutil

        started = [process for process in self.processes if process.pid is not None]
        descendants = []
        for process in started:
            with suppress(psutil.NoSuchProcess):
                descendants += psutil.Process(process.pid).children(recursive=True)
            if process.is_alive() and self.processes.index(process) not in self.answers:
                process.kill()
        self.store_connection.close()  # which ends the store's host
        for process in [*started, self.store_host] if self.store_host.pid is not None else started:
            process.join(5.0)
            if process.is_alive():  # it has answered, but does not end
                process.kill()
                process.join(5.0)
        for child in descendants:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        for connection in self.connections:
            connection.close()


def _root_cause(errors: list[RankError]) -> RankError:
    """The first error that is not the consequence of another rank's error.

    If several ranks have this same error, it is that of the lowest rank, so that the answer does
    not depend on which rank was first.
    """
    first = first_cause(errors)
    same = (error for error in errors if error.text_without_rank == first.text_without_rank)
    return min(same, key=lambda error: error.rank)


class _Output:
    """The file that a rank's output goes to; prints its lines with the rank in front."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank, self.path = rank, path
        path.touch()
        self._offset = 0
        self._unfinished_line = b""

    def print_new(self, ended: bool) -> None:
        """Prints the lines that are new since the last call; if `ended`, also an unfinished line."""
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._unfinished_line = (self._unfinished_line + new).split(b"\n")
        if ended and self._unfinished_line:
            lines.append(self._unfinished_line)
            self._unfinished_line = b""
        prefix = f"[rank {self.rank}] "
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            # What World and the training loop print has the prefix already.
            print(text if text.startswith(prefix) else prefix + text, flush=True)

    def last_line(self) -> str:
        lines = self.path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


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
