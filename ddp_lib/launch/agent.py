"""This machine's ranks under torch's elastic agent: one line per failure, and no orphan process."""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import (
    LogsSpecs,
    MultiprocessContext,
    SignalException,
    SubprocessContext,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from ddp_lib.distributed.addresses import wait_until_true
from ddp_lib.distributed.store_client import wait_for
from ddp_lib.errors import TransientError, UserError
from ddp_lib.launch.failure import RankFailure, cause_of, drop_half_written, name_log
from ddp_lib.launch.flight_recorder import Calls, read_calls
from ddp_lib.launch.peers import Peers
from ddp_lib.launch.rank_log import NoLogs, RankLogs
from ddp_lib.launch.stacks import absent_ranks
from ddp_lib.processes.signals import stop_signals

# When a rank has failed, the others of its machine have so long to end; a frozen or blocked one is then
# killed. A rank that is just leaving may take so long.
_END_S, _LEAVE_S = 4.0, 1.0
# Time after another machine gave up: ranks that notice it themselves report a better reason.
_NOTICE_S = 5.0


class Agent(LocalElasticAgent):
    """torch's agent; says why it restarts the ranks, and leaves if another machine gave up."""

    peers: Peers
    logs: LogsSpecs
    # Ranks that this launcher has ended, since another had failed. Ranks that did not come to the others'
    # collective: see `look_for_absent`. The end that this launcher has published.
    ended: frozenset[int] = frozenset()
    absent: Mapping[int, str] = MappingProxyType({})
    end: tuple[str, int] | None = None
    began = False
    goodbyes = 0  # of other machines that have left an elastic job, and are known
    closed_s: float | None = None
    left_s: float | None = None
    told: SignalException | None = None  # that has asked this launcher to stop

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Starts the ranks, unless a signal has come meanwhile. torch loses one that comes while it waits for
        the ranks' last output: see torch.distributed.elastic.multiprocessing.tail_log.TailLog.stop."""

        def handle(number: int, frame: object) -> None:
            self.told = SignalException(f"signal {number}", signal.Signals(number))
            raise self.told

        self._heed_signal()
        started = super()._start_workers(worker_group)
        for number in stop_signals():
            signal.signal(number, handle)
        return started

    def _heed_signal(self) -> None:
        if self.told:
            raise self.told

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        """Ends the ranks; if a signal is the reason, the other machines learn it.

        The ranks get the signal, and not their process groups, as with torch's agent: a DataLoader's workers
        must live until the rank has saved.
        """
        stopped, grace_s = sys.exc_info()[1], self.peers.launch.grace_s
        deadline = time.monotonic() + grace_s
        if isinstance(stopped, SignalException):
            for number in stop_signals():  # a further one must not cut the wait short; StopSignal counts it
                signal.signal(number, lambda *_: None)
        self._signal(death_sig)
        if isinstance(stopped, SignalException):
            self.peers.publish_signal(128 + int(stopped.sigval))
        self._wait(grace_s + 1)
        self._end_groups(deadline)
        if self._pcontext:
            self._pcontext.close(signal.SIGKILL, 5)
        super()._shutdown(death_sig)

    def _end_groups(self, deadline: float) -> None:
        """Ends what the ranks have started and left: a script may only be a wrapper of the training."""
        if not isinstance(self._pcontext, SubprocessContext):
            return
        groups = {handler.proc.pid for handler in self._pcontext.subprocess_handlers.values()}

        def send(number: int) -> bool:
            for group in tuple(groups):
                try:
                    os.killpg(group, number)
                except (ProcessLookupError, PermissionError):
                    groups.discard(group)
            return not groups

        send(signal.SIGTERM)
        wait_until_true(lambda: send(0), deadline)
        send(signal.SIGKILL)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.began = True
        self._end_the_others()
        result = super()._monitor_workers(worker_group)
        self._heed_signal()
        if result.is_failed():  # torch's agent reports only the first failure that it saw
            result.failures.update(self.failures())
        if result.state == WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
            # A frozen rank never fails, and torch's agent would watch it forever.
            self.closed_s = self.closed_s or time.monotonic()
            if time.monotonic() - self.closed_s > _NOTICE_S:
                raise TransientError(
                    f"another machine has given up, and the rank(s) on {socket.gethostname()} do not "
                    "notice: frozen? See that machine's output; the same command goes on from the "
                    "last checkpoint"
                )
        self._refuse_early_end(result)
        if result.is_failed() and not self.peers.fixed and self.peers.count_goodbyes() > self.goodbyes:
            self.goodbyes = self.peers.count_goodbyes()
            text = "another machine has left the job: going on without it"
            print(f"ddp-launch: {text}", file=sys.stderr, flush=True)
            self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        if result.is_failed() and self._remaining_restarts > 0:
            cause, most = self.cause(result.failures), worker_group.spec.max_restarts
            absent = cause.consequence and self.absent
            line = self.line_of(self.absent) if absent else cause.line
            if cause.consequence and not absent and self.peers.launch.endpoint:
                line = f"a rank of another machine has left ({line})"
            number = most - self._remaining_restarts + 1
            restart = f"starting the ranks again, {number} of at most {most} times"
            print(f"ddp-launch: {line}; {restart}", file=sys.stderr, flush=True)
        return result

    def _refuse_early_end(self, result: RunResult) -> None:
        """UserError if a forked rank has ended with status 0 by itself, as os._exit does: torch's agent lets
        each wait until all are done, and would wait for ever for what this one returns."""
        forked = isinstance(self._pcontext, MultiprocessContext)
        codes = self._exit_codes().items() if forked and result.state == WorkerState.HEALTHY else ()
        left = [str(self._worker_group.workers[n].global_rank) for n, code in codes if code == 0]
        self.left_s = self.left_s or time.monotonic() if left else None
        # Others that wait for it say so first.
        if self.left_s and time.monotonic() - self.left_s > _END_S:
            raise UserError(
                f"rank(s) {', '.join(left)} on {socket.gethostname()} ended with status 0 before the "
                "training was done: leave the exit (os._exit) out of the model"
            )

    def _exit_barrier(self) -> None:
        """Waits until the ranks of all machines have ended, or another machine has given up.

        torch's own wait is one call into C++: no signal is handled meanwhile, and nothing else may use the
        store's connection.
        """
        store: Any = self._store
        deadline = time.monotonic() + self._exit_barrier_timeout
        with suppress(DistError, RendezvousError):
            if store.add("ended", 1) >= self._worker_group.group_world_size:
                store.set("all ended", "")
            handler = self._worker_group.spec.rdzv_handler
            while time.monotonic() < deadline and not handler.is_closed():
                if wait_for(store, "all ended", time.monotonic() + 1) is not None:
                    return

    def _exit_codes(self) -> dict[int, int | None]:
        """Local rank -> exit status, None while it runs, of the processes that have been started."""
        context = self._pcontext
        if isinstance(context, MultiprocessContext) and context._pc:
            return {n: process.exitcode for n, process in enumerate(context._pc.processes)}
        if isinstance(context, SubprocessContext):
            return {n: handler.proc.poll() for n, handler in context.subprocess_handlers.items()}
        return {}

    def running(self) -> dict[int, int]:
        """Global rank -> process id of this machine's ranks that have not ended."""
        pids = self._pcontext.pids() if self._pcontext else {}
        workers = self._worker_group.workers
        return {workers[n].global_rank: pids[n] for n, code in self._exit_codes().items() if code is None}

    def failures(self) -> dict[int, ProcessFailure]:
        """Global rank -> how it ended, of this machine's ranks that have failed."""
        failed = {n: code for n, code in self._exit_codes().items() if code}
        if not failed or self._pcontext is None:
            return {}
        pids, files = self._pcontext.pids(), self._pcontext.error_files
        for n in failed:
            drop_half_written(Path(files[n]))
        workers = self._worker_group.workers
        return {
            workers[n].global_rank: ProcessFailure(n, pids[n], code, files[n]) for n, code in failed.items()
        }

    def cause(self, failures: dict[int, ProcessFailure]) -> RankFailure:
        return cause_of(failures, self.logs, self.ended)

    def look_for_absent(self) -> dict[int, str]:
        """Of this machine's ranks, those that others wait for and that do not come: rank -> where it is. None
        if one of them is just failing itself."""
        wait_until_true(lambda: not self.running(), time.monotonic() + _LEAVE_S)
        failed = self.failures()
        if failed and not self.cause(failed).consequence:
            return {}
        workers, codes = self._worker_group.workers, self._exit_codes()
        ended = {workers[n].global_rank: "ended with status 0" for n, code in codes.items() if code == 0}
        return ended | absent_ranks(self.running())

    @property
    def dumps(self) -> str:
        """How the names of the files begin to which the ranks write dumps of their collectives."""
        return self.logs.dumps if isinstance(self.logs, (NoLogs, RankLogs)) else ""

    def calls(self) -> dict[int, Calls]:
        """Where this machine's ranks stand that have written a dump before they ended."""
        return read_calls(self.dumps, [worker.global_rank for worker in self._worker_group.workers])

    def line_of(self, absent: Mapping[int, str]) -> str:
        """The line that names these as the cause."""
        here = socket.gethostname()
        where = "; ".join(f"rank {rank} on {here} {state}" for rank, state in absent.items())
        return f"{where}, while others waited for it{name_log(min(absent), self.logs)}"

    def _end_the_others(self) -> None:
        """If a rank has failed, ends the others of this machine, soon: they cannot go on without it. torch's
        agent would give one that is blocked 30 s. Notes where those stand that the failed one waited for."""
        if not self.failures():
            self.absent, self.ended = {}, frozenset()  # what an earlier start has left
            return
        wait_until_true(lambda: not self.running(), time.monotonic() + _LEAVE_S)
        cause = self.cause(self.failures())
        if cause.waited:
            self.absent = self.look_for_absent()
        elif not cause.consequence and self._remaining_restarts == 0 and self.peers.fixed:
            self.peers.stop_watching()
            self.end = self.peers.publish_end(cause.line, cause.status)  # before another machine's guess
        self.ended = frozenset(self.running())
        self._signal(signal.SIGTERM)
        self._wait(_END_S)
        if absent_ranks(self.running()):  # not blocked: perhaps it saves
            self._wait(self.peers.launch.grace_s - _END_S)
        self._signal(signal.SIGKILL)
        self._wait(_END_S)

    def _signal(self, number: signal.Signals) -> None:
        """Sends the signal to the ranks that run; one that is stopped could not react to it."""
        for pid in self.running().values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)

    def _wait(self, timeout_s: float) -> None:
        """Waits until all ranks have ended or returned; a fork that has returned waits for torch's agent."""
        context = self._pcontext

        def returned(n: int) -> bool:
            if not isinstance(context, MultiprocessContext):
                return False
            return n in context._return_values or not context._ret_vals[n].empty()

        def done() -> bool:
            return all(code is not None or returned(n) for n, code in self._exit_codes().items())

        wait_until_true(done, time.monotonic() + timeout_s)
