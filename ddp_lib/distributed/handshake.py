"""Before the process group: are the ranks numbered right, equal, and able to reach each other?"""

import platform
import socket
import time
from dataclasses import asdict
from itertools import groupby
from typing import Any
from uuid import uuid4

import torch

from ddp_lib import __version__
from ddp_lib.distributed.addresses import mtu_cure, other_interfaces, own_address
from ddp_lib.distributed.coordination import require_equal
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.nics import listening, name_networks, unreachable
from ddp_lib.distributed.placement import Place, Seen, place
from ddp_lib.distributed.probe import LARGE_LOST, connect_all, to_try
from ddp_lib.distributed.store_group import Own, StoreGroup
from ddp_lib.errors import PeerError, TransientError, UserError


def versions() -> dict[str, str]:
    return {"ddp_lib": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def handshake(group: StoreGroup, rank_env: RankEnv, seen: Seen, timeout_s: float, deadline: float) -> Place:
    """Compares all ranks with each other; returns this rank's place.

    deadline: monotonic time, timeout_s after the start.

    UserError, on every rank, if two ranks have the same number, if WORLD_SIZE or the versions of torch or
    ddp_lib differ, if machines cannot connect to each other, if ranks do not come, or as `place` raises it.
    """
    host, size = socket.gethostname(), rank_env.world_size
    if group.store.check(["joined"]):
        raise PeerError(
            f"{rank_env.endpoint} belongs to a job of {group.store.get('joined').decode()} that has started: "
            "choose another port on every machine, or end that job first",
            TransientError.status,
        )
    tries = rank_env.local_rank == 0 and not rank_env.one_machine
    address = own_address(rank_env.endpoint, False) if tries else ""
    with listening(address) as probes:
        mine: dict[str, Any] = {
            "id": uuid4().hex,
            "host": host,
            "world_size": size,
            "seen": asdict(seen),
            "versions": versions(),
            **probes,
        }

        def check(rank: int, theirs: dict[str, Any]) -> None:
            if theirs["world_size"] != size:
                raise _other_size(size, host, theirs["world_size"], rank, theirs["host"])

        def taken(theirs: dict[str, Any]) -> UserError:
            return UserError(
                f"RANK={rank_env.rank} is taken by another process: it is set on {theirs['host']} and on "
                f"{host}; give each a number of its own, 0 to {size - 1}"
            )

        def conclude(ranks: list[dict[str, Any]]) -> Own:
            for name in ("ddp_lib", "torch"):  # Python's version may differ
                answers = [(theirs["host"], theirs["versions"][name]) for theirs in ranks]
                require_equal(name, answers, "install the same on every machine")
            places = place([Seen(**theirs["seen"]) for theirs in ranks])
            hosts = [[name, len([*same])] for name, same in groupby(theirs["host"] for theirs in ranks)]
            machines = [
                {"rank": rank, **{name: theirs[name] for name in ("host", "probe", "nics")}}
                for rank, theirs in enumerate(ranks)
                if theirs["probe"]
            ]
            return Own([size, hosts, machines], [asdict(own) for own in places])

        answer, own = group.exchange("join", mine, timeout_s, conclude, check, deadline, taken=taken)
        theirs, hosts, machines = answer
        if own is None:  # this rank is none of the others'
            raise PeerError(str(_other_size(theirs, hosts[0][0], size, rank_env.rank, host)))
        if not rank_env.one_machine:
            # The other local ranks wait while each machine's first tries its connections.
            until = max(deadline, time.monotonic() + timeout_s)
            number = next((n for n, machine in enumerate(machines) if machine["rank"] == rank_env.rank), None)
            require_connections(group, machines, number, timeout_s, until)
    group.hosts = [name for name, count in hosts for _ in range(count)]
    if group.hosts_store:  # in an agent's store, the ranks of the next start would find it
        group.store.set("joined", f"{size} rank(s), of which {host} has number 0,")
    return Place(**own)


def _other_size(first: int, first_host: str, size: int, rank: int, host: str) -> UserError:
    return UserError(
        f"WORLD_SIZE={first} for rank 0 on {first_host}, but {size} for rank {rank} on {host}: set the same "
        "on every machine"
    )


def require_connections(
    group: StoreGroup,
    machines: list[dict[str, Any]],
    number: int | None,
    timeout_s: float,
    deadline: float | None = None,
) -> None:
    """UserError, on every rank or machine, if one cannot connect to another. Tells NCCL of all networks that
    lead to all machines. number: this one's, if it is one of them; it tries connections if it listens itself.
    """
    trouble, lost = "", []
    if number is not None and machines[number]["probe"]:
        trouble = connection_trouble(machines, number)
        lost = unreachable(machines, number) if not trouble else []

    def conclude(answers: list[tuple[str, list[str]]]) -> list[str]:
        for text in filter(None, (text for text, _ in answers)):
            raise UserError(text)
        return [address for _, addresses in answers for address in addresses]

    lost = group.exchange("connect", [trouble, lost], timeout_s, conclude, deadline=deadline)
    name_networks(machines, lost)


def connection_trouble(machines: list[dict[str, Any]], number: int) -> str:
    """Why this machine cannot connect to another; empty if it can connect to all that it tries."""
    others = [machines[n] for n in to_try(len(machines), number) if machines[n]["probe"]]
    for theirs, link in zip(others, connect_all(t["probe"] for t in others), strict=True):
        if link.trouble:
            address, port = theirs["probe"]
            text = (
                f"{socket.gethostname()} reaches the master, but its connection to {theirs['host']} at "
                f"{address}, port {port}, {link.trouble}: "
            )
            if link.trouble == LARGE_LOST:
                return text + mtu_cure()
            return (
                f"{text}gloo and NCCL use ports that the system picks, so open all ports between the "
                "machines, not MASTER_PORT alone; in a container, run it with --network host"
                f"{other_interfaces()}"
            )
    return ""
