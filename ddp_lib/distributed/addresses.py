"""Addresses, ports and interfaces: what must be right before ranks can meet.

torch resolves the machine's own name. That is often wrong: Debian's installer makes it 127.0.1.1, and in
containers it may not resolve. The address on the route to the master works.
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from ddp_lib.errors import UserError

# Documentation addresses (RFC 5737, RFC 3849): used to find the default route, never sent to.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")


@dataclass(frozen=True)
class Endpoint:
    """Where the machines meet; `flag` named it, or else MASTER_ADDR and MASTER_PORT did."""

    host: str
    port: int
    flag: str = ""

    def __str__(self) -> str:
        if self.flag:
            return f"{self.flag} {join_host(self.host, self.port)}"
        return f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"

    @property
    def host_name(self) -> str:
        return f"{self.flag}'s host {self.host!r}" if self.flag else f"MASTER_ADDR={self.host!r}"

    @property
    def port_name(self) -> str:
        return f"{self.flag}'s port {self.port}" if self.flag else f"MASTER_PORT={self.port}"


def join_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_number(name: str, text: str) -> int:
    """The TCP port in `text`; `name` is the variable or flag that held it."""
    port = 0
    with suppress(ValueError):
        port = int(text)
    if not 1 <= port <= 65535:
        raise UserError(f"{name}={text!r} is not a TCP port: give a number from 1 to 65535, such as 29500")
    return port


def resolve(host: str, port: int) -> list[str]:
    """Addresses of `host`, best first; empty if the name does not resolve (yet)."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return []
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def own_addresses() -> dict[str, str]:
    """Address -> interface name, for every IPv4 and IPv6 address of this machine."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def own_address_towards(address: str, port: int) -> str:
    """This machine's address on the route to `address`; sends no packet. OSError if there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def outward_addresses() -> list[str]:
    """This machine's addresses at which others may reach it, the default route's first."""
    link_local = ("fe80:", "169.254.")
    addresses = [a for a in own_addresses() if not is_loopback(a) and not a.startswith(link_local)]
    first = []
    for far in _ELSEWHERE:
        with suppress(OSError):
            first.append(own_address_towards(far, 9))
    return sorted(addresses, key=lambda address: (address not in first, ":" in address))


def endpoint_addresses(endpoint: Endpoint, one_machine: bool) -> list[str]:
    """The addresses at which to meet there, best first; empty if the name does not resolve (yet).

    A name that resolves to loopback here is this machine's own (a hosts file with 127.0.1.1): several
    machines meet at its outward address. 127.0.0.1 and localhost are taken literally.
    """
    addresses = resolve(endpoint.host, endpoint.port)
    if not addresses or one_machine or endpoint.host == "localhost" or is_loopback(endpoint.host):
        return addresses
    outward = [address for address in addresses if not is_loopback(address)]
    return outward or [*outward_addresses(), *addresses]


def is_here(endpoint: Endpoint) -> bool:
    """Whether the endpoint's host is this machine."""
    mine = own_addresses()
    return any(a in mine or is_loopback(a) for a in resolve(endpoint.host, endpoint.port))


def own_address(endpoint: Endpoint, one_machine: bool) -> str:
    """This machine's address as seen by the others at `endpoint`; empty if there is none."""
    mine = own_addresses()
    addresses = endpoint_addresses(endpoint, one_machine)
    for address in addresses:
        if address in mine or is_loopback(address):
            return address
    for address in addresses:
        with suppress(OSError):
            return own_address_towards(address, endpoint.port)
    return ""


def name_interface(
    endpoint: Endpoint, one_machine: bool, environ: MutableMapping[str, str] = os.environ
) -> str | None:
    """Tells gloo and NCCL which interface to use, unless the user did; returns its name."""
    name = own_addresses().get(own_address(endpoint, one_machine))
    if name:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name != "lo":  # NCCL refuses lo, and needs no interface on one machine
            environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return name


def wait_until_true(check: Callable[[], bool], deadline: float, pause_s: float = 0.05) -> bool:
    """Whether `check` became true before the monotonic time `deadline`."""
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
