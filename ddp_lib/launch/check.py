"""ddp-launch check: run it on every machine before training; it says why they would not train together.

The machines meet as in training, at the master's port. Each listens where gloo would, connects to all
others and reports. Every machine prints the same table, and one line per cause.
"""

import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp_lib.data.dataset import digest_of
from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_here,
    own_address,
    own_addresses,
    resolve,
)
from ddp_lib.distributed.coordination import StoreGroup
from ddp_lib.distributed.environment import read_rank_env
from ddp_lib.distributed.handshake import versions
from ddp_lib.distributed.probe import Link, Probe, bandwidth, connect_all
from ddp_lib.distributed.store import PortTaken, host_store, reach_store, wait_for_name
from ddp_lib.errors import UserError
from ddp_lib.launch.diagnosis import Measured, Report, causes, table
from ddp_lib.launch.options import (
    CheckOptions,
    LaunchOptions,
    count_ranks,
    pet_variables,
    read_launch,
)

# Fractions of --timeout-s by which all must have come, measured, and read the others' results.
_CAME, _MEASURED, _READ = 0.5, 0.8, 0.9
_PINGS, _LOAD_S = 20, 0.5


@dataclass(frozen=True)
class Part:
    """Where the machines meet, how many there are, and this machine's number, if it has one."""

    endpoint: Endpoint
    size: int
    rank: int | None
    size_name: str
    rank_name: str
    hosts: bool


def run_check(launch: LaunchOptions, options: CheckOptions) -> int:
    """Prints the table and the causes; 0 if all is well, else 2."""
    if not options.timeout_s > 0:
        raise UserError(f"--timeout-s is {options.timeout_s:g}: give a number of seconds above 0")
    _exit_after(options.timeout_s)
    part = read_part(launch)
    began = time.monotonic()
    wait_for_name(part.endpoint, _CAME * options.timeout_s)
    address = own_address(part.endpoint, False)
    mine = report(launch, options, part, address)
    probe = None
    if address:
        probe = Probe(address)
        mine["probe"] = [probe.address, probe.port]
    try:
        reports, measured = _exchange_reports(part, mine, began, options.timeout_s)
    except (UserError, RuntimeError) as error:
        lost = "lost the master's check: look at its output"
        mine["troubles"].append(str(error) if isinstance(error, UserError) else lost)
        reports, measured = [{**mine, "size": 1}], [None]
        print(table(reports, measured))
        return _say([line for line in causes(reports, measured, 0) if "did not finish" not in line])
    finally:
        if probe is not None:
            probe.close()
    print(table(reports, measured))
    return _say(causes(reports, measured, _CAME * options.timeout_s))


def _say(lines: list[str]) -> int:
    sys.stdout.flush()
    for line in lines:
        print(f"ddp-launch check: {line}", file=sys.stderr, flush=True)
    if not lines:
        print("ddp-launch check: all is well", flush=True)
    return 2 if lines else 0


