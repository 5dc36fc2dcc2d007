"""From a command to this machine's ranks: what is set up before torch's agent is imported."""

import io
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ddp_lib.distributed.addresses import join_host
from ddp_lib.distributed.device import thread_budget
from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch, count_ranks
from ddp_lib.launch.ranks import Ranks
from ddp_lib.processes.exit_status import print_error
from ddp_lib.processes.forkserver import collect_garbage
from ddp_lib.processes.signals import AGENT, GRACE, StopSignal, kill_descendants, stop_signals

# How much longer than --grace-s the launcher waits for its ranks, which then end by themselves.
LEAVE_S = 2.0


def start_agent(launch: Launch, join_timeout_s: float, ranks: Ranks) -> int:
    """Starts this machine's ranks; returns 0, or the status of the first failed rank."""
    with StopSignal(launch.grace_s + LEAVE_S, _end_now, impatient=True):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # what ranks print is shown as it comes
        os.environ |= {AGENT: str(os.getpid()), GRACE: str(launch.grace_s)}
        # In a store shared with the agent, restarted ranks would find the dead ranks' keys.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        # For multiprocessing's resource tracker, which would warn about what it tidies up after all processes
        # are killed.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
        try:
            ranks.prepare()  # a fork server imports torch while the agent does
            with telling_others(launch, join_timeout_s):
                nproc = count_ranks(launch.nproc)
            cores = thread_budget(launch.local[1] if launch.local else nproc)
            threads = os.environ.setdefault("OMP_NUM_THREADS", str(cores))
            where = socket.gethostname()
            if launch.endpoint is not None:
                address = join_host(launch.endpoint.host, launch.endpoint.port)
                where += f", one of {launch.nodes_text} machines, meeting at {address}"
            text = f"starting {nproc} rank(s) on {where}, OMP_NUM_THREADS={threads} per rank"
            print(f"ddp-launch: {text}", flush=True)
            from ddp_lib.launch.run_agent import run_agent

            collect_garbage()
            return run_agent(ranks, nproc, launch, join_timeout_s)
        finally:
            for number in stop_signals():  # this must not be interrupted
                signal.signal(number, signal.SIG_IGN)
            kill_descendants()
            del os.environ[AGENT]
            try:
                sys.stdout.flush()
            except OSError:  # nothing reads it any more; Python would end with another status
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def telling_others(launch: Launch, join_timeout_s: float) -> Iterator[None]:
    """Around what comes before the machines meet: a UserError that leaves the block ends the job on all."""
    try:
        yield
    except UserError as error:
        if launch.endpoint is None or launch.nodes[0] < launch.nodes[1]:
            raise
        print_error(str(error))  # at once: the others may not be there yet
        from ddp_lib.launch.run_agent import tell_others

        tell_others(launch, error, join_timeout_s)
        raise SystemExit(error.status) from error


def _end_now(number: int) -> None:
    """Called from a thread when the grace time is over, or at the second Ctrl-C."""
    try:
        kill_descendants()
    finally:
        os._exit(128 + number)
