"""The ranks of this machine under torch's elastic agent: one line for each failure, and no orphan."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from ddp_lib.errors import UserError
from ddp_lib.network import first_hit, is_loopback, own_address_towards, own_addresses, resolve
from ddp_lib.stop import end_all_below, signals_to_heed


class Agent(LocalElasticAgent):
    """torch's agent, which says why it starts the ranks again."""

    began = False

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.began = True
        result: RunResult = super()._monitor_workers(worker_group)
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


def run_agent(
    command: list[str],
    nproc: int,
    nodes: tuple[int, int],
    endpoint: tuple[str, int] | None,
    job: str,
    max_restarts: int,
    join_timeout_s: float,
) -> int:
    """Runs `command` as `nproc` ranks here, together with the other machines at `endpoint`.

    nodes: least and most machines. endpoint None: this machine alone. Returns 0, 128 + n where
    signal n stopped the agent, or the exit status of the rank that failed first, after a line that
    says why. UserError where the machines do not meet.
    """
    if "LOGLEVEL" not in os.environ:  # torch's own variable for its agent's log
        logging.disable(logging.ERROR)
    # As in the ranks: nohup's word stands.
    heeded = ",".join(number.name for number in signals_to_heed())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = heeded
    agent = None
    try:
        handler, address = _rendezvous(endpoint, nodes, job, join_timeout_s)
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=handler,
            max_restarts=max_restarts,
            local_addr=address,
        )
        agent = Agent(spec, DefaultLogsSpecs())
        result = agent.run()
        handler.shutdown()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except (RendezvousError, DistError) as error:
        where = "this machine" if endpoint is None else f"{endpoint[0]}:{endpoint[1]}"
        why = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if agent is not None and agent.began:
            raise UserError(
                f"lost the agent at {where} {why}: see that machine's output; "
                "the same command goes on from the last checkpoint"
            ) from error
        raise UserError(
            f"the machines did not meet at {where} within {join_timeout_s:g} s {why}: start the same "
            "command on every machine; check --rdzv-endpoint, --nnodes and --join-timeout-s"
        ) from error
    finally:
        end_all_below()
    if result is None or not result.is_failed():  # None: more machines came than --nnodes allows
        return 0
    line, status = describe(result.failures)
    print(f"ddp-launch: error: {line}", file=sys.stderr, flush=True)
    return status


def _rendezvous(
    endpoint: tuple[str, int] | None, nodes: tuple[int, int], job: str, join_timeout_s: float
) -> tuple[RendezvousHandler, str]:
    """Where the agents meet, and the address by which the others reach this machine."""
    if endpoint is None:
        address, own = "127.0.0.1", True
        text = "127.0.0.1:0"
    else:
        host, port = endpoint
        if not first_hit(lambda: bool(resolve(host, port)), time.monotonic() + join_timeout_s, 0.2):
            raise UserError(
                f"--rdzv-endpoint's host {host!r} does not resolve: check the name, or give an "
                f"address (tried for {join_timeout_s:g} s; --join-timeout-s sets it)"
            )
        found = resolve(host, port)
        own = any(one in own_addresses() or is_loopback(one) for one in found)
        # What a machine calls itself may mean nothing, or loopback, on the others; the endpoint and
        # the route to it mean the same everywhere.
        address = host if own else own_address_towards(found[0], port)
        text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    settings: dict[str, Any] = {
        "join_timeout": max(1, round(join_timeout_s)),
        "read_timeout": max(1, round(join_timeout_s)),
    }

    def give_up() -> None:
        print(
            f"ddp-launch: error: {text} answers, but not as a rendezvous: another program has this "
            "port, choose a free one for --rdzv-endpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    # A program that accepts and then is silent would hold torch in C++ for ever.
    limit = threading.Timer(join_timeout_s + 2, give_up)
    limit.daemon = True
    limit.start()
    try:
        for is_host in (True, False) if own else (False,):
            parameters = RendezvousParameters(
                "c10d", text, job, *nodes, local_addr=address, is_host=is_host, **settings
            )
            try:
                return get_rendezvous_handler(parameters), address
            except RendezvousConnectionError:
                if not is_host:
                    raise  # else: perhaps another agent of this machine hosts it
    finally:
        limit.cancel()
    raise AssertionError


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
