"""Addresses, ports and interfaces: what must be right before ranks can meet.

torch resolves the machine's own name. That is often wrong: Debian's installer makes it 127.0.1.1, and in
containers it may not resolve. The address on the route to the master works.
"""

import encodings.idna  # noqa: F401  # getaddrinfo would import it in each rank; so the fork server does
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from ddp_lib.errors import UserError

# Documentation addresses (RFC 5737, RFC 3849): used to find the default route, never sent to.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")

# The variable that names the interface which `name_interface` has chosen for NCCL.
CHOSE_NCCL = "DDP_LIB_NCCL_INTERFACE"


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


def parse_endpoint(flag: str, text: str) -> Endpoint:
    """HOST:PORT as a flag gives it; UserError if it is not that."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or host.startswith("[") != host.endswith("]"):
        raise UserError(
            f"{flag} {text!r}: write HOST:PORT, such as master:29500, "
            "and brackets around an IPv6 address, [fd77::10]:29500"
        )
    return Endpoint(host_part(flag, bare), port_number(f"{flag}'s port", port), flag)


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


def host_part(name: str, text: str) -> str:
    """The host name or address in `text`; `name` is the variable or flag that held it.

    UserError, which names the wrong part, if it holds more than that.
    """
    host, wrong = text.strip(), ""
    if "://" in host:
        wrong = f"leave out {host.partition('://')[0]}://"
    elif "@" in host:
        wrong = f"leave out {host.partition('@')[0]}@"
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif "[" in host or host.count(":") == 1:
        wrong = f"the port, {host.rpartition(':')[2]}, belongs into MASTER_PORT"
    if host.lower().startswith("fe80:"):
        wrong = "a link-local address means another machine on each interface; give another one"
    if wrong or any(mark in host for mark in " /,"):
        raise UserError(f"{name}={text!r}: {wrong or 'give one host name or address'}")
    return host


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


def is_guess(endpoint: Endpoint) -> bool:
    """Whether only the others know at which address they reach this machine: the endpoint is a name of it,
    and it has several interfaces. The name may mean loopback here, or an interface that leads elsewhere."""
    mine, outward = own_addresses(), outward_addresses()
    by_name = endpoint.host not in mine and endpoint.host != "localhost" and not is_loopback(endpoint.host)
    return by_name and is_here(endpoint) and len({mine[address] for address in outward}) > 1


def own_address(endpoint: Endpoint, one_machine: bool, environ: Mapping[str, str] = os.environ) -> str:
    """This machine's address as seen by the others at `endpoint`; empty if there is none.

    Between machines it is the one that gloo and NCCL take of the interface towards the endpoint, or of the
    one that GLOO_SOCKET_IFNAME names: IPv4 if it has both.
    """
    mine = own_addresses()
    address = ""
    for candidate in endpoint_addresses(endpoint, one_machine):
        if candidate in mine or is_loopback(candidate):
            address = candidate
            break
    else:
        for candidate in endpoint_addresses(endpoint, one_machine):
            with suppress(OSError):
                address = own_address_towards(candidate, endpoint.port)
                break
    names = interface_names(environ)
    if one_machine or (is_loopback(address) and not names):
        return address
    name = names[0] if names else mine.get(address)
    of_it = [other for other in mine if mine[other] == name and not other.startswith("fe80:")]
    return min(of_it, key=lambda other: ":" in other, default="" if names else address)


def interface_names(environ: Mapping[str, str]) -> list[str]:
    """Those that GLOO_SOCKET_IFNAME names, which is a list with commas."""
    return [name.strip() for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]


def require_interfaces(environ: Mapping[str, str] = os.environ) -> None:
    """UserError if GLOO_SOCKET_IFNAME names an interface that this machine lacks."""
    there = psutil.net_if_addrs()
    for name in interface_names(environ):
        if name not in there:
            raise UserError(
                f"GLOO_SOCKET_IFNAME={environ['GLOO_SOCKET_IFNAME']!r}: {socket.gethostname()} has no "
                f"interface {name!r}, but {', '.join(there)}: correct it, or unset it to have it chosen"
            )


def name_interface(
    endpoint: Endpoint,
    one_machine: bool,
    environ: MutableMapping[str, str] = os.environ,
    address: str | None = None,
) -> str | None:
    """Tells gloo and NCCL which interface to use, unless the user did; returns its name.

    address: this machine's, if it is known how the others reach it.
    """
    name = own_addresses().get(address or own_address(endpoint, one_machine, environ))
    if name:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # NCCL refuses lo, and needs no interface on one machine. nics.py adds others that lead to all.
        if name != "lo" and "NCCL_SOCKET_IFNAME" not in environ:
            environ["NCCL_SOCKET_IFNAME"], environ[CHOSE_NCCL] = f"={name}", name
    return name


def other_interfaces(environ: Mapping[str, str] = os.environ) -> str:
    """A hint that names this machine's other interfaces, if it has any."""
    used = interface_names(environ)
    others = {n: a for a in outward_addresses() for n in [own_addresses()[a]] if n not in used}
    if not others:
        return ""
    names = ", ".join(f"{name} ({address})" for name, address in others.items())
    return (
        f"; or, if the machines share another network, set GLOO_SOCKET_IFNAME to its interface: {names} on "
        f"{socket.gethostname()}, which has tried {', '.join(used)}"
    )


def mtu_cure(environ: Mapping[str, str] = os.environ) -> str:
    """What to do if large packets get lost."""
    stats = psutil.net_if_stats()
    name = next(filter(stats.get, interface_names(environ)), "")
    return (
        f"the MTU ({stats[name].mtu} on {name} here) is too large for the way there: try "
        f"`ip link set dev {name} mtu 1200`, or less, on every machine"
        if name
        else "the MTU is too large for the way there"
    )


def wait_until_true(check: Callable[[], bool], deadline: float, pause_s: float = 0.05) -> bool:
    """Whether `check` became true before the monotonic time `deadline`."""
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True
