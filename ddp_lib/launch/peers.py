"""What the launchers of a job tell each other over the store."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from ddp_lib.distributed.coordination import wait_for
from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch

# How often a launcher checks whether another has ended the job; how long the store's host waits for the
# others to read that before it leaves; how long the first launcher may take to announce itself.
_LOOK_S, _LINGER_S, _FIRST_S = 0.3, 1.5, 5.0


@dataclass
class Peers:
    """The launchers of a job, connected by the store on the master.

    hosts: whether the store is here. seen: line and status of another launcher's end, if that stopped this
    launcher.
    """

    store: dist.Store
    launch: Launch
    machine: str
    hosts: bool
    seen: tuple[str, int] | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _calling: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fixed(self) -> bool:
        """Whether a machine's failure ends the job on all; an elastic job goes on."""
        return self.launch.nodes[0] == self.launch.nodes[1] > 1

    def announce(self) -> None:
        """Announces this machine. UserError if its flags contradict those of earlier machines."""
        me = {"machine": self.machine, "nnodes": self.launch.nodes_text}
        number = self.store.add("agents", 1)
        self.store.set(f"agent/{number}", json.dumps(me))
        trouble = ""
        text = wait_for(self.store, "agent/1", time.monotonic() + _FIRST_S)
        first = me if text is None else json.loads(text)
        if first["nnodes"] != me["nnodes"]:
            trouble = (
                f"--nnodes is {me['nnodes']} on {self.machine}, but {first['nnodes']} on "
                f"{first['machine']}: give the same on every machine"
            )
        elif (mine := self.launch.node_rank) is not None:
            holder = self.store.compare_set(f"number/{mine}", "", self.machine).decode()
            if holder != self.machine:
                trouble = (
                    f"number {mine} is taken: it was given to {holder} and to {self.machine}; "
                    "give each machine a --node-rank of its own"
                )
        if trouble:
            if number <= int(first["nnodes"].rpartition(":")[2]):  # else it goes on without us
                self.publish_end(trouble, 2)
            raise UserError(trouble)

    def arrived(self) -> list[str]:
        """The machines that have come so far, in order, each once."""
        with suppress(RuntimeError):
            keys = [f"agent/{n + 1}" for n in range(self.store.add("agents", 0))]
            machines = [json.loads(self.store.get(key)) for key in keys if self.store.check([key])]
            return list(dict.fromkeys(machine["machine"] for machine in machines))
        return []

    def publish_end(self, line: str, status: int) -> tuple[str, int]:
        """Ends the job on every machine; returns the line and status that were published first."""
        if self.fixed:
            with suppress(RuntimeError):
                self.store.compare_set("end", "", f"{status} {line}")
        return self.read_end() or (line, status)

    def read_end(self) -> tuple[str, int] | None:
        """The line and exit status that a launcher has published, if any."""
        text = ""
        with suppress(RuntimeError):  # the host is gone; torch's own agent says so
            if self.store.check(["end"]):
                text = self.store.get("end").decode()
                self.store.add("read", 1)
        status, _, line = text.partition(" ")
        return (line, int(status)) if text else None

    def wait_until_read(self) -> None:
        """Makes the store's host wait, at most _LINGER_S, until all have read the end."""
        deadline = time.monotonic() + _LINGER_S
        with suppress(RuntimeError):
            while self.hosts and self.store.check(["end"]) and time.monotonic() < deadline:
                if self.store.add("read", 0) >= len(self.arrived()):
                    return
                time.sleep(0.1)

    @contextmanager
    def watching(self, call: Callable[[str, int], None]) -> Iterator[None]:
        """Inside, a thread calls `call` with line and status if another launcher ends the job."""

        def look() -> None:
            while not self._done.wait(_LOOK_S):
                end = self.read_end()
                with self._calling:
                    if end and not self._done.is_set():
                        self.seen = end
                        call(*end)
                        return

        if self.fixed:
            threading.Thread(target=look, name="peers", daemon=True).start()
        try:
            yield
        finally:
            self.stop_watching()

    def stop_watching(self) -> None:
        """Before this machine's own end, which the thread would see. Waits for a call that has begun."""
        with self._calling:
            self._done.set()
