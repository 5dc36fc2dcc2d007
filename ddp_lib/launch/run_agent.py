"""A launcher from the rendezvous to its exit status: runs the agent, and agrees with the other machines on
the cause of a failure."""

import errno
import logging
import os
import signal
import socket
import sys
import time
from contextlib import nullcontext, suppress

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousError

from ddp_lib.distributed.addresses import join_host
from ddp_lib.distributed.store_group import LINGER_S
from ddp_lib.errors import MAY_PASS, NO_SHM, TransientError, UserError, first_line, limit_reached
from ddp_lib.launch.agent import Agent
from ddp_lib.launch.failure import RankFailure, say_where
from ddp_lib.launch.flight_recorder import share_calls, who_is_behind
from ddp_lib.launch.machines import compare_machines
from ddp_lib.launch.options import Launch
from ddp_lib.launch.ranks import Ranks
from ddp_lib.launch.rendezvous import Rendezvous, open_rendezvous, refuse
from ddp_lib.processes.exit_status import print_error
from ddp_lib.processes.forkserver import no_main_module
from ddp_lib.processes.signals import kill_descendants, relay, stop_signals

# If this machine's ranks only lost another rank, wait so long for the other machine's reason: a failed rank
# may linger before its agent learns of it.
_CAUSE_S = LINGER_S + 5
# A machine is silent if its launcher gives no sign of life for so long. How long ranks may take to end.
_ALIVE_S, _END_S = 2.0, 4.0
# How long a machine that cannot take part tries to reach the others, to tell them.
_TELL_S = 5.0


def tell_others(launch: Launch, error: UserError, join_timeout_s: float) -> None:
    """Ends the job on the other machines too, if they are there: this one cannot start its ranks. They would
    wait for it until their timeout."""
    with suppress(UserError, RuntimeError, RendezvousError):
        *_, peers = open_rendezvous(launch, min(_TELL_S, join_timeout_s))
        refuse(peers, error, join_timeout_s)


def run_agent(ranks: Ranks, nproc: int, launch: Launch, join_timeout_s: float) -> int:
    """Runs `nproc` ranks here, together with the other machines of `launch`.

    Returns 0, 128 + n if signal n stopped the agent, or the exit status of the rank that failed first,
    after a line that says why. UserError if the machines do not meet, or are not equal.
    """
    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    # As in the ranks, which keep nohup's setting.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in stop_signals())
    try:
        try:
            handler, master, peers = open_rendezvous(launch, join_timeout_s)
        except (RendezvousError, DistError) as error:
            raise TransientError(f"lost the launcher at {launch.endpoint} ({first_line(error)})") from error
        agents: list[Agent] = []

        def look_for_absent() -> None:
            for agent in agents:
                if absent := agent.look_for_absent():
                    peers.publish_end(agent.line_of(absent), MAY_PASS)

        def lost(seconds: float) -> None:
            _lose_master(launch, seconds)

        watching = peers.watching(_stop, look_for_absent, lost) if launch.endpoint else nullcontext()
        try:
            with watching:
                compare_machines(peers, ranks, nproc, join_timeout_s)
                entrypoint, args, start_method = ranks.entry()
                spec = WorkerSpec(
                    role="rank",
                    local_world_size=nproc,
                    entrypoint=entrypoint,
                    args=args,
                    rdzv_handler=handler,
                    max_restarts=launch.max_restarts,
                    master_addr=master,
                )
                logs, prefix = ranks.logs(launch), "[rank ${rank}] "
                agent = Agent(spec, logs, start_method=start_method, log_line_prefix_template=prefix)
                agent.peers, agent.logs = peers, logs
                agents.append(agent)
                return _run(agent, handler, join_timeout_s)
        except (SignalException, SystemExit):
            if peers.seen:  # the signal came from `_stop`: another machine ended the job
                return peers.seen[1]
            raise
        finally:
            peers.wait_until_read()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)


