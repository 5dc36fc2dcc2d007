"""Ranks of `%ranks` on other machines: the notebook admits those that know its token, and starts ranks there.

Both sides prove to each other that they know the token (multiprocessing's HMAC challenge, bytes alone) before
either reads a message, since messages are pickled. A machine's process (join.py) then starts the ranks that
the notebook asks for, and passes on what they send and print:

    to the machine    ("start", places, work), ("to", (rank, message)), ("end", None)
    to the notebook   ("ranks", number), ("started", (0, None)), ("from", (rank, message)),
                      ("output", (rank, bytes)), ("ended", (rank, exit code))
"""

import os
import secrets
import socket
import struct
import time
from collections import defaultdict, deque
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from ddp_lib.distributed.addresses import Endpoint, endpoint_addresses, is_loopback, join_host, own_addresses
from ddp_lib.errors import TransientError, UserError
from ddp_lib.notebook.rank_pool import Rank
from ddp_lib.notebook.worker import Place

# How long a machine that connects may be silent before it has proved that it knows the token.
_PROOF_S = 5


class Machine:
    """Another machine, as the notebook's process sees it."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection, self.name, self.gone = connection, name, False
        self.starting = False  # until then, what comes is of the ranks before
        self.messages: dict[int, deque[Any]] = defaultdict(deque)
        self.exit_codes: dict[int, int] = {}
        self.files: dict[int, Any] = {}
        self.nproc = int(connection.recv()[1])

    def send(self, kind: str, value: Any) -> None:
        with suppress(OSError):  # `pump` notices
            self.connection.send((kind, value))

    def pump(self, timeout_s: float = 0.0) -> None:
        """Receives what the machine has sent, and waits for it up to `timeout_s` seconds."""
        try:
            while not self.gone and self.connection.poll(timeout_s):
                kind, (rank, value) = self.connection.recv()
                timeout_s = 0.0
                if kind == "started":
                    self.starting = False
                elif self.starting:
                    continue
                elif kind == "from":
                    self.messages[rank].append(value)
                elif kind == "output":
                    self.files[rank].write(value)
                    self.files[rank].flush()
                else:
                    self.exit_codes[rank] = value
        except (EOFError, OSError):
            self.gone = True


class _Pipe:
    """Stands for the pipe to a rank on another machine."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine, self._rank = machine, rank

    def poll(self, timeout_s: float = 0.0) -> bool:
        messages, deadline = self._machine.messages[self._rank], time.monotonic() + timeout_s
        self._machine.pump()
        while not messages and not self._machine.gone and (left := deadline - time.monotonic()) > 0:
            self._machine.pump(left)
        return bool(messages)

    def recv(self) -> Any:
        return self._machine.messages[self._rank].popleft()

    def send(self, message: Any) -> None:
        self._machine.send("to", (self._rank, message))

    def close(self) -> None:
        pass


class _Process:
    """Stands for the process of a rank on another machine."""

    pid = None  # of none here

    def __init__(self, machine: Machine, rank: int) -> None:
        self._machine, self._rank, self.sentinel = machine, rank, machine.connection

    @property
    def exitcode(self) -> int | None:
        return self._machine.exit_codes.get(self._rank)

    def is_alive(self) -> bool:
        self._machine.pump()
        return not self._machine.gone and self.exitcode is None

    def join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._machine.pump(left)


class RemoteRank(Rank):
    """A rank on another machine."""

    def __init__(self, place: Place, machine: Machine, path: Path) -> None:
        self._begin(place.rank, path)
        self.connection, self.process = _Pipe(machine, place.rank), _Process(machine, place.rank)
        machine.files[place.rank] = self.file

    def ends(self) -> set[Any]:
        return {self.process.sentinel}

    def started(self) -> bool:
        return True

    def start(self) -> None:
        """Its machine starts all of its ranks at once."""


def start_remote(machine: Machine, places: list[Place], work: bytes, folder: Path) -> list[Rank]:
    """Has the machine end its ranks and start new ones."""
    machine.starting = True
    machine.messages.clear()
    machine.exit_codes.clear()
    ranks: list[Rank] = [RemoteRank(place, machine, folder / f"rank{place.rank}.txt") for place in places]
    machine.send("start", (places, work))
    return ranks


def admit(endpoint: Endpoint, count: int, timeout_s: float) -> list[Machine]:
    """The first `count` machines that join at the endpoint with the token; prints the line to type there."""
    mine = own_addresses()
    here = [a for a in endpoint_addresses(endpoint, one_machine=False) if a in mine or is_loopback(a)]
    if not here:
        raise UserError(f"{endpoint} is no address of this machine: give one at which the others reach it")
    token, where = secrets.token_hex(16), join_host(endpoint.host, endpoint.port)
    machines: list[Machine] = []
    family = socket.AF_INET6 if ":" in here[0] else socket.AF_INET
    try:
        listener = socket.create_server((here[0], endpoint.port), family=family)
    except OSError as error:
        raise TransientError(
            f"{endpoint.port_name} cannot be opened on {here[0]} ({os.strerror(error.errno or 0)}): choose "
            "another port"
        ) from None
    with listener:
        print(f"on {count} other machine(s): ddp-launch join {where} --token {token}", flush=True)
        deadline = time.monotonic() + timeout_s
        listener.settimeout(0.2)
        while len(machines) < count:
            with suppress(TimeoutError):
                client, address = listener.accept()
                if machine := _prove(client, token, address[0]):
                    machines.append(machine)
                    print(f"{machine.name} has joined with {machine.nproc} rank(s)", flush=True)
            if time.monotonic() > deadline:
                raise TransientError(
                    f"{len(machines)} of {count} other machines joined within {timeout_s:g} s: type the line "
                    "there; --timeout-s sets how long %ranks waits"
                )
    return machines


def _prove(client: socket.socket, token: str, address: str) -> Machine | None:
    """The machine, if both sides know the token; else one line. Until then no byte is unpickled."""
    wait_at_most(client, _PROOF_S)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection = Connection(os.dup(client.fileno()))
    try:
        deliver_challenge(connection, token.encode())
        answer_challenge(connection, token.encode())
    except (AuthenticationError, AssertionError, EOFError, OSError):
        print(f"refused {address}: it does not know this notebook's token", flush=True)
        connection.close()
        client.close()
        return None
    wait_at_most(client, 0)
    client.close()
    return Machine(connection, address)


def wait_at_most(client: socket.socket, seconds: float) -> None:
    """For each read, also by others that hold the same connection; 0: without a timeout."""
    whole = int(seconds)
    limit = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
