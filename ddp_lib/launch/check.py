"""ddp-launch check: run it on every machine before training; it says why they would not train together.

The machines meet as in training, at the master's port. Each listens where gloo would, connects to the others
and reports. Every machine prints the same table, and one line per cause.
"""

import os
import shutil
import socket
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_lib.data.dataset import digest_of
from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_here,
    own_address,
    own_addresses,
    require_interfaces,
)
from ddp_lib.distributed.environment import read_rank_env
from ddp_lib.distributed.handshake import versions
from ddp_lib.distributed.probe import Link, Probe, bandwidth, connect_all, to_try
from ddp_lib.distributed.store import choose_interface, host_or_reach, wait_for_name
from ddp_lib.distributed.store_group import StoreGroup
from ddp_lib.errors import UserError, require_seconds
from ddp_lib.launch.diagnosis import Measured, Report, causes, table
from ddp_lib.launch.options import CheckOptions, LaunchOptions, count_ranks, read_launch

# Fractions of --timeout-s by which all must have come, measured, and read the others' results.
_CAME, _MEASURED, _READ = 0.5, 0.8, 0.9
_PINGS, _LOAD_S = 20, 0.5


def run_check(launch: LaunchOptions, options: CheckOptions) -> int:
    """Prints the table and the causes; 0 if all is well, else 2."""
    require_seconds("--timeout-s", options.timeout_s)
    _exit_after(options.timeout_s)
    endpoint, number = read_endpoint(launch)
    began = time.monotonic()
    wait_for_name(endpoint, _CAME * options.timeout_s)
    require_interfaces()
    with ExitStack() as stack:
        trouble, server = None, None
        came = began + _CAME * options.timeout_s
        try:
            # Another check on this computer may be the master.
            numbered, job = number["rank"] is not None, "ddp-launch check"
            server, number["hosts"] = host_or_reach(
                endpoint, number["hosts"], numbered, _left_s(came), False, job
            )
            choose_interface(endpoint, False, server, _left_s(came))
        except UserError as error:
            trouble = error
        mine = {**number, **report(launch, options, endpoint, number["rank"])}
        if mine["address"]:
            probe = stack.enter_context(closing(Probe(mine["address"])))
            mine["probe"] = [probe.address, probe.port]
        try:
            if trouble or server is None:
                raise trouble or UserError("no store")
            reports, measured = _exchange_reports(server, mine, began, options.timeout_s)
            lines = causes(reports, measured, _CAME * options.timeout_s)
        except (UserError, RuntimeError) as error:
            lost = "lost the master's check: look at its output"
            mine["troubles"].append(str(error) if isinstance(error, UserError) else lost)
            reports, measured = [{**mine, "size": 1}], [None]
            lines = [line for line in causes(reports, measured, 0) if "did not finish" not in line]
    print(table(reports, measured), flush=True)
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


def read_endpoint(options: LaunchOptions) -> tuple[Endpoint, Report]:
    """Where the machines meet; how many there are, and this machine's number, if it has one.

    From the flags and variables, as read_launch takes them.
    """
    launch = read_launch(options)
    if launch.endpoint is None:
        raise UserError(
            "check compares several machines: give --nnodes 2 --rdzv-endpoint HOST:PORT, or set "
            "MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK"
        )
    if launch.local is None:
        rank, names = launch.node_rank, {"size_name": "--nnodes", "rank_name": "--node-rank"}
        hosts = rank == 0 if rank is not None else is_here(launch.endpoint)
        return launch.endpoint, {"size": launch.nodes[1], "rank": rank, "hosts": hosts, **names}
    env = read_rank_env(os.environ)
    if env.one_machine:
        raise UserError(
            f"check compares several machines, but {env.variables} are the ranks of one: unset these "
            "variables, and give --nnodes 2 --rdzv-endpoint HOST:PORT"
        )
    if env.local_rank:
        raise UserError(f"LOCAL_RANK={env.local_rank}: run the check once on each machine")
    size, names = env.world_size // env.local_world_size, {"size_name": "WORLD_SIZE", "rank_name": "RANK"}
    return env.endpoint, {"size": size, "rank": env.node, "hosts": env.rank == 0, **names}


def report(launch: LaunchOptions, options: CheckOptions, endpoint: Endpoint, rank: int | None) -> Report:
    """What this machine is and has, as plain values."""
    troubles, data = [], ""
    addresses = endpoint_addresses(endpoint, one_machine=True)  # what the name means here
    named_here = endpoint.host.partition(".")[0] == socket.gethostname().partition(".")[0]
    if endpoint_addresses(endpoint, False) != addresses and not (named_here or rank == 0):
        troubles.append(
            f"{endpoint.host_name} means {addresses[0]} here, this machine itself: correct /etc/hosts, or "
            "give the master's address"
        )
    if options.data:
        try:
            data = digest_of(options.data, options.data_dir, options.image_size)
        except UserError as error:
            troubles.append(str(error))
    folder = Path(options.run_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        troubles.append(f"--run-dir {options.run_dir!r}: {folder} cannot be written")
    address = own_address(endpoint, False)
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": own_addresses().get(address, ""),
        **versions(),
        "gpus": torch.cuda.device_count(),
        "ranks": count_ranks(launch.nproc_per_node),
        "backend": options.backend,
        "free": shutil.disk_usage(folder).free,
        "data": data,
        "troubles": troubles,
        "probe": None,
    }


def _exchange_reports(
    server: dist.Store, mine: Report, began: float, timeout_s: float
) -> tuple[list[Report], list[Measured | None]]:
    """Reports and measurements of all machines that came; UserError if this one reached nobody."""
    came, measured, read = (began + share * timeout_s for share in (_CAME, _MEASURED, _READ))
    # Numbered in order of arrival: a --node-rank given twice must not hide a machine.
    hosts = mine["hosts"]
    group = StoreGroup(dist.PrefixStore("ddp_lib/check", server), 0 if hosts else None, mine["size"])
    reports = group.exchange("check", mine, timeout_s, deadline=came, complete=False)
    number = group.rank or 0
    if number >= len(reports):
        raise UserError(
            f"{len(reports)} machines had come before this one: it is one too many for {mine['size_name']} "
            f"{mine['size']}, or too late (all are to start within {_CAME * timeout_s:.0f} s)"
        )
    group.world_size = len(reports)
    tried = {0, *to_try(len(reports), number)} - {number}  # the master's clock is that of all
    others = [n for n in sorted(tried) if reports[n]["probe"]]
    links = {n: Link("has no address") for n in tried}
    for n, link in zip(others, connect_all((reports[n]["probe"] for n in others), _PINGS), strict=True):
        links[n] = link
    # All send at once, as a ring all-reduce does.
    group.exchange("connected", None, timeout_s, deadline=measured, complete=False)
    following, rate = (number + 1) % len(reports), 0.0
    if following != number and not links[following].trouble:
        address, port = reports[following]["probe"]
        rate = bandwidth(address, port, _LOAD_S, _left_s(measured))
    own = {"links": {str(n): vars(link) for n, link in links.items()}, "rate": rate}
    answers = group.exchange("measured", own, timeout_s, deadline=read, complete=False)
    if hosts:
        group.wait_until_read()
    else:
        group.count_as_read()
    return reports, [*answers, *[None] * (len(reports) - len(answers))]


def _left_s(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())