def _run(agent: Agent, handler: Rendezvous, join_timeout_s: float) -> int:
    peers, succeeded = agent.peers, False
    try:
        try:
            with no_main_module():
                result = agent.run()
        finally:
            if peers.launch.endpoint:
                peers.stop_watching()  # this machine's own end
        # None: more machines came than --nnodes allows.
        succeeded = result is None or result.state == WorkerState.SUCCEEDED
        if peers.seen:  # `_stop` has printed it
            return peers.seen[1]
        if succeeded:
            end = peers.published or peers.read_end()  # while this machine waited for the others
            if end:
                print_error(end[0])
            return end[1] if end else 0
        line, status = _agree_on_cause(agent.cause(result.failures), agent)
        print_error(line)
        return status
    except SystemExit as stopped:  # from our handler, before torch's is there
        if isinstance(stopped.code, int):
            peers.publish_signal(stopped.code)
        raise
    except (RendezvousError, DistError) as error:
        if peers.seen:
            return peers.seen[1]
        if end := peers.read_end():
            print_error(end[0])
            return end[1]
        raise _explain(error, agent, join_timeout_s) from error
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, or no more processes
        shm = error.filename is None and error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC)
        why = limit_reached(error) or (NO_SHM if shm else str(error))  # of multiprocessing's semaphores
        trouble = TransientError(f"cannot start the ranks on {socket.gethostname()}: {why}")
        peers.publish_end(str(trouble), trouble.status)
        raise trouble from error
    except UserError as error:
        peers.publish_end(say_where(str(error)), error.status)
        raise
    finally:
        told_to = isinstance(sys.exc_info()[1], (SignalException, SystemExit))
        with suppress(RendezvousError, DistError):
            if not peers.fixed and (told_to or not agent.began):  # an elastic job goes on without us
                handler.leave()
            elif not succeeded:  # the ranks of another machine may still be at work
                handler.shutdown()


def _stop(line: str, status: int) -> None:
    """Ends this launcher because another has ended the job, with the signal of that machine, if any."""
    with suppress(OSError):  # nothing reads the output any more
        print_error(line)
    # torch's agent then ends its ranks and raises.
    relay(status - 128 if status - 128 in stop_signals() else signal.SIGTERM)


def _lose_master(launch: Launch, seconds: float) -> None:
    """Called from a thread: the main thread may be blocked inside torch until TCP gives up."""
    with suppress(OSError):
        print_error(
            f"{launch.endpoint} has not answered for {seconds:.0f} s: that machine is off or frozen, or the "
            "network is down; the same command goes on from the last checkpoint"
        )
    ranks = psutil.Process().children(recursive=True)
    for rank in ranks:
        with suppress(psutil.Error):
            rank.terminate()
    psutil.wait_procs(ranks, timeout=_END_S)
    try:
        kill_descendants()
    finally:
        os._exit(MAY_PASS)


def _explain(error: Exception, agent: Agent, join_timeout_s: float) -> UserError:
    """Explains why torch's rendezvous failed."""
    if not agent.began:
        return TransientError(agent.peers.who_came(join_timeout_s))
    endpoint = agent.peers.launch.endpoint
    where = "this machine" if endpoint is None else join_host(endpoint.host, endpoint.port)
    return TransientError(
        f"lost the agent at {where} ({type(error).__name__}: {' '.join(str(error).split())[:200]}): see "
        "that machine's output; the same command goes on from the last checkpoint"
    )


def _agree_on_cause(failure: RankFailure, agent: Agent) -> tuple[str, int]:
    """The line that names the cause on any machine, and the exit status. failure: this machine's first."""
    peers, line, status = agent.peers, failure.line, failure.status
    if agent.end:
        return agent.end
    absent: object = failure.consequence and agent.absent
    if absent:
        line, status = agent.line_of(agent.absent), MAY_PASS
    elif failure.consequence and (calls := agent.calls()):
        absent = who_is_behind(share_calls(peers.store, peers.launch.nodes[1], calls))
        if absent:
            line = f"{absent}; a dump of each rank: {agent.dumps}*, which torchfrtrace reads"
            status = MAY_PASS
    if not peers.fixed:
        return line, status
    if not failure.consequence or absent:
        return peers.publish_end(line, status)
    if failure.waited:
        peers.ask_for_absent()
    deadline = time.monotonic() + _CAUSE_S
    while not (end := peers.read_end()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not end and (silent := peers.silent_since(_ALIVE_S)):
        line, status = (
            f"{', '.join(silent)} does not answer: off, frozen, or cut off from the network",
            MAY_PASS,
        )
    return end or peers.publish_end(line, status)
