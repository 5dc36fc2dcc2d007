"""This machine's ranks under torch's elastic agent: one line per failure, and no orphan process."""

import logging
import os
import signal
import socket
import sys
import time
from contextlib import nullcontext, suppress
from typing import NamedTuple

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
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
from ddp_lib.launch.rendezvous import open_rendezvous
from ddp_lib.processes.exit_status import first_cause, print_error
from ddp_lib.processes.forkserver import context, no_main_module, run_rank
from ddp_lib.processes.signals import kill_descendants, stop_signals

# If this machine's ranks only lost another rank, wait so long for the other machine's reason: a failed rank
# may linger before its agent learns of it.
_CAUSE_S = LINGER_S + 2
# Ranks that are asked to leave have so long; a frozen or blocked rank is then killed.
_GRACE_S = 8
# Time after another machine gave up: ranks that notice it themselves report a better reason.
_NOTICE_S = 5.0


class Agent(LocalElasticAgent):
    """torch's agent; says why it restarts the ranks, and leaves if another machine gave up."""

    peers: Peers
    began = False
    closed_s: float | None = None

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Ends the ranks; if a signal is the reason, the other machines learn it first."""
        stopped = sys.exc_info()[1]
        if isinstance(stopped, SignalException):
            _publish_signal(self.peers, 128 + int(stopped.sigval))
        if self._pcontext:  # here, since torch 2.11's _shutdown takes no timeout
            self._pcontext.close(death_sig, _GRACE_S)
        super()._shutdown(death_sig)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.began = True
        result = super()._monitor_workers(worker_group)
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
            line, most = cause_of(result.failures).line, worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            restart = f"starting the ranks again, {number} of at most {most} times"
            print(f"ddp-launch: {line}; {restart}", file=sys.stderr, flush=True)
        return result

    def _add_others(self, worker_group: WorkerGroup, result: RunResult) -> None:
        """Adds every other rank of this machine that failed; all have ended by now."""
        ranks = self._pcontext
        assert isinstance(ranks, MultiprocessContext) and ranks._pc
        for worker, process in zip(worker_group.workers, ranks._pc.processes, strict=True):
            if process.exitcode and worker.global_rank not in result.failures:
                result.failures[worker.global_rank] = ProcessFailure(
                    worker.local_rank, process.pid, process.exitcode, ranks.error_files[worker.local_rank]
                )


def run_agent(
    function: str, args: tuple[object, ...], nproc: int, launch: Launch, join_timeout_s: float
) -> int:
    """Runs `function(*args)` as `nproc` ranks here, together with the other machines of `launch`.

    Returns 0, 128 + n if signal n stopped the agent, or the exit status of the rank that failed first,
    after a line that says why. UserError if the machines do not meet.
    """
    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    # As in the ranks, which keep nohup's setting.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in stop_signals())
    try:
        handler, master, peers = open_rendezvous(launch, join_timeout_s)
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=run_rank,
            args=(function, *args),
            rdzv_handler=handler,
            max_restarts=launch.max_restarts,
            master_addr=master,
        )
        agent = Agent(spec, DefaultLogsSpecs(), start_method=context().get_start_method())
        agent.peers = peers
        try:
            return _run(agent, join_timeout_s)
        except (SignalException, SystemExit):
            if peers.seen:  # the signal came from `_stop`: another machine ended the job
                return peers.seen[1]
            raise
        finally:
            peers.wait_until_read()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    finally:
        kill_descendants()


def _run(agent: Agent, join_timeout_s: float) -> int:
    peers = agent.peers
    watching = peers.watching(_stop) if peers.launch.endpoint else nullcontext()
    try:
        with watching, no_main_module():
            result = agent.run()
    except SystemExit as stopped:  # from our handler, before torch's is there
        if isinstance(stopped.code, int):
            _publish_signal(peers, stopped.code)
        raise
    except (RendezvousError, DistError) as error:
        if peers.seen:
            return peers.seen[1]
        if end := peers.read_end():
            print_error(end[0])
            return end[1]
        raise _explain(error, agent, join_timeout_s) from error
    finally:
        with suppress(RendezvousError, DistError):
            agent._rdzv_handler.shutdown()
    if result is None or not result.is_failed():  # None: more machines came than --nnodes allows
        return 0
    line, status = _agree_on_cause(result.failures, peers)
    print_error(line)
    return status


def _stop(line: str, status: int) -> None:
    """Ends this launcher because another has ended the job, with the signal of that machine, if any."""
    print_error(line)
    # torch's agent then ends its ranks and raises.
    os.kill(os.getpid(), status - 128 if status - 128 in stop_signals() else signal.SIGTERM)


def _explain(error: Exception, agent: Agent, join_timeout_s: float) -> UserError:
    """Explains why torch's rendezvous failed."""
    launch = agent.peers.launch
    endpoint = launch.endpoint
    where = "this machine" if endpoint is None else join_host(endpoint.host, endpoint.port)
    if agent.began:
        return UserError(
            f"lost the agent at {where} ({type(error).__name__}: {' '.join(str(error).split())[:200]}): see "
            "that machine's output; the same command goes on from the last checkpoint"
        )
    came = agent.peers.arrived()
    return UserError(
        f"the machines did not meet at {where} within {join_timeout_s:g} s: of {launch.nodes_text} came "
        f"{len(came)}, {', '.join(came)}; start the same command on every machine; check --rdzv-endpoint, "
        "--nnodes and --join-timeout-s"
    )


def _publish_signal(peers: Peers, status: int) -> None:
    peers.stop_watching()
    if not peers.seen:
        name = signal.Signals(status - 128).name
        peers.publish_end(f"stopped by {name} on {socket.gethostname()}", status)


def _agree_on_cause(failures: dict[int, ProcessFailure], peers: Peers) -> tuple[str, int]:
    """The line that names the cause on any machine, and the exit status."""
    failure = cause_of(failures)
    if not peers.fixed:
        return failure.line, failure.status
    if not failure.consequence:
        return peers.publish_end(failure.line, failure.status)
    deadline = time.monotonic() + _CAUSE_S
    while not (end := peers.read_end()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return end or (failure.line, failure.status)


class RankFailure(NamedTuple):
    """How a rank ended, from its agent and from what the rank wrote about it."""

    rank: int
    time: float
    consequence: int
    line: str
    status: int


def cause_of(failures: dict[int, ProcessFailure]) -> RankFailure:
    return first_cause(read_failure(rank, process) for rank, process in failures.items())


def read_failure(rank: int, process: ProcessFailure) -> RankFailure:
    """From the process's status and the error file that the rank wrote (see exit_status.py)."""
    code, name = process.exitcode, f"rank {rank} on {socket.gethostname()}"
    at, consequence = process.timestamp + 1.0, 0  # for a rank that wrote nothing, torch gives whole seconds
    if isinstance(process.message, dict):
        extra = process.message.get("extraInfo", {})
        at = float(extra.get("time", process.timestamp))
        consequence = int(bool(extra.get("consequence")))
        line = " ".join(str(process.message["message"]).split())
        line = line if line.startswith("rank ") else f"{name}: {line}"
    elif code == -signal.SIGKILL:
        line = f"{name} died of SIGKILL: killed by hand, or for want of memory"
    elif code < 0:
        line = f"{name} died of {process.signal_name()}"
    elif code - 128 in (signal.SIGINT, signal.SIGTERM):
        line = f"{name} was stopped by {signal.Signals(code - 128).name}"
    else:
        line = f"{name} ended with status {code}; its output stands above"
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        consequence = 2
    return RankFailure(rank, at, consequence, line, code if code >= 0 else 128 - code)
