"""Where the launchers of all machines meet: torch's c10d rendezvous, on a store that is opened here.

torch opens that store on all addresses, guesses its host from the host name, and orders ranks by address.
Here the machine with the endpoint's address is the host, the store listens only on that address, and the
host's ranks come first: rank 0 is on the master.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_here,
    is_loopback,
    own_address,
    resolve,
)
from ddp_lib.distributed.store import PortTaken, host_store, reach_store, wait_for_name
from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch
from ddp_lib.launch.peers import Peers

# How long an elastic job with its minimum of machines waits for more; later ones may still join.
_LAST_CALL_S = 10


@dataclass
class Rendezvous:
    """master: how this machine's ranks reach the master. hosts: whether the store is here."""

    handler: DynamicRendezvousHandler
    master: str
    hosts: bool
    peers: Peers | None


def open_rendezvous(launch: Launch, join_timeout_s: float) -> Rendezvous:
    """Hosts the store or reaches it, and announces this machine; UserError if that fails."""
    several = launch.endpoint is not None
    endpoint = launch.endpoint or Endpoint("127.0.0.1", 0, "this machine")
    if several:
        wait_for_name(endpoint, join_timeout_s)
    here, hosts = is_here(endpoint), launch.node_rank in (None, 0)
    if launch.node_rank == 0 and not here:
        raise UserError(
            f"this machine got number 0, which hosts the store, but {endpoint} is no address of it "
            f"({own_address(endpoint, False) or 'no route there'}): give 0 to the machine that has it"
        )
    if here and hosts:
        try:
            store = host_store(endpoint, join_timeout_s, not several)
        except PortTaken:
            if launch.node_rank == 0:
                raise
            hosts = False  # perhaps another launcher of this machine hosts it
    if not (here and hosts):
        hosts = False
        store = reach_store(endpoint, join_timeout_s, not several)
    address = own_address(endpoint, not several)
    first = launch.node_rank if launch.node_rank is not None else int(not hosts)
    number = f"{first:06d} {address}"  # torch sorts the machines by it
    handler = DynamicRendezvousHandler.from_backend(
        launch.job,
        store,
        C10dRendezvousBackend(store, launch.job),
        *launch.nodes,
        local_addr=number,
        timeout=RendezvousTimeout(timedelta(seconds=join_timeout_s), timedelta(seconds=_LAST_CALL_S)),
    )
    peers = None
    if several:
        peers = Peers(dist.PrefixStore(f"ddp_lib/peers/{launch.job}", store), launch, address)
        peers.announce()
    return Rendezvous(handler, _master(endpoint, address, here), hosts, peers)


def _master(endpoint: Endpoint, address: str, here: bool) -> str:
    """MASTER_ADDR for this machine's ranks."""
    addresses = endpoint_addresses(endpoint, False)
    outward = [address for address in addresses if not is_loopback(address)]
    guessed = addresses != resolve(endpoint.host, endpoint.port)
    if here and guessed and len(outward) == 1:
        return address
    return endpoint.host
