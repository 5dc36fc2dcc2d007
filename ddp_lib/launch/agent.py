"""This machine's ranks under torch's elastic agent: one line per failure, and no orphan process."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
from ddp_lib.launch.peers import Peers
from ddp_lib.launch.rendezvous import Rendezvous, open_rendezvous
from ddp_lib.processes.exit_status import first_cause, print_error
from ddp_lib.processes.forkserver import context, no_main_module
from ddp_lib.processes.signals import kill_descendants, stop_signals

# If this machine's ranks only lost another rank, wait so long for the other machine's reason: a failed
# rank may linger before its agent learns of it.
_CAUSE_S = LINGER_S + 2
# Ranks that are asked to leave have so long; a frozen or blocked rank is then killed.
_GRACE_S = 8
# Time after another machine gave up: ranks that notice it themselves report a better reason.
_NOTICE_S = 5.0


class Agent(LocalElasticAgent):
    """torch's agent; says why it restarts the ranks, and leaves if another machine gave up."""

    began = False
    peers: Peers | None = None
    closed_s: float | None = None

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Ends the ranks; if a signal is the reason, the other machines learn it first."""
        stopped = sys.exc_info()[1]
        if isinstance(stopped, SignalException):
            _publish_signal(self.peers, 128 + int(stopped.sigval))
        if self._pcontext:  # here, since torch 2.11's _shutdown takes no timeout
            self._pcontext.close(death_sig, _GRACE_S)
        super()._shutdown(death_sig)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with no_main_module():
            ids: dict[int, Any] = super()._start_workers(worker_group)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.began = True
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():  # torch's agent reports only the first failure that it saw
            self._add_others(worker_group, result)
        if result.state == WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
            # A frozen rank never fails, and torch's agent would watch it forever.
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
            line = cause_of(result.failures).line
            print(
                f"ddp-launch: {line}; starting the ranks again, {number} of at most {most} times",
                file=sys.stderr,
                flush=True,
            )
        return result

    def _add_others(self, worker_group: WorkerGroup, result: RunResult) -> None:
        """Adds every other rank of this machine that failed; all have ended by now."""
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

    Returns 0, 128 + n if signal n stopped the agent, or the exit status of the rank that failed first,
    after a line that says why. UserError if the machines do not meet.
    """
    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    # As in the ranks, which keep nohup's setting.
    names = ",".join(number.name for number in stop_signals())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names
    try:
        rendezvous = open_rendezvous(launch, join_timeout_s)
        peers = rendezvous.peers
        try:
            return _run(rank, args, nproc, launch, rendezvous, join_timeout_s)
        except (SignalException, SystemExit):
            if peers and peers.seen:  # the signal came from `stop`: another machine ended the job
                return peers.seen[1]
            raise
        finally:
            if peers and rendezvous.hosts:
                peers.wait_until_read()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        kill_descendants()


def _run(
    rank: Callable[..., None],
    args: tuple[object, ...],
    nproc: int,
    launch: Launch,
    rendezvous: Rendezvous,
    join_timeout_s: float,
) -> int:
    agent = Agent(
        WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=rank,
            args=args,
            rdzv_handler=rendezvous.handler,
            max_restarts=launch.max_restarts,
            master_addr=rendezvous.master,
        ),
        DefaultLogsSpecs(),
        start_method=context().get_start_method(),
    )

    def stop(line: str, status: int) -> None:
        print_error(line)
        # torch's agent then ends its ranks and raises. Uses the signal of the other machine, if any.
        number = status - 128 if status - 128 in stop_signals() else signal.SIGTERM
        os.kill(os.getpid(), number)

    agent.peers = peers = rendezvous.peers
    if peers:
        peers.watch(stop)
    try:
        try:
            result = agent.run()
        finally:
            if peers:
                peers.stop_watching()  # it would see this machine's own end
    except (SignalException, SystemExit) as stopped:  # from torch's handler, or earlier from ours
        if isinstance(stopped, SystemExit) and isinstance(stopped.code, int):
            _publish_signal(peers, stopped.code)
        raise
    except (RendezvousError, DistError) as error:
        if peers and peers.seen:
            return peers.seen[1]
        if peers and (end := peers.read_end()):
            print_error(end[0])
            return end[1]
        raise _explain(error, agent.began, launch, peers, join_timeout_s) from error
    finally:
        with suppress(RendezvousError, DistError):
            rendezvous.handler.shutdown()
    if result is None or not result.is_failed():  # None: more machines came than --nnodes allows
        return 0
    line, status = _agree_on_cause(result.failures, peers)
    print_error(line)
    return status


def _explain(
    error: Exception, began: bool, launch: Launch, peers: Peers | None, join_timeout_s: float
) -> UserError:
    """Explains why torch's rendezvous failed."""
    endpoint = launch.endpoint
    where = "this machine" if endpoint is None else join_host(endpoint.host, endpoint.port)
    if began:
        return UserError(
            f"lost the agent at {where} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): see that machine's output; "
            "the same command goes on from the last checkpoint"
        )
    came = [machine["machine"] for machine in peers.arrived()] if peers else []
    return UserError(
        f"the machines did not meet at {where} within {join_timeout_s:g} s: of {launch.nodes_text} "
        f"came {len(came)}, {', '.join(came)}; start the same command on every machine; check "
        "--rdzv-endpoint, --nnodes and --join-timeout-s"
    )


def _publish_signal(peers: Peers | None, status: int) -> None:
    if peers is None:
        return
    peers.stop_watching()  # it would see this machine's own end
    if not peers.seen:
        name = signal.Signals(status - 128).name
        peers.publish_end(f"stopped by {name} on {socket.gethostname()}", status)


def _agree_on_cause(failures: dict[int, ProcessFailure], peers: Peers | None) -> tuple[str, int]:
    """The line that names the cause on any machine, and the exit status."""
    failure = cause_of(failures)
    if peers is None or not peers.fixed:
        return failure.line, failure.status
    if not failure.consequence:
        return peers.publish_end(failure.line, failure.status)
    deadline = time.monotonic() + _CAUSE_S
    while not (end := peers.read_end()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return end or (failure.line, failure.status)


@dataclass(frozen=True)
class RankFailure:
    """How a rank ended, from its agent and from what the rank wrote about it."""

    rank: int
    time: float
    consequence: int
    line: str
    status: int


def read_failure(rank: int, process: ProcessFailure) -> RankFailure:
    """From the process's status and the error file that the rank wrote (see exit_status.py)."""
    code, name = process.exitcode, f"rank {rank} on {socket.gethostname()}"
    status, consequence, at = code if code >= 0 else 128 - code, 0, float(process.timestamp)
    if isinstance(process.message, dict):
        extra = process.message.get("extraInfo", {})
        at, consequence = float(extra.get("time", at)), int(bool(extra.get("consequence")))
        line = " ".join(str(process.message["message"]).split())
        line = line if line.startswith("rank ") else f"{name}: {line}"
    else:
        at += 1  # for a rank that wrote nothing, torch gives whole seconds
        if code == -signal.SIGKILL:
            line = f"{name} died of SIGKILL: killed by hand, or for want of memory"
        elif code < 0:
            line = f"{name} died of {process.signal_name()}"
        elif code - 128 in (signal.SIGINT, signal.SIGTERM):
            line = f"{name} was stopped by {signal.Signals(code - 128).name}"
        else:
            line = f"{name} ended with status {code}; its output stands above"
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        consequence = 2
    return RankFailure(rank, at, consequence, line, status)


def cause_of(failures: dict[int, ProcessFailure]) -> RankFailure:
    return first_cause(read_failure(rank, process) for rank, process in failures.items())