def _exit_after(timeout_s: float) -> None:
    def end() -> None:
        print(f"ddp-launch check: not done within {timeout_s:g} s", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()


def read_part(options: LaunchOptions) -> Part:
    """From the launcher's flags or PET_* variables, else from RANK, WORLD_SIZE and MASTER_*."""
    if options.rdzv_endpoint or options.nnodes != "1" or pet_variables():
        launch = read_launch(options)
        if launch.endpoint is None:
            raise UserError("check compares several machines: give --nnodes 2 --rdzv-endpoint HOST:PORT")
        return Part(
            launch.endpoint,
            launch.nodes[1],
            launch.node_rank,
            "--nnodes",
            "--node-rank",
            launch.node_rank == 0 if launch.node_rank is not None else is_here(launch.endpoint),
        )
    rank_env = read_rank_env(os.environ)
    if rank_env.world_size == rank_env.local_world_size:
        raise UserError(
            "check compares several machines: give --nnodes 2 --rdzv-endpoint HOST:PORT, or set "
            "MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK"
        )
    if rank_env.local_rank:
        raise UserError(f"LOCAL_RANK={rank_env.local_rank}: run the check once on each machine")
    size = rank_env.world_size // rank_env.local_world_size
    return Part(rank_env.endpoint, size, rank_env.node, "WORLD_SIZE", "RANK", rank_env.rank == 0)


def report(launch: LaunchOptions, options: CheckOptions, part: Part, address: str) -> Report:
    """This machine's report, as plain values."""
    troubles = []
    addresses = resolve(part.endpoint.host, part.endpoint.port)
    named_here = part.endpoint.host.partition(".")[0] == socket.gethostname().partition(".")[0]
    guessed = endpoint_addresses(part.endpoint, False) != addresses
    if guessed and not (named_here or part.rank == 0):
        troubles.append(
            f"{part.endpoint.host_name} means {addresses[0]} here, this machine itself: correct /etc/hosts, "
            "or give the master's address"
        )
    data = ""
    if options.data:
        try:
            data = digest_of(options.data, options.data_dir)
        except UserError as error:
            troubles.append(str(error))
    folder = Path(options.run_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        troubles.append(f"--run-dir {options.run_dir!r}: {folder} cannot be written")
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": own_addresses().get(address, ""),
        "hosts": part.hosts,
        "size": part.size,
        "rank": part.rank,
        "size_name": part.size_name,
        "rank_name": part.rank_name,
        "torch": versions()["torch"],
        "ddp_lib": versions()["ddp_lib"],
        "gpus": torch.cuda.device_count(),
        "ranks": count_ranks(launch.nproc_per_node),
        "backend": options.backend,
        "free": shutil.disk_usage(folder).free,
        "data": data,
        "troubles": troubles,
        "probe": None,
    }


def _exchange_reports(
    part: Part, mine: Report, began: float, timeout_s: float
) -> tuple[list[Report], list[Measured | None]]:
    """Reports and measurements of all machines that came; UserError if this one reached nobody."""
    came, measured, read = (began + share * timeout_s for share in (_CAME, _MEASURED, _READ))
    hosts = part.hosts
    server: dist.Store | None = None
    if hosts:
        try:
            server = host_store(part.endpoint, _left_s(came), False)
        except PortTaken:
            if part.rank is not None:
                raise
            hosts = mine["hosts"] = False  # another check on this computer is the master
    if server is None:
        server = reach_store(part.endpoint, _left_s(came), False)
    store = dist.PrefixStore("ddp_lib/check", server)
    # Numbered in order of arrival: a --node-rank given twice must not hide a machine.
    group = StoreGroup(store, 0 if hosts else None, part.size)
    reports = group.exchange("check", mine, timeout_s, deadline=came, complete=False)
    number = group.rank or 0
    if number >= len(reports):
        raise UserError(
            f"{len(reports)} machines had come before this one: it is one too many for "
            f"{part.size_name} {part.size}, or too late (all are to start within "
            f"{_CAME * timeout_s:.0f} s)"
        )
    group.world_size = len(reports)
    links = _connect(reports, number)
    # All send at once, as a ring all-reduce does.
    group.exchange("connected", None, timeout_s, deadline=measured, complete=False)
    rate = _send_to_next(reports, links, number, measured)
    own = {"links": links, "rate": rate}
    answers = group.exchange("measured", own, timeout_s, deadline=read, complete=False)
    if hosts:
        group.wait_until_read()
    else:
        group.count_as_read()
    return reports, [*answers, *[None] * (len(reports) - len(answers))]


def _connect(reports: list[Report], number: int) -> list[dict[str, Any]]:
    """This machine's connection to each of the others."""
    others = [n for n, report in enumerate(reports) if n != number and report.get("probe")]
    links = [asdict(Link("has no address" if n != number else "")) for n in range(len(reports))]
    probes = [tuple(reports[n]["probe"]) for n in others]
    for n, link in zip(others, connect_all(probes, _PINGS), strict=True):
        links[n] = asdict(link)
    return links


def _send_to_next(reports: list[Report], links: list[dict[str, Any]], number: int, deadline: float) -> float:
    """Bytes per second to the next machine; 0 if it cannot be reached."""
    following = (number + 1) % len(reports)
    if following == number or links[following]["trouble"]:
        return 0.0
    address, port = reports[following]["probe"]
    return bandwidth(address, port, _LOAD_S, _left_s(deadline))


def _left_s(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())
