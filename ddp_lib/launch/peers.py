"""What the launchers of a job tell each other over the store."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import torch.distributed as dist

from ddp_lib.distributed.addresses import is_loopback, join_host, wait_until_true
from ddp_lib.distributed.store_client import wait_for
from ddp_lib.errors import MAY_PASS, WILL_FAIL_AGAIN, TransientError, UserError
from ddp_lib.launch.options import Launch
from ddp_lib.processes.identity import identify
from ddp_lib.processes.signals import stop_signals

# How often a launcher checks whether another has ended the job; how long the store's host waits for the
# others to read that before it leaves; how long the first launcher may take to announce itself; how long the
# thread that checks may take to end.
_LOOK_S, _LINGER_S, _FIRST_S, _END_S = 0.3, 5.0, 5.0, 5.0
# How much longer than --timeout-s the store may be silent. After how long without a sign of life another
# launcher counts as ended: on a busy machine the first may come late.
_SILENCE_S, _ENDED_S = 5.0, 10.0


@dataclass
class Peers:
    """The launchers of a job, connected by the store on the master.

    hosts: whether the store is here. seen: line and status of another launcher's end, if that stopped this
    launcher. published: those of the job's end, once this launcher has published one.
    """

    store: dist.Store
    launch: Launch
    address: str
    hosts: bool
    seen: tuple[str, int] | None = None
    published: tuple[str, int] | None = None
    _id: str = field(default_factory=token_hex)
    _heard_s: float = 0.0  # monotonic time of the store's last answer
    _done: threading.Event = field(default_factory=threading.Event)
    _calling: threading.Lock = field(default_factory=threading.Lock)

    @property
    def machine(self) -> str:
        return f"{socket.gethostname()} ({self.address})"

    @property
    def fixed(self) -> bool:
        """Whether a machine's failure ends the job on all; an elastic job goes on."""
        return self.launch.nodes[0] == self.launch.nodes[1] > 1

    def announce(self) -> None:
        """Announces this machine. UserError if its flags contradict those of earlier machines, if it is in
        the job already, or if the job has all its machines."""
        most, mine = self.launch.nodes[1], self.launch.node_rank
        me: dict[str, Any] = {"machine": self.machine, "id": self._id, "process": identify(os.getpid())}
        me |= {"nnodes": self.launch.nodes_text, "check": self.launch.check, "since": time.strftime("%T")}
        me["number"] = self.store.add("agents", 1)
        self.store.set(f"agent/{me['number']}", json.dumps(me))
        first = json.loads(wait_for(self.store, "agent/1", time.monotonic() + _FIRST_S) or json.dumps(me))
        holder, trouble = self._take_place(me), ""
        number, late = me["number"], me["number"] > most
        if first["nnodes"] != me["nnodes"]:
            trouble = (
                f"--nnodes is {me['nnodes']} on {self.machine}, but {first['nnodes']} on "
                f"{first['machine']}: give the same on every machine"
            )
        elif first["check"] != me["check"]:
            with_it = first["machine"] if me["check"] else self.machine
            trouble = f"--no-check is given on {with_it} only: give the same flags on every machine"
        elif holder:
            job = f"the job {self.launch.job!r}"
            since = f"by process {holder['process'][1]}, since {holder['since']}"
            if holder["machine"] == self.machine:
                self._withdraw(number)
                raise UserError(
                    f"{self.machine} is in {job} already ({since}): end that first; to start several on one "
                    "machine, give each a --node-rank of its own"
                )
            if late:
                self._withdraw(number)
                raise TransientError(f"{job} has number {mine} already: {holder['machine']}, {since}")
            trouble = (
                f"number {mine} is taken: it was given to {holder['machine']} and to {self.machine}; "
                "give each machine a --node-rank of its own"
            )
        elif late and len(alive := self._alive(self._others())) >= most:
            self._withdraw(number)
            raise TransientError(
                f"the job {self.launch.job!r} at {self.launch.endpoint} has all its machines ({most}): "
                f"{', '.join(other['machine'] for other in alive)}, since {alive[0]['since']}; for another "
                "job, choose another port on every machine"
            )
        if trouble:
            if number <= int(str(first["nnodes"]).rpartition(":")[2]):  # else it goes on without us
                self.publish_end(trouble, 2)
            else:
                self._withdraw(number)
            raise UserError(trouble)

    def _take_place(self, me: dict[str, Any]) -> dict[str, Any] | None:
        """Takes this launcher's place in the job: its number, or its machine. Returns who has it, unless that
        launcher has ended: then `me` goes on under its number."""
        endpoint, number = self.launch.endpoint, self.launch.node_rank
        if number is None and endpoint is not None and is_loopback(endpoint.host):
            return None  # a rehearsal: all machines are this one
        key = f"place/{me['machine'] if number is None else number}"
        holder: dict[str, Any] = json.loads(self.store.compare_set(key, "", json.dumps(me)))
        if holder == me:
            return None
        if self._runs(holder):
            return holder
        self._withdraw(me["number"])
        me["number"] = holder["number"]
        for name in (key, f"agent/{me['number']}"):
            self.store.set(name, json.dumps(me))
        return None

    def _runs(self, launcher: dict[str, Any]) -> bool:
        """Whether that launcher has not ended; of one on this machine the system knows it."""
        namespace, pid, _ = process = launcher["process"]
        if launcher["machine"] == self.machine and namespace == identify(os.getpid())[0]:
            return identify(pid) == process
        return bool(self._alive([launcher]))

    def _withdraw(self, number: int) -> None:
        """Nobody takes part under this number."""
        self.store.delete_key(f"agent/{number}")

    def _announced(self) -> list[dict[str, Any]]:
        keys = [f"agent/{n + 1}" for n in range(self.store.add("agents", 0))]
        return [json.loads(self.store.get(key)) for key in keys if self.store.check([key])]

    def _others(self) -> list[dict[str, Any]]:
        """All other launchers that have announced themselves, in order."""
        return [other for other in self._announced() if other["id"] != self._id]

    def _alive(self, launchers: list[dict[str, Any]], timeout_s: float = _ENDED_S) -> list[dict[str, Any]]:
        """Those of the launchers that give a sign of life within timeout_s."""
        keys = [f"alive/{launcher['id']}" for launcher in launchers]
        before = [self.store.add(key, 0) for key in keys]
        alive = [False] * len(keys)

        def look() -> bool:
            for n, key in enumerate(keys):
                alive[n] = alive[n] or self.store.add(key, 0) != before[n]
            return all(alive)

        wait_until_true(look, time.monotonic() + timeout_s, 0.1)
        return [launcher for launcher, lives in zip(launchers, alive, strict=True) if lives]

    def arrived(self) -> list[str]:
        """The machines that have come so far, in order, each once."""
        with suppress(RuntimeError):
            return list(dict.fromkeys(machine["machine"] for machine in self._announced()))
        return []

    def who_came(self, timeout_s: float) -> str:
        """Says that machines are missing."""
        endpoint, came = self.launch.endpoint, self.arrived()
        where = "this machine" if endpoint is None else join_host(endpoint.host, endpoint.port)
        return (
            f"the machines did not meet at {where} within {timeout_s:g} s: of {self.launch.nodes_text} came "
            f"{len(came)}, {', '.join(came)}; start the same command on every machine; check "
            f"--rdzv-endpoint, --nnodes and --join-timeout-s{self.launch.hint}"
        )

    def publish_end(self, line: str, status: int) -> tuple[str, int]:
        """Ends the job on every machine; returns the line that was published first, and this one's status."""
        line = line.encode(errors="backslashreplace").decode()  # of paths that are not UTF-8
        if self.fixed:
            with suppress(RuntimeError):
                mine, self.published = f"{status} {line}", (line, status)
                self.store.set(f"read/{self._id}", "")
                if self.store.compare_set("end", "", mine) != mine.encode():
                    self.published = self.read_end() or self.published
        return self.published or (line, status)

    def publish_signal(self, status: int) -> None:
        """Ends the job on every machine: a signal has ended this launcher. status: 128 + its number."""
        self.stop_watching()
        if not self.fixed:
            with suppress(RuntimeError):  # before the ranks end, and with them those of the other machines
                self.store.add("goodbyes", 1)
        elif not self.seen:
            name = signal.Signals(status - 128).name
            self.publish_end(f"stopped by {name} on {socket.gethostname()}", status)

    def read_end(self) -> tuple[str, int] | None:
        """The line that a launcher has published, if any, and the exit status of those that follow it: its
        own if it will come again at the next start, or is a stop signal's; else 75: the cause is not here."""
        text = ""
        with suppress(RuntimeError):  # the host is gone; torch's own agent says so
            if self.store.check(["end"]):
                text = self.store.get("end").decode()
                self.store.set(f"read/{self._id}", "")
        if not text:
            return None
        status, _, line = text.partition(" ")
        same = (WILL_FAIL_AGAIN, *(128 + number for number in stop_signals()))
        return line, int(status) if int(status) in same else MAY_PASS

    def wait_until_read(self, timeout_s: float = _LINGER_S) -> None:
        """Makes the store's host wait, at most `timeout_s` seconds, until all have read the end."""
        deadline = time.monotonic() + timeout_s
        with suppress(RuntimeError):
            while self.hosts and self.store.check(["end"]) and time.monotonic() < deadline:
                if all(self.store.check([f"read/{other['id']}"]) for other in self._others()):
                    return
                time.sleep(0.1)

    def count_goodbyes(self) -> int:
        """How many machines have left an elastic job, which goes on."""
        with suppress(RuntimeError):
            return self.store.add("goodbyes", 0)
        return 0

    def ask_for_absent(self) -> None:
        """This machine's ranks timed out: asks the other launchers which of theirs did not come."""
        with suppress(RuntimeError):
            self.store.set("asks", self._id)

    @contextmanager
    def watching(
        self,
        call: Callable[[str, int], None],
        look_for_absent: Callable[[], None],
        lost: Callable[[float], None],
    ) -> Iterator[None]:
        """Inside, a thread calls `call` with line and status if another launcher ends the job, and
        `look_for_absent` if another launcher asks for it. Another thread calls `lost` with the seconds of
        silence if the store does not answer: the first is then blocked inside torch, and perhaps all of this
        process."""
        left = threading.Event()

        def look() -> None:
            asked = called = False
            while not left.wait(_LOOK_S):
                with suppress(RuntimeError):
                    self.store.add(f"alive/{self._id}", 1)
                    self._heard_s = time.monotonic()
                    if not asked and self.store.check(["asks"]):
                        asked = True
                        if self.store.get("asks").decode() != self._id:
                            look_for_absent()
                end = None if called else self.read_end()
                with self._calling:
                    if end and not self._done.is_set():
                        self.seen, called = end, True
                        call(*end)

        def watch() -> None:
            while not left.wait(_LOOK_S):
                silence_s = time.monotonic() - self._heard_s
                if silence_s > self.launch.timeout_s + _SILENCE_S:
                    lost(silence_s)
                    return

        self._heard_s = time.monotonic()
        threads = [threading.Thread(target=f, name="peers", daemon=True) for f in (look, watch)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop_watching()
            left.set()
            for thread in threads:  # Python aborts if a thread is inside torch's C++ when it ends
                thread.join(_END_S)

    def silent_since(self, seconds: float) -> list[str]:
        """Watches the other launchers so long; those that give no sign of life meanwhile."""
        silent: list[str] = []
        with suppress(RuntimeError):
            alive = self._alive(others := self._others(), seconds)
            silent = [other["machine"] for other in others if other not in alive]
        return silent

    def share_master(self, host: str | None, timeout_s: float) -> str | None:
        """MASTER_ADDR for the ranks of all machines, which the store's host gives."""
        if host is not None:
            self.store.set("master", host)
            return host
        return wait_for(self.store, "master", time.monotonic() + timeout_s)

    def stop_watching(self) -> None:
        """Before this machine's own end, which the thread would see. Waits for a call that has begun."""
        with self._calling:
            self._done.set()
