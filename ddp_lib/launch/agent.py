"""The ranks of this machine under torch's elastic agent: one line for each failure, and no orphan."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import (
    DefaultLogsSpecs,
    MultiprocessContext,
    SignalException,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from ddp_lib.distributed.addresses import join_host
from ddp_lib.distributed.coordination import LINGER_S
from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch
from ddp_lib.launch.peers import Notes
from ddp_lib.launch.rendezvous import Rendezvous, open_rendezvous
from ddp_lib.processes.forkserver import context, no_main_module
from ddp_lib.processes.signals import end_all_below, signals_to_heed

# A machine whose ranks only lost another waits so long for that one's word: a rank that fails may
# linger, and its agent hears of it after that.
_CAUSE_S = LINGER_S + 2
# Ranks that are asked to leave get so long: one that is frozen, or blocked, is ended then.
_GRACE_S = 8
# After another machine has given up: ranks that notice by themselves give the better reason.
_NOTICE_S = 5.0


class Agent(LocalElasticAgent):
    """torch's agent, which says why it starts the ranks again, and leaves when another gave up."""

    began = False
    notes: Notes
    closed_s: float | None = None

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None
    ) -> None:
        """Ends the ranks; at a signal, the other machines get to know it first."""
        stopped = sys.exc_info()[1]
        if isinstance(stopped, SignalException):
            _tell_of_signal(self.notes, 128 + int(stopped.sigval))
        if self._pcontext:  # here, since _shutdown of torch 2.11 takes no timeout
            self._pcontext.close(death_sig, _GRACE_S)
        super()._shutdown(death_sig)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with no_main_module():
            ids: dict[int, Any] = super()._start_workers(worker_group)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.began = True
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():  # of ranks that are functions, torch's agent names the first it saw
            self._add_others(worker_group, result)
        if result.state == WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
            # A frozen rank would never fail, and torch's agent would watch it for ever.
            self.closed_s = self.closed_s or time.monotonic()
            if time.monotonic() - self.closed_s > _NOTICE_S:
                raise UserError(
                    f"another machine has given up, and the rank(s) on {socket.gethostname()} do not "
                    "notice: frozen? See that machine's output; the same command goes on from the "
                    "last checkpoint"
                )
        if result.is_failed() and self._remaining_restarts > 0:
            most = worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            line, _ = describe(result.failures)
            print(
                f"ddp-launch: {line}; starting the ranks again, {number} of at most {most} times",
                file=sys.stderr,
                flush=True,
            )
        return result

    def _add_others(self, worker_group: WorkerGroup, result: RunResult) -> None:
        """Adds every other rank here that did not end well; all have ended by now."""
        ranks = self._pcontext
        assert isinstance(ranks, MultiprocessContext) and ranks._pc
        for worker, process in zip(worker_group.workers, ranks._pc.processes, strict=True):
            if process.exitcode and worker.global_rank not in result.failures:
                file = ranks.error_files[worker.local_rank]
                result.failures[worker.global_rank] = ProcessFailure(
                    worker.local_rank, process.pid, process.exitcode, file
                )


def run_agent(
    rank: Callable[..., None],
    args: tuple[object, ...],
    nproc: int,
    launch: Launch,
    join_timeout_s: float,
) -> int:
    """Runs `rank(*args)` as `nproc` ranks here, together with the other machines of `launch`.

    Returns 0, 128 + n where signal n stopped the agent, or the exit status of the rank that failed
    first, after a line that says why. UserError where the machines do not meet.
    """
    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    # As in the ranks: nohup's word stands.
    heeded = ",".join(number.name for number in signals_to_heed())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = heeded
    try:
        met = open_rendezvous(launch, join_timeout_s)
        try:
            return _run(rank, args, nproc, launch, met, join_timeout_s)
        except (SignalException, SystemExit):
            if met.notes.heard:  # with this signal the note of another machine stops this one
                return met.notes.heard[1]
            raise
        finally:
            if met.hosts:
                met.notes.wait_until_read()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        end_all_below()


