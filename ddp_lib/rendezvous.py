"""Where the launchers of all machines meet: torch's c10d rendezvous, on a store that is opened here.

torch opens that store on all addresses, guesses by the host name which machine hosts it, and lets the
order of addresses decide the ranks. Here the host is who has the endpoint's address, the store listens
on that address alone, and the host's ranks come first: rank 0 is on the master.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from ddp_lib.errors import UserError
from ddp_lib.master import PortTaken, wait_for_name
from ddp_lib.network import Endpoint, is_here, is_loopback, meanings, own_address, resolve
from ddp_lib.options import Launch
from ddp_lib.store import host_store, reach_store

# How often a launcher looks whether another has left a note; how long the host of the store waits,
# before it leaves, for the others to have read its own.
_LOOK_S, _LINGER_S = 0.3, 1.5
# How long an elastic job that has its least number of machines waits for more: those that come later
# are taken in as well.
_LAST_CALL_S = 10


@dataclass
class Rendezvous:
    """master: how this machine's ranks reach the master. hosts: whether the store is here."""

    handler: DynamicRendezvousHandler
    master: str
    hosts: bool
    notes: "Notes"


def open_rendezvous(launch: Launch, join_timeout_s: float) -> Rendezvous:
    """Hosts the store or reaches it, and calls the roll; UserError where that fails."""
    several = launch.endpoint is not None
    endpoint = launch.endpoint or Endpoint("127.0.0.1", 0, "this machine")
    if several:
        wait_for_name(endpoint, join_timeout_s)
    here, hosts = is_here(endpoint), launch.node_rank in (None, 0)
    if launch.node_rank == 0 and not here:
        raise UserError(
            f"this machine got number 0, which hosts the store, but {endpoint} is no address of it "
            f"({own_address(endpoint, False) or 'no route there'}): give 0 to the machine that has it"
        )
    if here and hosts:
        try:
            store = host_store(endpoint, join_timeout_s, not several)
        except PortTaken:
            if launch.node_rank == 0:
                raise
            hosts = False  # perhaps another launcher of this machine hosts it
    if not (here and hosts):
        hosts = False
        store = reach_store(endpoint, join_timeout_s, not several)
    address = own_address(endpoint, not several)
    first = launch.node_rank if launch.node_rank is not None else int(not hosts)
    number = f"{first:06d} {address}"  # torch sorts the machines by it
    handler = DynamicRendezvousHandler.from_backend(
        launch.job,
        store,
        C10dRendezvousBackend(store, launch.job),
        *launch.nodes,
        local_addr=number,
        timeout=RendezvousTimeout(
            timedelta(seconds=join_timeout_s), timedelta(seconds=_LAST_CALL_S)
        ),
    )
    notes = Notes(dist.PrefixStore(f"ddp_lib/notes/{launch.job}", store), launch, address)
    if several:
        notes.call_the_roll()
    return Rendezvous(handler, _master(endpoint, address, here), hosts, notes)


def _master(endpoint: Endpoint, address: str, here: bool) -> str:
    """What MASTER_ADDR is to be for the ranks of this machine."""
    found = meanings(endpoint, False)
    outward = [one for one in found if not is_loopback(one)]
    guessed = found != resolve(endpoint.host, endpoint.port)
    if here and guessed and len(outward) == 1:
        return address
    return endpoint.host


@dataclass
class Notes:
    """What the launchers of one job leave for each other at the store."""

    store: dist.Store
    launch: Launch
    address: str
    heard: "tuple[str, int] | None" = None
    _done: threading.Event = field(default_factory=threading.Event)
    _calling: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fixed(self) -> bool:
        """Whether one machine's failure is everybody's; an elastic job goes on."""
        return self.launch.nodes[0] == self.launch.nodes[1] > 1

    def call_the_roll(self) -> None:
        """Tells that this machine is here. UserError where it was started otherwise than those before."""
        me: dict[str, Any] = {
            "machine": f"{socket.gethostname()} ({self.address})",
            "nnodes": self.launch.nodes_text,
            "node_rank": self.launch.node_rank,
        }
        number = self.store.add("agents", 1)
        self.store.set(f"agent/{number}", json.dumps(me))
        for other in self.roll():
            trouble = ""
            if other["nnodes"] != me["nnodes"]:
                trouble = (
                    f"--nnodes is {me['nnodes']} on {me['machine']}, but {other['nnodes']} on "
                    f"{other['machine']}: give the same on every machine"
                )
            elif other["node_rank"] == me["node_rank"] is not None and (
                other["machine"] != me["machine"]
            ):
                trouble = (
                    f"number {me['node_rank']} is taken: it was given to {other['machine']} and to "
                    f"{me['machine']}; give each machine a --node-rank of its own"
                )
            if trouble:
                if number <= int(other["nnodes"].rpartition(":")[2]):  # else they do without
                    self.leave(trouble, 2)
                raise UserError(trouble)

    def roll(self) -> list[dict[str, Any]]:
        """Who has come so far, in order, each machine once."""
        try:
            keys = [f"agent/{n + 1}" for n in range(self.store.add("agents", 0))]
            cards = [json.loads(self.store.get(key)) for key in keys if self.store.check([key])]
        except RuntimeError:
            return []
        return list({card["machine"]: card for card in cards}.values())

    def leave(self, line: str, status: int) -> tuple[str, int]:
        """Leaves a note that ends the job on every machine; returns the one that stands, the first."""
        if self.fixed:
            with suppress(RuntimeError):
                self.store.compare_set("note", "", f"{status} {line}")
        return self.read() or (line, status)

    def read(self) -> tuple[str, int] | None:
        """The note's line and exit status, if there is one."""
        try:
            text = self.store.get("note").decode() if self.store.check(["note"]) else ""
        except RuntimeError:
            return None  # the host is gone; torch's own agent says so
        if not text:
            return None
        with suppress(RuntimeError):
            self.store.add("read", 1)
        status, _, line = text.partition(" ")
        return line, int(status)

    def wait_until_read(self) -> None:
        """Before the host of the store leaves: all have read the note, or had the time."""
        deadline = time.monotonic() + _LINGER_S
        with suppress(RuntimeError):
            while self.store.check(["note"]) and time.monotonic() < deadline:
                if self.store.add("read", 0) >= len(self.roll()):
                    return
                time.sleep(0.1)

    def watch(self, call: Callable[[str, int], None]) -> None:
        """From a thread: `call` with line and status of the note of another launcher, once there is one."""

        def look() -> None:
            while not self._done.wait(_LOOK_S):
                note = self.read()
                with self._calling:
                    if note and not self._done.is_set():
                        self.heard = note
                        call(*note)
                        return

        if self.fixed:
            threading.Thread(target=look, name="notes", daemon=True).start()

    def stop_watching(self) -> None:
        """No call begins after this, and one that has begun is over."""
        with self._calling:
            self._done.set()
