"""Where the launchers of all machines meet: torch's c10d rendezvous, on a store that is opened here.

torch opens that store on all addresses, guesses its host from the host name, and orders ranks by address.
Here the machine with the endpoint's address is the host, the store listens only on that address, and the
host's ranks come first: rank 0 is on the master.
"""

import sys
import time
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    _RendezvousExitOp,
)

from ddp_lib.distributed.addresses import (
    Endpoint,
    is_here,
    own_address,
    resolve,
    wait_until_true,
)
from ddp_lib.distributed.store import choose_interface, host_or_reach, wait_for_name
from ddp_lib.errors import UserError
from ddp_lib.launch.arrival import ArrivalTimes
from ddp_lib.launch.failure import say_where
from ddp_lib.launch.options import Launch
from ddp_lib.launch.peers import Peers

# How long an elastic job with its minimum of machines waits for more; later ones may still join.
_LAST_CALL_S = 10
# How long saying good-bye may take. How long a host that cannot take part waits for the others.
_LEAVE_S, _COME_S = 5, 20.0


class Rendezvous(DynamicRendezvousHandler):
    """torch's, which a machine may also leave without closing it for the others."""

    def leave(self) -> None:
        """Takes this machine out of an elastic job, which goes on without it."""
        self._stop_heartbeats()
        self._op_executor.run(_RendezvousExitOp(), self._get_deadline(timedelta(seconds=_LEAVE_S)))


def _sort_key(address: str) -> str:
    """As text in the order of the numbers: 10.0.0.9 before 10.0.0.10."""
    return f"{ip_address(address).packed.hex()} {address}" if address else ""


def refuse(peers: Peers, error: UserError, join_timeout_s: float) -> None:
    """Ends the job on every machine: this one cannot take part. The store's host waits for those that are
    just starting, at most `join_timeout_s` and _COME_S."""
    wait_s = min(_COME_S, join_timeout_s)

    def all_came() -> bool:
        return not peers.hosts or len(peers.arrived()) >= peers.launch.nodes[1]

    if not all_came():
        text = f"waiting for the other machines, at most {wait_s:g} s, to tell them"
        print(f"ddp-launch: {text}", file=sys.stderr, flush=True)
        wait_until_true(all_came, time.monotonic() + wait_s)
    peers.publish_end(say_where(str(error)), error.status)
    peers.wait_until_read(wait_s)  # one that has just come still loads torch's agent


def open_rendezvous(launch: Launch, join_timeout_s: float) -> tuple[Rendezvous, str, Peers]:
    """Hosts the store or reaches it, and announces this machine; UserError if that fails.

    Returns torch's rendezvous, MASTER_ADDR for this machine's ranks, and the launchers that have come.
    """
    several = launch.endpoint is not None
    endpoint = launch.endpoint or Endpoint("127.0.0.1", 0, "this machine")
    if several:
        wait_for_name(endpoint, join_timeout_s)
    here, number = is_here(endpoint), launch.node_rank
    if number == 0 and not here:
        raise UserError(
            f"this machine got number 0, which hosts the store, but {endpoint} is no address of it "
            f"({own_address(endpoint, False) or 'no route there'}): give 0 to the machine that has it"
        )
    store, hosts = host_or_reach(
        endpoint, here and number in (None, 0), number is not None, join_timeout_s, not several, launch.job
    )
    address, trouble = "", None
    try:
        # An elastic job may begin alone.
        address = choose_interface(
            endpoint, not several, store, join_timeout_s if launch.nodes[0] > 1 else _LAST_CALL_S
        )
    except UserError as error:
        trouble = error
    first = number if number is not None else int(not hosts)
    last_call = timedelta(seconds=_LAST_CALL_S)
    handler = Rendezvous.from_backend(
        launch.job,
        store,
        ArrivalTimes(C10dRendezvousBackend(store, launch.job), last_call),
        *launch.nodes,
        local_addr=f"{first:06d} {_sort_key(address)}",  # torch sorts the machines by it
        timeout=RendezvousTimeout(timedelta(seconds=join_timeout_s), last_call),
    )
    peers = Peers(dist.PrefixStore(f"ddp_lib/peers/{launch.job}", store), launch, address, hosts)
    master = endpoint.host
    if several:
        peers.announce()
        if here and address and address not in resolve(endpoint.host, endpoint.port):
            master = address  # the name means another here, or the user chose another interface
        master = peers.share_master(master if hosts else None, join_timeout_s) or endpoint.host
    if trouble:
        if several:  # the others watch for it now
            refuse(peers, trouble, join_timeout_s)
        raise trouble
    return handler, master, peers