def _run(
    rank: Callable[..., None],
    args: tuple[object, ...],
    nproc: int,
    launch: Launch,
    met: Rendezvous,
    join_timeout_s: float,
) -> int:
    agent = Agent(
        WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=rank,
            args=args,
            rdzv_handler=met.handler,
            max_restarts=launch.max_restarts,
            master_addr=met.master,
        ),
        DefaultLogsSpecs(),
        start_method=context().get_start_method(),
    )

    def stop(line: str, status: int) -> None:
        print(f"ddp-launch: error: {line}", file=sys.stderr, flush=True)
        # torch's agent ends its ranks and raises; as there, where a signal was the reason.
        number = status - 128 if status - 128 in signals_to_heed() else signal.SIGTERM
        os.kill(os.getpid(), number)

    agent.notes = met.notes
    met.notes.watch(stop)
    try:
        try:
            result = agent.run()
        finally:
            met.notes.stop_watching()  # it would hear this machine's own note
    except (SignalException, SystemExit) as stopped:  # by torch's handler, and before it by ours
        if isinstance(stopped, SystemExit) and isinstance(stopped.code, int):
            _tell_of_signal(met.notes, stopped.code)
        raise
    except (RendezvousError, DistError) as error:
        if met.notes.heard:
            return met.notes.heard[1]
        if said := met.notes.read():
            print(f"ddp-launch: error: {said[0]}", file=sys.stderr, flush=True)
            return said[1]
        where = (
            "this machine"
            if launch.endpoint is None
            else join_host(launch.endpoint.host, launch.endpoint.port)
        )
        why = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if agent.began:
            raise UserError(
                f"lost the agent at {where} {why}: see that machine's output; "
                "the same command goes on from the last checkpoint"
            ) from error
        came = met.notes.roll()
        raise UserError(
            f"the machines did not meet at {where} within {join_timeout_s:g} s: of {launch.nodes_text} "
            f"came {len(came)}, {', '.join(card['machine'] for card in came)}; start the same command "
            "on every machine; check --rdzv-endpoint, --nnodes and --join-timeout-s"
        ) from error
    finally:
        with suppress(RendezvousError, DistError):
            met.handler.shutdown()
    if result is None or not result.is_failed():  # None: more machines came than --nnodes allows
        return 0
    line, status = _cause(result.failures, met.notes)
    print(f"ddp-launch: error: {line}", file=sys.stderr, flush=True)
    return status


def _tell_of_signal(notes: Notes, status: int) -> None:
    notes.stop_watching()  # it would hear this machine's own note
    if not notes.heard:
        name = signal.Signals(status - 128).name
        notes.leave(f"stopped by {name} on {socket.gethostname()}", status)


def _cause(failures: dict[int, ProcessFailure], notes: Notes) -> tuple[str, int]:
    """The line that names the cause, of all machines, and the exit status; leaves it as a note."""
    line, status = describe(failures)
    if not notes.fixed:
        return line, status
    if min(_order(failure)[0] for failure in failures.values()) == 0:
        return notes.leave(line, status)
    deadline = time.monotonic() + _CAUSE_S
    while not (said := notes.read()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return said or (line, status)


def describe(failures: dict[int, ProcessFailure]) -> tuple[str, int]:
    """The failure, of a rank each, that caused the others: a line that names it, an exit status."""
    rank = min(failures, key=lambda number: _order(failures[number]))
    failure, code = failures[rank], failures[rank].exitcode
    who = f"rank {rank} on {socket.gethostname()}"
    if isinstance(failure.message, dict):
        return f"{who}: {' '.join(str(failure.message['message']).split())}", _status(code)
    if code == -signal.SIGKILL:
        return f"{who} died of SIGKILL: killed by hand, or for want of memory", _status(code)
    if code < 0:
        return f"{who} died of {failure.signal_name()}", _status(code)
    if code - 128 in (signal.SIGINT, signal.SIGTERM):
        return f"{who} was stopped by {signal.Signals(code - 128).name}", code
    return f"{who} ended with status {code}; its output stands above", code


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Causes first, then what follows from them: a peer that is gone, the agent's own SIGTERM."""
    if failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 2, failure.timestamp
    if not isinstance(failure.message, dict):
        # torch's clock of a death without a word counts whole seconds.
        return 0, failure.timestamp + 1
    extra = failure.message.get("extraInfo", {})
    return int(bool(extra.get("secondary"))), float(extra.get("time", failure.timestamp))
