"""Whether machines can connect to each other on the ports that training uses, and how fast.

gloo and NCCL listen on ports that the system picks, on every machine. A probe does the same: it
listens, its address goes into the store, and the other machines try to connect.
"""

import json
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

# A working connection answers in milliseconds. If packets vanish, this allows for two repeats of the
# first packet.
CONNECT_S = 4.0
_CHUNK = 1 << 18
_MOST_BYTES = 1 << 34


class Probe:
    """Listens on `address`, on a port that the system picks, inside `with`.

    Answers two requests of one line: "ping" with the sender's address and the time; "load N" with the
    same, after N more bytes have come. It keeps nothing and reads nothing else.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._server.bind((address, 0))
            self._server.listen(256)
        except OSError:
            self._server.close()
            raise
        self.address, self.port = address, int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, name="probe", daemon=True).start()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, address = self._server.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(peer, address[0]), name="probe", daemon=True).start()


def _answer(peer: socket.socket, source: str) -> None:
    with peer:
        try:
            peer.settimeout(CONNECT_S)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = bytearray(_CHUNK)
            while words := _line(peer).split():
                left = min(int(words[1]), _MOST_BYTES) if words[0] == "load" else 0
                while left > 0:
                    got = peer.recv_into(buffer, min(left, _CHUNK))
                    if not got:
                        return
                    left -= got
                peer.sendall(json.dumps({"you": source, "time": time.time()}).encode() + b"\n")
        except (OSError, ValueError, IndexError):
            return


def _line(peer: socket.socket) -> str:
    """The next line, without reading past it; empty at the end. ValueError if the line is long."""
    text = bytearray()
    while not text.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            return ""
        text += byte
        if len(text) > 100:
            raise ValueError("not a probe's line")
    return text.decode("ascii", "replace")


@dataclass(frozen=True)
class Link:
    """The connection to another machine's probe; `trouble` is empty if it works.

    seen_as: this machine's address as the other sees it. clock_s: how far the other's clock is ahead.
    """

    trouble: str = ""
    seen_as: str = ""
    latency_s: float = 0.0
    clock_s: float = 0.0


def connect(address: str, port: int, pings: int = 1, timeout_s: float = CONNECT_S) -> Link:
    """Connects to a probe and pings it `pings` times; the fastest answer counts."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            best = Link(latency_s=float("inf"))
            for _ in range(pings):
                sent, began = time.time(), time.perf_counter()
                peer.sendall(b"ping\n")
                answer = json.loads(_all_of_line(peer))
                latency_s = time.perf_counter() - began
                if latency_s < best.latency_s:
                    ahead_s = answer["time"] - (sent + latency_s / 2)
                    best = Link("", answer["you"], latency_s, ahead_s)
            return best
    except ConnectionRefusedError:
        return Link("is refused")
    except TimeoutError:
        return Link("gets no answer")
    except (OSError, ValueError) as error:
        return Link(f"fails ({getattr(error, 'strerror', None) or error})")


def connect_all(probes: Iterable[tuple[str, int]], pings: int = 1) -> list[Link]:
    """`connect` to all at once, so that many closed ports cost no more time than a single one."""
    targets = list(probes)
    with ThreadPoolExecutor(max(1, min(64, len(targets)))) as pool:
        return list(pool.map(lambda target: connect(target[0], target[1], pings), targets))


def bandwidth(address: str, port: int, seconds: float, timeout_s: float) -> float:
    """Bytes per second to a probe, over about `seconds`; 0 if not measured within timeout_s."""
    deadline = time.monotonic() + timeout_s
    block, count, rate = bytes(_CHUNK), 1, 0.0
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                peer.settimeout(max(0.01, deadline - time.monotonic()))
                began = time.perf_counter()
                peer.sendall(b"load %d\n" % (count * _CHUNK))
                for _ in range(count):
                    peer.sendall(block)
                _all_of_line(peer)
                took_s = time.perf_counter() - began
                rate = count * _CHUNK / took_s
                if took_s > seconds / 2:
                    return rate
                # Send more until the start of the transfer no longer matters.
                count = max(2 * count, min(8 * count, int(count * seconds / took_s)))
    except OSError:
        return rate


def _all_of_line(peer: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        more = peer.recv(4096)
        if not more:
            raise OSError("the connection was closed")
        text += more
    return text
