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

# A working connection answers in milliseconds. If packets vanish, this allows for two repeats of the first.
CONNECT_S = 4.0
_CHUNK = 1 << 18
_MOST_BYTES = 1 << 34
# Bytes that go both ways in one piece. If the MTU is too large somewhere on the way, they do not arrive.
LARGE = 1 << 16
# Up to so many machines each connects to all others: all at once, which takes as long as for a single one.
_AT_ONCE = 64
LARGE_LOST = f"passes small packets, but not {LARGE >> 10} KiB"


class Probe:
    """Listens on `address`, on a port that the system picks, until it is closed.

    Answers three requests of one line: "ping" with the sender's address and the time; "load N" with the same,
    after N more bytes have come; "echo N" with these, and as many bytes. It keeps nothing and reads nothing
    else.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=256)
        self.address, self.port = address, int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, name="probe", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                peer, address = self._server.accept()
                threading.Thread(target=_answer, args=(peer, address[0]), name="probe", daemon=True).start()


def _answer(peer: socket.socket, source: str) -> None:
    with suppress(OSError, ValueError, IndexError), peer, peer.makefile("rb") as file:
        peer.settimeout(CONNECT_S)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(_CHUNK))
        while (line := file.readline(100)).endswith(b"\n"):  # else the end, or not a probe's line
            words = line.split()
            count = min(int(words[1]), _MOST_BYTES) if words[0] in (b"load", b"echo") else 0
            left = count
            while left > 0:
                got = file.readinto(buffer[:left])
                if not got:
                    return
                left -= got
            if words[0] == b"echo":
                peer.sendall(bytes(min(count, LARGE)))
            peer.sendall(json.dumps({"you": source, "time": time.time()}).encode() + b"\n")


@dataclass(frozen=True)
class Link:
    """The connection to another machine's probe; `trouble` is empty if it works.

    seen_as: this machine's address as the other sees it. clock_s: how far the other's clock is ahead.
    """

    trouble: str = ""
    seen_as: str = ""
    latency_s: float = 0.0
    clock_s: float = 0.0


def connect(address: str, port: int, pings: int = 1) -> Link:
    """Connects to a probe, pings it `pings` times, of which the fastest answer counts, and sends it a large
    piece, which it sends back."""
    links = []
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(pings):
                sent, began = time.time(), time.perf_counter()
                peer.sendall(b"ping\n")
                answer = json.loads(_read_line(peer))
                latency_s = time.perf_counter() - began
                links.append(Link("", answer["you"], latency_s, answer["time"] - (sent + latency_s / 2)))
            peer.sendall(b"echo %d\n" % LARGE + bytes(LARGE))
            with peer.makefile("rb") as file:
                if len(file.read(LARGE)) < LARGE or not file.readline().endswith(b"\n"):
                    raise OSError("the connection was closed")
        return min(links, key=lambda link: link.latency_s)
    except ConnectionRefusedError:
        return Link("is refused")
    except TimeoutError:
        return Link(LARGE_LOST if links else "gets no answer")
    except (OSError, ValueError) as error:
        return Link(f"fails ({getattr(error, 'strerror', None) or error})")


def to_try(machines: int, number: int) -> list[int]:
    """To which of so many machines, counted from 0, number `number` connects.

    To all others, or, of more than 64 machines, to those 1, 2, 4, 8 ... places further. Closed ports or a
    wrong address, which concern a machine as a whole, are found all the same: each is tried by as many others
    as it tries. A path between two of many machines that alone is closed may be missed.
    """
    if machines <= _AT_ONCE:
        return [other for other in range(machines) if other != number]
    return [(number + 2**bit) % machines for bit in range((machines - 1).bit_length())]


def connect_all(probes: Iterable[tuple[str, int]], pings: int = 1) -> list[Link]:
    """`connect` to all at once, so that many closed ports cost no more time than a single one."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda probe: connect(probe[0], probe[1], pings), probes))


def bandwidth(address: str, port: int, seconds: float, timeout_s: float) -> float:
    """Bytes per second to a probe, over about `seconds`; 0 if not measured within timeout_s."""
    deadline = time.monotonic() + timeout_s
    block, count, took_s, rate = bytes(_CHUNK), 1, 0.0, 0.0
    with suppress(OSError), socket.create_connection((address, port), timeout=timeout_s) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while took_s <= seconds / 2:
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            began = time.perf_counter()
            peer.sendall(b"load %d\n" % (count * _CHUNK))
            for _ in range(count):
                peer.sendall(block)
            _read_line(peer)
            took_s = time.perf_counter() - began
            rate = count * _CHUNK / took_s
            # Send more until the start of the transfer no longer matters.
            count = max(2 * count, min(8 * count, int(count * seconds / took_s)))
    return rate


def _read_line(peer: socket.socket) -> bytes:
    with peer.makefile("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        raise OSError("the connection was closed")
    return line
