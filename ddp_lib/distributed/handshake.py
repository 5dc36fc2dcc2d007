"""Before the process group: are the ranks numbered right, equal, and able to reach each other?"""

import platform
import socket
import time
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import torch

from ddp_lib import __version__
from ddp_lib.distributed.addresses import mtu_cure, other_interfaces, own_address
from ddp_lib.distributed.coordination import StoreGroup, require_equal
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.nics import listening, name_networks, unreachable
from ddp_lib.distributed.placement import Place, Seen, place
from ddp_lib.distributed.probe import LARGE_LOST, connect_all
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
        came = {rank_env.rank: mine}

        def check(rank: int, theirs: dict[str, Any]) -> None:
            if theirs["world_size"] != size:
                raise UserError(
                    f"WORLD_SIZE={size} for rank 0 on {host}, but {theirs['world_size']} for rank "
                    f"{rank} on {theirs['host']}: set the same on every machine"
                )
            if came.setdefault(rank, theirs) is not theirs:
                raise _taken(rank, came[rank]["host"], theirs["host"], size)

        def conclude(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for name in ("ddp_lib", "torch"):  # Python's version may differ
                answers = [(theirs["host"], theirs["versions"][name]) for theirs in ranks]
                require_equal(name, answers, "install the same on every machine")
            _place_all(ranks)
            return ranks

        ranks = group.exchange("join", mine, timeout_s, conclude, check, deadline)
        own = ranks[rank_env.rank] if rank_env.rank < len(ranks) else ranks[0]
        if own["id"] != mine["id"]:  # this rank came too late: it is no concern of the others
            raise PeerError(str(_taken(rank_env.rank, own["host"], host, size)))
        if not rank_env.one_machine:
            # The other local ranks wait while each machine's first tries its connections.
            until = max(deadline, time.monotonic() + timeout_s)
            require_connections(group, ranks, rank_env.rank, timeout_s, until)
    group.hosts = [theirs["host"] for theirs in ranks]
    if group.hosts_store:  # in an agent's store, the ranks of the next start would find it
        group.store.set("joined", f"{size} rank(s), of which {host} has number 0,")
    return _place_all(ranks)[rank_env.rank]


def _place_all(ranks: list[dict[str, Any]]) -> list[Place]:
    return place([Seen(**theirs["seen"]) for theirs in ranks])


def _taken(rank: int, first: str, second: str, size: int) -> UserError:
    return UserError(
        f"RANK={rank} is taken by another process: it is set on {first} and on {second}; "
        f"give each a number of its own, 0 to {size - 1}"
    )


def require_connections(
    group: StoreGroup,
    machines: list[dict[str, Any]],
    number: int,
    timeout_s: float,
    deadline: float | None = None,
) -> None:
    """UserError, on every rank or machine, if one cannot connect to another. Tells NCCL of all networks that
    lead to all machines. number: this one's; it tries connections if it listens itself."""
    tries = bool(machines[number]["probe"])
    trouble = connection_trouble(machines, number) if tries else ""
    lost = unreachable(machines, number) if tries and not trouble else []

    def conclude(answers: list[tuple[str, list[str]]]) -> list[str]:
        for text in filter(None, (text for text, _ in answers)):
            raise UserError(text)
        return [address for _, addresses in answers for address in addresses]

    lost = group.exchange("connect", [trouble, lost], timeout_s, conclude, deadline=deadline)
    name_networks(machines, lost)


def connection_trouble(ranks: list[dict[str, Any]], own_rank: int) -> str:
    """Why this machine cannot connect to another; empty if it can connect to all."""
    others = [theirs for rank, theirs in enumerate(ranks) if theirs["probe"] and rank != own_rank]
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
