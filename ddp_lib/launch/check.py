"""ddp-launch check: run on every machine before training, it says why they would not train together.

The machines meet as in training, at the master's port. Each listens where gloo would, connects to all
others, and tells what it found; every machine prints the same table, and one line for each cause.
"""

import json
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
    first_hit,
    is_here,
    meanings,
    own_address,
    own_addresses,
    resolve,
)
from ddp_lib.distributed.environment import read_place
from ddp_lib.distributed.handshake import versions
from ddp_lib.distributed.probe import Link, Probe, bandwidth, connect_all
from ddp_lib.distributed.store import PortTaken, host_store, reach_store, wait_for_name
from ddp_lib.errors import UserError
from ddp_lib.launch.diagnosis import causes, table
from ddp_lib.launch.options import (
    CheckOptions,
    LaunchOptions,
    count_ranks,
    pet_variables,
    read_launch,
)

# Shares of --timeout-s: until then all have come; have measured; have read the others' findings.
_CAME, _MEASURED, _READ = 0.5, 0.8, 0.9
_PINGS, _LOAD_S = 20, 0.5


@dataclass(frozen=True)
class Part:
    """This machine's part: where all meet, how many they are, and its number, if it has one."""

    endpoint: Endpoint
    size: int
    rank: int | None
    size_name: str
    rank_name: str
    hosts: bool


def run_check(launch: LaunchOptions, options: CheckOptions) -> int:
    """Prints the table and the causes; 0 where all is well, 2 where something is wrong."""
    if not options.timeout_s > 0:
        raise UserError(f"--timeout-s is {options.timeout_s:g}: give a number of seconds above 0")
    _never_longer_than(options.timeout_s)
    part = read_part(launch)
    began = time.monotonic()
    wait_for_name(part.endpoint, _CAME * options.timeout_s)
    address = own_address(part.endpoint, False)
    mine = card(launch, options, part, address)
    probe = None
    if address:
        probe = Probe(address)
        mine["probe"] = [probe.address, probe.port]
    try:
        cards, rows = _meet(part, mine, began, options.timeout_s)
    except (UserError, RuntimeError) as error:
        lost = "lost the master's check: look at its output"
        mine["troubles"].append(str(error) if isinstance(error, UserError) else lost)
        cards, rows = [{**mine, "size": 1}], [None]
        print(table(cards, rows))
        return _say([line for line in causes(cards, rows, 0) if "did not finish" not in line])
    finally:
        if probe is not None:
            probe.close()
    print(table(cards, rows))
    return _say(causes(cards, rows, _CAME * options.timeout_s))


def _say(lines: list[str]) -> int:
    sys.stdout.flush()
    for line in lines:
        print(f"ddp-launch check: {line}", file=sys.stderr, flush=True)
    if not lines:
        print("ddp-launch check: all is well", flush=True)
    return 2 if lines else 0


def _never_longer_than(timeout_s: float) -> None:
    def end() -> None:
        print(f"ddp-launch check: not done within {timeout_s:g} s", file=sys.stderr, flush=True)
        os._exit(2)

    limit = threading.Timer(timeout_s, end)
    limit.daemon = True
    limit.start()


def read_part(options: LaunchOptions) -> Part:
    """From the launcher's flags or PET_* variables, else from the four variables."""
    if options.rdzv_endpoint or options.nnodes != "1" or pet_variables():
        launch = read_launch(options)
        if launch.endpoint is None:
            raise UserError(
                "check compares several machines: give --nnodes 2 --rdzv-endpoint HOST:PORT"
            )
        return Part(
            launch.endpoint,
            launch.nodes[1],
            launch.node_rank,
            "--nnodes",
            "--node-rank",
            launch.node_rank == 0 if launch.node_rank is not None else is_here(launch.endpoint),
        )
    place = read_place(os.environ)
    if place.world_size == place.local_world_size:
        raise UserError(
            "check compares several machines: give --nnodes 2 --rdzv-endpoint HOST:PORT, or set "
            "MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK"
        )
    if place.local_rank:
        raise UserError(f"LOCAL_RANK={place.local_rank}: run the check once on each machine")
    size = place.world_size // place.local_world_size
    return Part(place.endpoint, size, place.node, "WORLD_SIZE", "RANK", place.rank == 0)


