"""Several networks between the machines: NCCL may use each, beside the one that leads to the master."""

import os
import socket
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from ipaddress import ip_address, ip_interface
from typing import Any

import psutil
import torch

from ddp_lib.distributed.addresses import CHOSE_NCCL, is_loopback, own_addresses
from ddp_lib.distributed.probe import Probe, connect_all

# Of each address: interface, address/prefix, and the port at which its probe listens.
Nic = tuple[str, str, int]


def other_networks(chosen: str) -> list[tuple[str, str]]:
    """Interface and address/prefix of all that are up, except the interface of the address `chosen`, and
    tunnels."""
    stats, mine = psutil.net_if_stats(), own_addresses()
    return [
        (name, f"{entry.address}/{int(ip_address(entry.netmask)).bit_count()}")
        for name, entries in psutil.net_if_addrs().items()
        if name != mine.get(chosen) and name in stats and stats[name].isup
        if "pointopoint" not in stats[name].flags
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask
        if not is_loopback(entry.address) and not entry.address.startswith(("fe80:", "169.254."))
    ]


@contextmanager
def listening(address: str) -> Iterator[dict[str, Any]]:
    """Probes for the other machines: one at `address`, and, if there are GPUs, one on each other network.
    Yields what the other machines must know: "probe", None without an address, and "nics"."""
    nics: list[Nic] = []
    with ExitStack() as stack:
        probe = stack.enter_context(closing(Probe(address))) if address else None
        if probe and os.environ.get(CHOSE_NCCL) and torch.cuda.device_count():
            for name, network in other_networks(address):
                with suppress(OSError):
                    other = stack.enter_context(closing(Probe(network.partition("/")[0])))
                    nics.append((name, network, other.port))
        yield {"probe": [probe.address, probe.port] if probe else None, "nics": nics}


def leading(
    mine: Sequence[Sequence[Any]], others: Sequence[Sequence[Sequence[Any]]], lost: Collection[str] = ()
) -> list[str]:
    """Interfaces of `mine`, (interface, address/prefix) pairs, that lead to all other machines: each has an
    address in the same network, and none has this very address, as bridges of containers do. lost: addresses
    that could not be reached; their networks lead nowhere."""
    names = []
    theirs = [{ip_interface(nic[1]).ip for nic in machine} for machine in others]
    for name, text, *_ in mine:
        here = ip_interface(text)
        everywhere = all(here.ip not in ips and any(ip in here.network for ip in ips) for ips in theirs)
        if others and everywhere and not any(ip_address(address) in here.network for address in lost):
            names.append(name)
    return list(dict.fromkeys(names))


def unreachable(machines: Sequence[dict[str, Any]], number: int) -> list[str]:
    """Addresses of the next machine, on networks that all share, to which this one cannot connect."""
    others = _others(machines)
    names = leading(machines[number]["nics"], [machine["nics"] for machine in others])
    networks = [ip_interface(nic[1]).network for nic in machines[number]["nics"] if nic[0] in names]
    following = next((m for m in machines[number + 1 :] if m in others), others[0] if others else None)
    tried = [
        (address, nic[2])
        for nic in (following["nics"] if following else [])
        for address in [nic[1].partition("/")[0]]
        if any(ip_address(address) in network for network in networks)
    ]
    links = connect_all(tried)
    return [address for (address, _), link in zip(tried, links, strict=True) if link.trouble]


def name_networks(
    machines: Sequence[dict[str, Any]],
    lost: Collection[str],
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Adds to NCCL_SOCKET_IFNAME, unless the user has set it, the networks that lead to all machines."""
    chosen = environ.get(CHOSE_NCCL)
    if chosen and environ.get("NCCL_SOCKET_IFNAME") == f"={chosen}":
        mine = next((address for address, name in own_addresses().items() if name == chosen), "")
        more = leading(other_networks(mine), [machine["nics"] for machine in _others(machines)], lost)
        environ["NCCL_SOCKET_IFNAME"] = "=" + ",".join([chosen, *more])


def _others(machines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each other machine's entry; of its ranks only one has a probe."""
    here = own_addresses()
    return [m for m in machines if m["probe"] and m["probe"][0] not in here]
