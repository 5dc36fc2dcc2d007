"""KeptRanks: the ranks of `%ranks`, which stay from cell to cell, each with its own names."""

import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import cloudpickle

from ddp_lib.notebook.cell_output import CellOutput, ranks_text
from ddp_lib.notebook.errors import Interrupted, RankError, hang_error, standing
from ddp_lib.notebook.rank_pool import GRACE_S, Rank, RankPool, local_ranks, receive, root_cause
from ddp_lib.notebook.remote import Machine, start_remote
from ddp_lib.notebook.run_ranks import FOR_CELLS, PRELOAD
from ddp_lib.notebook.worker import Place
from ddp_lib.processes.exit_status import require_working_directory
from ddp_lib.processes.forkserver import start_server

_JOIN_S = 60.0
# How long a rank may take to react to an interrupt, or to say where it stands after it, and to leave.
_INTERRUPT_S, _ANSWER_S, _LEAVE_S = 1.0, 0.2, 2.0
# As many names as are listed when they are gone.
_NAMES = 30


class Text:
    """Stands for a value that stays on its rank, because it cannot be sent."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class KeptRanks:
    """`nproc` ranks of this machine and those of `machines`, joined to one process group.

    host: the address of this machine that the others use. RankError if the ranks cannot join.
    """

    def __init__(self, nproc: int, machines: Sequence[Machine] = (), host: str = "127.0.0.1") -> None:
        self._nproc, self._machines, self._host = nproc, list(machines), host
        self._names: list[str] = []  # of all ranks, before the last cell
        self._start()
        try:
            self._wait_until_joined()
        except BaseException:
            self._kill()
            raise

    @property
    def numbers(self) -> range:
        return range(len(self._pool.ranks))

    def run_cell(self, source: str, name: str, numbers: list[int], timeout_s: float) -> list[Any]:
        """Runs a cell on these ranks; returns the values of its last expression, in rank order.

        name: of the cell's file. Raises RankError if a rank fails, dies or still runs after `timeout_s`
        seconds. If ranks cannot go on, all are replaced by new ones, and the error says so.
        """
        self._wait_until_joined()
        self._names = sorted({name for rank in self._pool.ranks for name in rank.names})
        if dead := [rank for rank in self._pool.ranks if _died(rank)]:
            for rank in dead:
                rank.answer = None
                rank.receive()
            raise self._replaced(root_cause([rank.answer for rank in dead]))
        ranks = [self._pool.ranks[number] for number in numbers]
        output = CellOutput({rank.rank: rank.file for rank in ranks})
        for rank in ranks:
            rank.answer = None
            rank.send(("cell", (source, name)))
        try:
            stuck = self._wait(ranks, output, timeout_s)
        except KeyboardInterrupt:
            raise self._interrupted(ranks, output) from None
        output.refresh(now=True)
        errors = [rank.answer for rank in ranks if isinstance(rank.answer, RankError)]
        failed = root_cause(errors) if errors else None
        if stuck or any(map(_died, ranks)):
            if failed is None:
                failed = hang_error(stuck, timeout_s)
            elif stuck:
                failed = failed.followed_by(*standing(stuck))
            failed = self._replaced(failed)
        if failed:
            raise failed
        return [_value(rank) for rank in ranks]

    def _wait(
        self, ranks: list[Rank], output: CellOutput, timeout_s: float
    ) -> dict[int, list[FrameSummary] | None]:
        """Waits for the answers; the stacks of ranks that will not answer.

        These are all that run when the time is over, or that wait for a rank that has failed. A rank that
        only computes may go on.
        """
        deadline, look_at = time.monotonic() + timeout_s, 0.0
        while running := [rank for rank in ranks if rank.answer is None]:
            receive(running)
            for rank in running:
                if seconds := rank.serve_input(lambda: output.refresh(now=True)):
                    deadline += seconds
                    output.forget()
            output.refresh()
            failed = any(isinstance(rank.answer, RankError) for rank in ranks)
            look_at = look_at or (time.monotonic() + GRACE_S if failed else 0.0)
            late = time.monotonic() > deadline
            if late or (look_at and time.monotonic() > look_at):
                stacks = {rank.rank: rank.stack() for rank in ranks if rank.answer is None}
                for rank in ranks:
                    rank.receive()
                stacks = {n: s for n, s in stacks.items() if self._pool.ranks[n].answer is None}
                if late or any(map(_waits_for_others, stacks.values())) or any(map(_died, ranks)):
                    return stacks
                look_at += GRACE_S
        return {}

    def _interrupted(self, ranks: list[Rank], output: CellOutput) -> KeyboardInterrupt:
        """Interrupts ranks in their own code; replaces all if one does not react."""
        stacks: dict[int, list[FrameSummary] | None] = {}
        with suppress(KeyboardInterrupt):  # a second one: do not wait
            for rank in ranks:
                rank.send("interrupt")
            deadline = time.monotonic() + _INTERRUPT_S
            while (
                running := [rank for rank in ranks if rank.answer is None]
            ) and time.monotonic() < deadline:
                receive(running)
            stacks = {rank.rank: rank.stack(_ANSWER_S) for rank in running}
        output.refresh(now=True)
        if any(rank.answer is None or _died(rank) for rank in ranks):
            text = "\n".join(["the ranks have been ended", *standing(stacks), self._replace()])
        else:
            text = "the ranks have been interrupted and keep their names"
        return Interrupted(text)

    def _start(self) -> None:
        require_working_directory()
        start_server([*PRELOAD, *FOR_CELLS])
        self._joined, self._folder = False, tempfile.TemporaryDirectory(prefix="ranks-")
        work, folder = cloudpickle.dumps((_serve_cells, ())), Path(self._folder.name)
        size = self._nproc + sum(machine.nproc for machine in self._machines)
        ranks = local_ranks(self._nproc, work, folder, world_size=size, master=self._host)
        for node, machine in enumerate(self._machines, 1):
            places = [
                Place(len(ranks) + n, size, n, machine.nproc, node, self._host) for n in range(machine.nproc)
            ]
            ranks += start_remote(machine, places, work, folder)
        self._pool = RankPool(ranks, self._host)
        self._pool.start()

    def _wait_until_joined(self) -> None:
        if self._joined:
            return
        self._pool.send_store_port(_JOIN_S)
        ranks = self._pool.ranks
        while running := [rank for rank in ranks if rank.answer is None]:
            receive(running)
            if errors := [rank.answer for rank in ranks if isinstance(rank.answer, RankError)]:
                raise root_cause(errors)
        self._folder.cleanup()  # each has opened its file: nothing is left on the disk, whatever happens
        self._joined = True

    def _replaced(self, error: RankError) -> RankError:
        return error.followed_by(self._replace())

    def _replace(self) -> str:
        """Ends all ranks, starts new ones, and says what has been lost."""
        names = self._names
        with _uninterrupted():  # half a set of ranks would be of no use
            self._kill()
            lost = [machine for machine in self._machines if machine.gone]
            self._machines = [machine for machine in self._machines if machine not in lost]
            self._start()
        without = f" (without {', '.join(machine.name for machine in lost)})" if lost else ""
        gone = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if names[_NAMES:] else "")
        return f"{ranks_text(self.numbers)}: new{without}; names that are gone: {gone or 'none'}"

    def _kill(self) -> None:
        for rank in self._pool.ranks:
            rank.answer = None  # do not wait for it
        for machine in self._machines:
            machine.send("end", None)
        self._pool.end()
        self._pool.close_files()
        self._folder.cleanup()

    def stop(self) -> None:
        """Ends the ranks; each has two seconds to leave the process group and run its exit handlers."""
        for rank in self._pool.ranks:
            rank.send("quit")
        deadline = time.monotonic() + _LEAVE_S
        for rank in self._pool.ranks:
            if rank.started():
                rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        for machine in self._machines:
            machine.connection.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second interrupt has no effect inside."""
    try:
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # another thread than the one that is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def _serve_cells() -> None:
    """What a rank runs; the notebook's process need not import torch for it."""
    from ddp_lib.notebook.session import serve_cells

    serve_cells()


def _died(rank: Rank) -> bool:
    return not rank.process.is_alive()


def _waits_for_others(frames: list[FrameSummary] | None) -> bool:
    """Whether a rank stands in a collective, DDP's forward and backward included; also if it does not say."""
    places = ("torch/distributed/", "torch/nn/parallel/")
    return frames is None or any(
        any(place in frame.filename.replace("\\", "/") for place in places)
        or frame.name == "_engine_run_backward"
        for frame in frames
    )


def _value(rank: Rank) -> Any:
    pickled, text = rank.answer
    try:
        return cloudpickle.loads(pickled)
    except Exception:  # such as a DDP model, which needs the process group
        return Text(text)
