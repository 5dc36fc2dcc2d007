"""Ports for programs of tests."""

import itertools
import os
import socket

# Below the ports that the system gives to outgoing connections (from 32768 on Linux): between this
# look and the program's own bind no connection of another test takes the port.
FIRST, COUNT = 10_000, 20_000
_next = itertools.count(os.getpid() * 101)  # other test processes look elsewhere


def free_port() -> int:
    """A port at which nobody listens on this machine."""
    for number in _next:
        port = FIRST + number % COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise AssertionError
