"""The ranks meet at the store, before the process group: are they who they should be, and equal?"""

import json
import platform
import socket
import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from ddp_lib import __version__
from ddp_lib.distributed.addresses import own_address
from ddp_lib.distributed.coordination import exchange
from ddp_lib.distributed.environment import Place
from ddp_lib.distributed.probe import Probe, connect_all
from ddp_lib.errors import UserError


def versions() -> dict[str, str]:
    return {
        "ddp_lib": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


# Between machines, these must be equal; Python's may differ.
_EQUAL = ("ddp_lib", "torch")


def meet(
    store: dist.Store,
    place: Place,
    possible: str,
    reason: str,
    deadline: float,
    limit_s: float,
) -> tuple[str, str]:
    """All ranks tell each other who they are; returns the backend that all can use, and why.

    UserError, on every rank, for a number that two have, another WORLD_SIZE, another version of
    torch or ddp_lib, machines that cannot connect to each other, and ranks that do not come.
    """
    me = socket.gethostname()
    if store.add(f"taken/{place.rank}", 1) > 1:
        first = store.get(f"join/{place.rank}") if store.check([f"join/{place.rank}"]) else b"{}"
        other = json.loads(first).get("host", "another machine")
        raise UserError(
            f"RANK={place.rank} is taken by another process: it is set on {other} and on {me}; "
            f"give each a number of its own, 0 to {place.world_size - 1}"
        )
    with ExitStack() as stack:
        probe = None
        address = own_address(place.endpoint, place.one_machine)
        if place.local_rank == 0 and not place.one_machine and address:
            probe = stack.enter_context(Probe(address))
        card = {
            "host": me,
            "world_size": place.world_size,
            "backend": possible,
            "why": reason,
            "versions": versions(),
            "probe": [probe.address, probe.port] if probe else None,
        }

        def agree(rank: int, text: str) -> None:
            theirs = json.loads(text)
            if theirs["world_size"] != place.world_size:
                raise UserError(
                    f"WORLD_SIZE={place.world_size} here ({me}), but {theirs['world_size']} for rank "
                    f"{rank} on {theirs['host']}: set the same on every machine"
                )

        text = json.dumps(card)
        texts = exchange(
            store, "join", place.rank, place.world_size, text, deadline, limit_s, agree
        )
        cards = [json.loads(text) for text in texts]
        for name in _EQUAL:
            compare(name, [(card["host"], card["versions"][name]) for card in cards])
        if not place.one_machine:
            trouble = _trouble(cards, place) if probe else ""
            # Ranks that try nothing wait for those that do.
            until = max(deadline, time.monotonic() + limit_s)
            found = exchange(
                store, "connect", place.rank, place.world_size, trouble, until, limit_s
            )
            if any(found):
                raise UserError(next(filter(None, found)))
    for rank, theirs in enumerate(cards):
        if theirs["backend"] != "nccl":
            return theirs["backend"], f"rank {rank} on {theirs['host']}: {theirs['why']}"
    return possible, reason


def compare(name: str, found: list[tuple[str, Any]], cure: str = "") -> None:
    """UserError where the ranks' (machine, value) pairs do not hold one value."""
    for rank, (host, value) in enumerate(found):
        first_host, first = found[0]
        if value != first:
            raise UserError(
                f"{name} is {value!r} for rank {rank} on {host}, but {first!r} for rank 0 on "
                f"{first_host}: {cure or 'install the same on every machine'}"
            )


def _trouble(cards: list[dict[str, Any]], place: Place) -> str:
    """Why this machine cannot connect to another; empty where it can to all."""
    others = [c for r, c in enumerate(cards) if c["probe"] and r != place.rank]
    for theirs, link in zip(others, connect_all(c["probe"] for c in others), strict=True):
        if link.trouble:
            address, port = theirs["probe"]
            return unreachable(socket.gethostname(), theirs["host"], address, port, link.trouble)
    return ""


def unreachable(here: str, there: str, address: str, port: int, trouble: str) -> str:
    """One line for a connection that failed: what was tried, the likely cause, the cure."""
    return (
        f"{here} reaches the master, but its connection to {there} at {address}, port {port}, "
        f"{trouble}: gloo and NCCL use ports that the system picks, so open all ports between the "
        "machines, not MASTER_PORT alone; in a container, run it with --network host"
    )
