"""Addresses, ports and interfaces: what must be right before ranks can meet."""

import socket
import time
from collections.abc import Callable

import psutil

from ddp_lib.errors import UserError

# Between two attempts to reach a master that is not there yet.
_RETRY_S = 0.2


def port_number(name: str, text: str) -> int:
    """The TCP port in `text`; `name` is the variable or flag that held it."""
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise UserError(
            f"{name}={text!r} is not a TCP port: give a number from 1 to 65535, such as 29500"
        )
    return port


def resolve(host: str, port: int) -> list[str]:
    """Addresses of `host`, best first; empty where the name does not resolve (yet)."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return []
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def own_addresses() -> dict[str, str]:
    """Address -> interface name, for every IPv4 and IPv6 address of this machine."""
    wanted = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in wanted
    }


def own_address_towards(address: str, port: int) -> str:
    """This machine's address on the route to `address`; no packet is sent. OSError: no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def interface_towards(address: str, port: int) -> str | None:
    """Name of the interface on the route to `address`, or None where it cannot be told."""
    try:
        return own_addresses().get(own_address_towards(address, port))
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def wait_for_master(host: str, port: int, join_timeout_s: float) -> str:
    """The address at which the master listens, as soon as it does.

    A name that does not resolve yet (compose, Kubernetes) and a master that is not started yet are
    tried again until `join_timeout_s` is over; then a UserError says how far it got.
    """
    deadline = time.monotonic() + join_timeout_s
    while True:
        addresses = resolve(host, port)
        trouble = f"MASTER_ADDR={host!r} does not resolve: check the name, or give an address"
        for address in addresses:
            try:
                limit = max(0.1, min(5.0, deadline - time.monotonic()))
                socket.create_connection((address, port), timeout=limit).close()
                return address
            except ConnectionRefusedError:
                trouble = (
                    f"nobody listens on MASTER_ADDR={host} MASTER_PORT={port}: "
                    "start rank 0 there, and check that both name its machine"
                )
            except OSError as error:
                trouble = (
                    f"no answer from MASTER_ADDR={host} MASTER_PORT={port} ({error.strerror or error}): "
                    "check the address, and that no firewall closes the port"
                )
        if time.monotonic() + _RETRY_S > deadline:
            raise UserError(f"{trouble} (tried for {join_timeout_s:g} s; --join-timeout-s sets it)")
        time.sleep(_RETRY_S)


def listen(
    host: str, port: int, join_timeout_s: float, one_machine: bool
) -> tuple[socket.socket, str]:
    """A listening socket for the store, and the address at which this process reaches it.

    It listens on the address that the others use and on no other: the store has no password.
    Where MASTER_ADDR is no address of this machine (a published container port) or leads other
    machines to a loopback address (a hosts file with 127.0.1.1), it has to listen on all.
    """
    deadline = time.monotonic() + join_timeout_s
    while not (addresses := resolve(host, port)):
        if time.monotonic() + _RETRY_S > deadline:
            raise UserError(
                f"MASTER_ADDR={host!r} does not resolve: check the name, or give this machine's "
                f"address (tried for {join_timeout_s:g} s; --join-timeout-s sets it)"
            )
        time.sleep(_RETRY_S)
    mine = [a for a in addresses if a in own_addresses() or is_loopback(a)]
    usable = [a for a in mine if one_machine or not is_loopback(a)]
    ipv6 = ":" in (usable or addresses)[0]
    address = usable[0] if usable else ("::" if ipv6 else "0.0.0.0")
    server = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(1024)
    except OSError as error:
        server.close()
        raise UserError(
            f"MASTER_PORT={port} cannot be opened on {host} ({error.strerror}): "
            "end the program that has it, or choose another port on every machine"
        ) from None
    return server, (address if usable else ("::1" if ipv6 else "127.0.0.1"))


def first_hit(check: Callable[[], bool], deadline: float, pause_s: float = 0.05) -> bool:
    """Whether `check` became true before the monotonic time `deadline`."""
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
