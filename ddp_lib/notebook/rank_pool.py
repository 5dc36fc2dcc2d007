"""The processes of one run_ranks: started, listened to, shown, and ended."""

import os
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

from ddp_lib.errors import UserError
from ddp_lib.notebook.errors import RankError, died, failed, is_consequence, stuck
from ddp_lib.notebook.worker import host_store, run
from ddp_lib.processes.forkserver import context, no_main_module

# After one rank has failed: how long the others may take to say what they saw.
_GRACE_S = 1.0


class Ranks:
    """The processes of one launch."""

    def __init__(self, nproc: int, work: bytes, folder: Path, files: dict[str, str]) -> None:
        here = context()
        self.files = files
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.outputs = [_Output(rank, folder / f"rank{rank}.txt") for rank in range(nproc)]
        self.answers: dict[int, Any] = {}
        self.store, theirs = here.Pipe()
        self.host = here.Process(target=host_store, args=(theirs,))
        try:
            with no_main_module():
                self.host.start()
                theirs.close()
                for rank in range(nproc):
                    ours, theirs = here.Pipe(duplex=True)
                    process = here.Process(
                        target=run,
                        args=(
                            theirs,
                            work,
                            _environment(rank, nproc),
                            os.getcwd(),
                            str(self.outputs[rank].path),
                        ),
                    )
                    self.connections.append(ours)
                    self.processes.append(process)
                    process.start()
                    theirs.close()
        except BaseException:
            self.end()
            raise

    def results(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        failures: dict[int, RankError] = {}
        self._hand_out_port(timeout_s)
        while len(self.answers) < len(self.processes):
            self._receive(0.05)
            self._show()
            failures |= {r: f for r, f in self._failures().items() if r not in failures}
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                break
        if failures:
            self.end()
            self._show(to_the_end=True)
            raise _cause(list(failures.values()))
        if len(self.answers) < len(self.processes):
            error = stuck(self._where(), timeout_s, self.files)
            self.end()
            self._show(to_the_end=True)
            raise error
        self._show(to_the_end=True)
        return [cloudpickle.loads(self.answers[rank][1]) for rank in range(len(self.processes))]

    def _hand_out_port(self, limit_s: float) -> None:
        """Tells the ranks where their store is."""
        if not self.store.poll(limit_s):
            raise stuck(dict.fromkeys(range(len(self.processes))), limit_s, self.files)
        try:
            port = self.store.recv()
        except EOFError:
            raise UserError(
                "the process that was to host the ranks' store has ended: start fewer ranks, if "
                "memory is short"
            ) from None
        for connection in self.connections:
            with suppress(OSError):  # that rank has died, which its end says
                connection.send(port)

    def _receive(self, limit_s: float) -> None:
        """Takes what ranks have sent, waiting up to `limit_s` for the first of it."""
        open_ones = {
            self.connections[rank]: rank
            for rank in range(len(self.processes))
            if rank not in self.answers
        }
        sentinels = [self.processes[rank].sentinel for rank in open_ones.values()]
        ready = wait([*open_ones, *sentinels], timeout=limit_s)
        for connection, rank in open_ones.items():
            # A rank that has ended may have left its answer in the pipe.
            if connection in ready or self.processes[rank].sentinel in ready:
                try:
                    while rank not in self.answers and connection.poll():
                        kind, value = connection.recv()
                        if kind != "stands":
                            self.answers[rank] = (kind, value)
                except (EOFError, OSError):
                    pass
                if rank not in self.answers and not self.processes[rank].is_alive():
                    self.answers[rank] = ("died", self.processes[rank].exitcode)

    def _failures(self) -> dict[int, RankError]:
        found = {}
        for rank, (kind, value) in self.answers.items():
            if kind == "failed":
                found[rank] = failed(rank, value, self.files)
            elif kind == "died":
                found[rank] = died(rank, value, self.outputs[rank].last_line())
        return found

    def _where(self) -> dict[int, Any]:
        """Where each rank without an answer stands: its frames, or None if it does not say."""
        stuck_ranks = [r for r in range(len(self.processes)) if r not in self.answers]
        places: dict[int, Any] = dict.fromkeys(stuck_ranks)
        for rank in stuck_ranks:
            try:
                self.connections[rank].send("where")
                if self.connections[rank].poll(2.0):
                    kind, value = self.connections[rank].recv()
                    places[rank] = value if kind == "stands" else None
            except (EOFError, OSError):
                continue
        return places

    def _show(self, to_the_end: bool = False) -> None:
        """Prints rank 0's output as it comes; rank 1's when rank 0 has ended; and so on."""
        for rank, output in enumerate(self.outputs):
            ended = to_the_end or rank in self.answers
            output.show(ended)
            if not ended:
                return

    def end(self) -> None:
        """Ends whatever still runs, with the processes it started."""
        import psutil

        started = [process for process in self.processes if process.pid is not None]
        family = []
        for process in started:
            with suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
            if process.is_alive() and self.processes.index(process) not in self.answers:
                process.kill()
        self.store.close()  # which ends its host
        for process in [*started, self.host] if self.host.pid is not None else started:
            process.join(5.0)
            if process.is_alive():  # it has answered, but does not end
                process.kill()
                process.join(5.0)
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        for connection in self.connections:
            connection.close()


def _cause(failures: list[RankError]) -> RankError:
    """The first failure that is not the consequence of another rank's; of ranks that failed alike,
    the lowest, so that the answer does not depend on which came first."""
    first = min(failures, key=lambda f: (is_consequence(f), f.time))
    return min((f for f in failures if f.what == first.what), key=lambda f: f.rank)


class _Output:
    """A rank's output file, printed line by line with the rank in front."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank, self.path = rank, path
        path.touch()
        self._read = 0
        self._rest = b""

    def show(self, ended: bool) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if ended and self._rest:
            lines.append(self._rest)
            self._rest = b""
        prefix = f"[rank {self.rank}] "
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            # World and the training's console name the rank themselves.
            print(text if text.startswith(prefix) else prefix + text, flush=True)

    def last_line(self) -> str:
        lines = self.path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _environment(rank: int, nproc: int) -> dict[str, str]:
    """The caller's environment, and what torchrun would add to it, but for MASTER_PORT."""
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
        # A rank that ends at once must not be gone before its peers have connected.
        "TORCH_DIST_INIT_BARRIER": "1",
    }
