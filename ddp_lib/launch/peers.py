"""What the launchers of one job tell each other at the store."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch

# How often a launcher looks whether another has left a note; how long the host of the store waits,
# before it leaves, for the others to have read its own.
_LOOK_S, _LINGER_S = 0.3, 1.5


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
