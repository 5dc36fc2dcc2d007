"""The key-value store at the master, and what the ranks tell each other there before they train."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ddp_lib import network
from ddp_lib.errors import UserError
from ddp_lib.place import Place


def pick_interface(place: Place) -> None:
    """Tells gloo which interface leads to the master, instead of asking what the host name means."""
    target = "127.0.0.1" if place.one_machine else None
    if target is None:
        found = [
            a
            for a in network.resolve(place.master_addr, place.master_port)
            if not network.is_loopback(a)
        ]
        target = found[0] if found else None
    name = network.interface_towards(target, place.master_port) if target else None
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def open_store(place: Place, env: Mapping[str, str], join_timeout_s: float) -> dist.Store:
    """The key-value store at the master: hosted by rank 0, or already by torchrun's agent."""
    by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=join_timeout_s)
    host, port = place.master_addr, place.master_port
    if place.rank == 0 and not by_agent:
        server, address = network.listen(host, port, join_timeout_s, place.one_machine)
        store: dist.Store = dist.TCPStore(
            address,
            port,
            None,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )
    else:
        address = network.wait_for_master(host, port, join_timeout_s)
        store = _connect(address, port, timeout, f"MASTER_ADDR={host} MASTER_PORT={port}")
    # After a restart under torchrun the agent's store still holds the keys of the attempt before.
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"ddp_lib/{env.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def _connect(address: str, port: int, timeout: timedelta, named: str) -> dist.Store:
    """A client of the store; UserError where something else answers, or nothing does.

    In a thread: torch waits without limit for the first word of a program that accepts and is silent.
    """
    outcome: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            outcome.append(
                dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
            )
        except (RuntimeError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    with _without_stderr():
        thread.start()
        thread.join(timeout.total_seconds() + 1)
    found = outcome[0] if outcome else TimeoutError("it accepts and is silent")
    if isinstance(found, Exception):
        raise UserError(
            f"{named} answers, but not as a PyTorch store ({first_line(found)}): "
            "another program has this port, choose a free one"
        ) from found
    return found


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keeps the C++ side's stack dumps off the screen: its exception says the same in one line."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def meet(
    store: dist.Store, place: Place, possible: str, reason: str, deadline: float, limit_s: float
) -> tuple[str, str]:
    """All ranks tell each other who they are; returns the backend that all can use, and why."""
    me = socket.gethostname()
    if store.add(f"taken/{place.rank}", 1) > 1:
        raise UserError(
            f"RANK={place.rank} is taken by another process: give each a number of its own, "
            f"0 to {place.world_size - 1} (this one runs on {me})"
        )
    card = json.dumps(
        {"host": me, "world_size": place.world_size, "backend": possible, "why": reason}
    )

    def agree(rank: int, text: str) -> None:
        theirs = json.loads(text)
        if theirs["world_size"] != place.world_size:
            raise UserError(
                f"WORLD_SIZE={place.world_size} here ({me}), but {theirs['world_size']} for rank {rank} "
                f"on {theirs['host']}: set the same on every machine"
            )

    cards = exchange(store, "join", place.rank, place.world_size, card, deadline, limit_s, agree)
    for rank, text in enumerate(cards):
        theirs = json.loads(text)
        if theirs["backend"] != "nccl":
            return theirs["backend"], f"rank {rank} on {theirs['host']}: {theirs['why']}"
    return possible, reason


def exchange(
    store: dist.Store,
    what: str,
    rank: int,
    world_size: int,
    value: str,
    deadline: float,
    limit_s: float,
    check: Callable[[int, str], None] = lambda rank, text: None,
) -> list[str]:
    """Every rank's value, in rank order; `check(rank, value)` is called as each arrives.

    Over the store and not a collective: it works before the group stands, and names who is missing.
    """
    store.set(f"{what}/{rank}", value)
    found: dict[int, str] = {}
    pause_s = 0.005
    while len(found) < world_size:
        for other in range(world_size):
            if other not in found and store.check([f"{what}/{other}"]):
                found[other] = store.get(f"{what}/{other}").decode()
                check(other, found[other])
        if len(found) == world_size:
            break
        if time.monotonic() > deadline:
            missing = ", ".join(str(r) for r in range(world_size) if r not in found)
            raise UserError(
                f"rank(s) {missing} of {world_size} did not reach '{what.partition('/')[0]}' within "
                f"{limit_s:g} s: start them, look at their output, or lower WORLD_SIZE"
            )
        time.sleep(pause_s)
        pause_s = min(0.2, pause_s * 1.5)
    return [found[other] for other in range(world_size)]


def share(store: dist.Store, what: str, value: str | None, timeout_s: float) -> str:
    """The value that one rank gives (the others give None), on every rank."""
    if value is not None:
        store.set(what, value)
        return value
    deadline = time.monotonic() + timeout_s
    if not network.first_hit(lambda: store.check([what]), deadline):
        raise UserError(
            f"rank 0 did not give '{what.partition('/')[0]}' within {timeout_s:g} s: look at its output"
        )
    return store.get(what).decode()


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
