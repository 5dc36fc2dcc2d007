"""`ddp-launch join`: starts ranks on this machine for a notebook elsewhere, whose side is remote.py."""

import os
import socket
import tempfile
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

from ddp_lib.distributed.addresses import Endpoint, join_host
from ddp_lib.errors import TransientError, UserError
from ddp_lib.notebook.rank_pool import Rank, end_ranks
from ddp_lib.notebook.remote import wait_at_most
from ddp_lib.notebook.run_ranks import FOR_CELLS, PRELOAD
from ddp_lib.processes.forkserver import no_main_module, start_server

# How much of a rank's output is passed on at a time, in bytes.
_CHUNK = 1 << 20


def connect(endpoint: Endpoint, token: str, timeout_s: float) -> Connection:
    """To the notebook, once both sides have proved that they know the token. OSError, EOFError,
    AssertionError or AuthenticationError if that fails, or takes longer."""
    with socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s) as client:
        client.settimeout(None)
        wait_at_most(client, timeout_s)
        connection = Connection(os.dup(client.fileno()))
        answer_challenge(connection, token.encode())
        deliver_challenge(connection, token.encode())
        wait_at_most(client, 0)
    return connection


def join_notebook(endpoint: Endpoint, token: str, nproc: int, timeout_s: float = 30.0) -> None:
    """Serves the notebook at the endpoint, on another machine than its own, until it ends the ranks.

    timeout_s: how long the notebook may take to answer.
    """
    where, refused = join_host(endpoint.host, endpoint.port), "it does not know the token"
    try:
        connection = connect(endpoint, token, timeout_s)
        connection.send(("ranks", nproc))
    except AuthenticationError:
        raise UserError(
            f"{where} refuses this token: copy the line that %ranks has printed; each %ranks makes a new one"
        ) from None
    except ConnectionRefusedError:
        raise TransientError(
            f"nobody listens on {where}: run %ranks --nnodes 2 --rdzv-endpoint {where} in the notebook first"
        ) from None
    except (AssertionError, EOFError, OSError) as error:
        raise TransientError(
            f"no notebook answers at {where} ({error or refused}): check the address"
        ) from None
    print(f"ddp-launch: joined the notebook at {where} with {nproc} rank(s)", flush=True)
    start_server([*PRELOAD, *FOR_CELLS])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        _Server(connection, Path(folder)).serve()
    print("ddp-launch: the notebook has ended the ranks", flush=True)


class _Server:
    """The ranks of this machine, in the service of a notebook elsewhere."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self._connection, self._folder = connection, folder
        self._ranks: dict[int, Rank] = {}
        self._sent: dict[int, int] = {}

    def serve(self) -> None:
        try:
            while True:
                wait({self._connection}.union(*(rank.ends() for rank in self._ranks.values())), timeout=0.05)
                while self._connection.poll():
                    self._obey(*self._connection.recv())
                for number, rank in list(self._ranks.items()):
                    self._pass_on(number, rank)
        except (EOFError, OSError):
            pass  # the notebook, or its machine, is gone
        finally:
            end_ranks(list(self._ranks.values()))

    def _obey(self, kind: str, value: Any) -> None:
        if kind == "to":
            number, message = value
            if number in self._ranks:
                if isinstance(message, tuple) and message[0] == "cell":
                    os.ftruncate(self._ranks[number].file.fileno(), 0)
                    self._sent[number] = 0
                self._ranks[number].send(message)
            return
        end_ranks(list(self._ranks.values()))
        for rank in self._ranks.values():
            rank.file.close()
        self._ranks.clear()
        if kind == "start":
            places, work = value
            for path in self._folder.iterdir():
                path.unlink()
            for place in places:
                path = self._folder / f"rank{place.rank}.txt"
                self._ranks[place.rank] = Rank(place, work, {}, path)
            self._sent = dict.fromkeys(self._ranks, 0)
            with no_main_module():
                for rank in self._ranks.values():
                    rank.start()
            self._connection.send(("started", (0, None)))

    def _pass_on(self, number: int, rank: Rank) -> None:
        ended = not rank.process.is_alive()  # asked first: it may have sent its last message
        messages = []
        with suppress(EOFError, OSError):
            while rank.connection.poll():
                messages.append(rank.connection.recv())
        # What a rank has printed before it sent a message comes before that message.
        while chunk := os.pread(rank.file.fileno(), _CHUNK, self._sent[number]):
            self._sent[number] += len(chunk)
            self._connection.send(("output", (number, chunk)))
        for message in messages:
            self._connection.send(("from", (number, message)))
        if ended:
            self._connection.send(("ended", (number, rank.process.exitcode)))
            del self._ranks[number]