def card(launch: LaunchOptions, options: CheckOptions, part: Part, address: str) -> dict[str, Any]:
    """What this machine says of itself, as plain values."""
    troubles = []
    found = resolve(part.endpoint.host, part.endpoint.port)
    named_here = part.endpoint.host.partition(".")[0] == socket.gethostname().partition(".")[0]
    guessed = meanings(part.endpoint, False) != found
    if guessed and not (named_here or part.rank == 0):
        troubles.append(
            f"{part.endpoint.host_name} means {found[0]} here, this machine itself: correct /etc/hosts, "
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


def _meet(
    part: Part, mine: dict[str, Any], began: float, timeout_s: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any] | None]]:
    """Cards and findings of all that came; UserError where this machine found nobody."""
    came, measured, read = (began + share * timeout_s for share in (_CAME, _MEASURED, _READ))
    hosts = part.hosts
    server: dist.Store | None = None
    if hosts:
        try:
            server = host_store(part.endpoint, _left(came), False)
        except PortTaken:
            if part.rank is not None:
                raise
            hosts = mine["hosts"] = False  # another check on this computer is the master
    if server is None:
        server = reach_store(part.endpoint, _left(came), False)
    store = dist.PrefixStore("ddp_lib/check", server)
    # The host is number 0; a number that two were given must not hide one of them.
    number = 0 if hosts else store.add("came", 1)
    store.set(f"card/{number}", json.dumps(mine))
    if hosts:
        first_hit(lambda: store.add("came", 0) >= part.size - 1, came)
        store.set("list", str(store.add("came", 0) + 1))
    count = int(_get(store, "list", came + 2) or 0)
    if not count:
        raise UserError("the master's check does not answer: look at its output")
    if number >= count:
        raise UserError(
            f"{count} machines had come before this one: it is one too many for {part.size_name} "
            f"{part.size}, or too late (all are to start within {_CAME * timeout_s:.0f} s)"
        )
    cards = [json.loads(_get(store, f"card/{n}", measured) or "{}") for n in range(count)]
    row = _measure(store, cards, number, measured)
    store.set(f"row/{number}", json.dumps(row))
    texts = [_get(store, f"row/{n}", read) for n in range(count)]
    store.add("done", 1)
    if hosts:
        first_hit(lambda: store.add("done", 0) >= count, read)
    return cards, [json.loads(text) if text else None for text in texts]


def _measure(
    store: dist.Store, cards: list[dict[str, Any]], number: int, until: float
) -> dict[str, Any]:
    """Connects to all, one way each, then sends to the next: all at once, as a ring all-reduce does."""
    others = [n for n, card in enumerate(cards) if n != number and card.get("probe")]
    links = [asdict(Link("has no address" if n != number else "")) for n in range(len(cards))]
    for n, link in zip(
        others, connect_all([tuple(cards[n]["probe"]) for n in others], _PINGS), strict=True
    ):
        links[n] = asdict(link)
    store.add("linked", 1)
    first_hit(lambda: store.add("linked", 0) >= len(cards), until)
    following, rate = (number + 1) % len(cards), 0.0
    if following in others and not links[following]["trouble"]:
        address, port = cards[following]["probe"]
        rate = bandwidth(address, port, _LOAD_S, _left(until))
    return {"links": links, "rate": rate}


def _get(store: dist.Store, key: str, until: float) -> str:
    """Its value once it is there; empty where that is not before `until`."""
    return store.get(key).decode() if first_hit(lambda: store.check([key]), until) else ""


def _left(until: float) -> float:
    return max(1.0, until - time.monotonic())
