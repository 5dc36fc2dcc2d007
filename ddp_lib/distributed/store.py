"""The key-value store at the master: host it, or wait for the master and connect to it."""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_guess,
    is_here,
    is_loopback,
    mtu_cure,
    name_interface,
    own_address,
    own_addresses,
    require_interfaces,
    resolve,
    wait_until_true,
)
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.probe import LARGE_LOST
from ddp_lib.distributed.relay import relay_other_family
from ddp_lib.distributed.store_client import LargePacketsLost, connect_store, wait_for, without_stderr
from ddp_lib.distributed.store_group import StoreGroup
from ddp_lib.errors import TransientError, UserError, first_line, limit_reached

# Pause between two attempts to reach a master that is not there yet.
_RETRY_S = 0.2


def wait_for_name(endpoint: Endpoint, join_timeout_s: float) -> None:
    """Returns when the endpoint's host resolves; UserError after `join_timeout_s`."""
    # torch asks the name server for the name of each peer's address. If that server does not answer, glibc
    # would wait 10 s each time.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    deadline = time.monotonic() + join_timeout_s - _RETRY_S
    if not wait_until_true(lambda: bool(resolve(endpoint.host, endpoint.port)), deadline, _RETRY_S):
        raise TransientError(
            f"{endpoint.host_name} does not resolve: check the name, or give an address "
            f"(tried for {round(join_timeout_s, 1):g} s; --join-timeout-s sets it)"
        )


def wait_for_master(
    endpoint: Endpoint, join_timeout_s: float, one_machine: bool = True, silence_s: float | None = None
) -> str:
    """The address at which the master listens, as soon as it does.

    Retries while the name does not resolve (compose, Kubernetes) or the master is not started. After
    `join_timeout_s`, a UserError says how far it got. silence_s: how long packets may vanish, if the master's
    machine is known to be up.
    """
    began = time.monotonic()
    wait_for_name(endpoint, join_timeout_s)
    while True:
        timeout_s = join_timeout_s
        trouble = f"{endpoint.host_name} does not resolve any more: check the name"
        addresses = endpoint_addresses(endpoint, one_machine)
        for address in addresses:
            try:
                left = began + join_timeout_s - time.monotonic()
                socket.create_connection((address, endpoint.port), timeout=max(0.1, min(5.0, left))).close()
                return address
            except ConnectionRefusedError:
                trouble = (
                    f"nobody listens on {endpoint}: start rank 0 there, and check that both name its machine"
                )
            except OSError as error:
                if limit := limit_reached(error):
                    raise TransientError(limit) from None
                trouble = (
                    f"no answer from {endpoint} ({error.strerror or error}): "
                    "check the address, and that no firewall closes the port"
                )
                timeout_s = join_timeout_s if silence_s is None else min(silence_s, join_timeout_s)
        if time.monotonic() + _RETRY_S > began + timeout_s:
            if addresses and is_loopback(addresses[-1]) and not is_loopback(endpoint.host):
                trouble += f"; on {socket.gethostname()} the name means this machine itself (/etc/hosts)"
            raise TransientError(f"{trouble} (tried for {round(timeout_s, 1):g} s; --join-timeout-s sets it)")
        time.sleep(_RETRY_S)


class PortTaken(TransientError):
    """Another program has the port; perhaps another process of this job."""


# A rank that torchrun started knows that the master's machine is up: packets that vanish so long are a
# firewall's doing. Three have been sent by then.
_SILENCE_S = 5.0
# Keys of a store: which job it belongs to; the address at which another machine has reached it.
_JOB, _REACHED = "ddp_lib/job", "ddp_lib/reached"
# How long a store's host may take to say which job it belongs to.
_JOB_S = 5.0


def open_store(rank_env: RankEnv, env: Mapping[str, str], join_timeout_s: float) -> StoreGroup:
    """The ranks at the master's key-value store, which rank 0 or torchrun's agent hosts."""
    by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank_env.rank == 0 and not by_agent
    job = env.get("TORCHELASTIC_RUN_ID", "")
    if hosts:
        server = host_store(rank_env.endpoint, join_timeout_s, rank_env.one_machine)
        claim(server, job)
    else:
        silence_s = _SILENCE_S if job else None
        server = reach_store(rank_env.endpoint, join_timeout_s, rank_env.one_machine, silence_s)
        if not by_agent:
            require_job(server, job, rank_env.endpoint)
    # After a restart, the store of torchrun's agent still holds the previous attempt's keys. Rank 0's own
    # store is new each time, and must not use this count: each agent counts only its own failures.
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else ""
    prefix = f"ddp_lib/{env.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"
    store = dist.PrefixStore(prefix, server)
    if hosts:
        me = f"{socket.gethostname()} {os.urandom(8).hex()}"
        store.set("host", me)
        if not is_here(rank_env.endpoint):
            look = (rank_env.endpoint, prefix, store, me, time.monotonic() + join_timeout_s)
            threading.Thread(target=_look_for_other_rank0, args=look).start()
    group = StoreGroup(store, rank_env.rank, rank_env.world_size, hosts)
    with group.publishing_errors():
        choose_interface(rank_env.endpoint, rank_env.one_machine, server, join_timeout_s / 2)
    return group


def claim(store: dist.Store, job: str) -> None:
    """Says, in a store that was just opened, which job it belongs to. job: its name, empty if it has none."""
    host, since = socket.gethostname(), time.strftime("%H:%M:%S")
    store.set(_JOB, json.dumps({"name": job, "host": host, "since": since}))


def require_job(store: dist.Store, job: str, endpoint: Endpoint) -> None:
    """UserError if the store that was reached at `endpoint` belongs to another job than `job`."""
    text = wait_for(store, _JOB, time.monotonic() + _JOB_S)
    if text is None:
        raise UserError(
            f"{endpoint} is a store of torch, but of no ddp-launch and of no World.join: start the same "
            "command on every machine, or choose another port on every machine"
        )
    owner = json.loads(text)
    if owner["name"] != job:
        name = f"the job {owner['name']!r}" if owner["name"] else "a job without a name"
        raise TransientError(
            f"{endpoint} belongs to {name}, started at {owner['since']} on {owner['host']}, and not to "
            f"{f'{job!r}' if job else 'this job, which has no name'}: choose another port on every machine; "
            "if it is the same job, give every machine the same flags"
        )


def choose_interface(endpoint: Endpoint, one_machine: bool, store: dist.Store, timeout_s: float) -> str:
    """Names the interface for gloo and NCCL, unless the user did; returns this machine's address on it.

    On the master, if only the others know which one leads to them, it is the one at which the first of them
    has reached the store within timeout_s. UserError if the user named one that is not there.
    """
    require_interfaces()
    address = None
    if not one_machine and "GLOO_SOCKET_IFNAME" not in os.environ and is_guess(endpoint):
        address = wait_for(store, _REACHED, time.monotonic() + timeout_s)
    name_interface(endpoint, one_machine, address=address)
    return address or own_address(endpoint, one_machine)


def _look_for_other_rank0(endpoint: Endpoint, prefix: str, ours: dist.Store, me: str, until: float) -> None:
    """On rank 0, if MASTER_ADDR is not this machine: does another rank 0 answer there?

    If this process answers, its port is published, as a container's may be. If another rank 0 does, both get
    an error. Python waits for this thread, some seconds at most, before the interpreter shuts down: a thread
    that returned from C++ after that would abort.
    """
    while time.monotonic() < until and threading.main_thread().is_alive():
        try:
            address = wait_for_master(endpoint, 1.0)
            theirs = dist.PrefixStore(prefix, connect_store(address, endpoint.port, 6.0))
            if theirs.check(["host"]):
                other = theirs.get("host").decode()
                if other != me:
                    text = (
                        f"RANK=0 is set on {other.split()[0]}, which has {endpoint}, and on "
                        f"{me.split()[0]}, which has not: give each a number of its own"
                    )
                    for store in (theirs, ours):
                        StoreGroup(store, None, 0).publish_error(UserError(text))
                return
        except (UserError, RuntimeError, ValueError, TimeoutError):
            time.sleep(0.5)


def host_store(endpoint: Endpoint, join_timeout_s: float, one_machine: bool) -> dist.TCPStore:
    """Hosts the store; PortTaken if that fails.

    Listens only on the address that the others use, since the store has no password. It must listen on all if
    the endpoint is no address of this machine (a published container port), or is its name, and it has
    several interfaces. A name may mean IPv4 here and IPv6 on another machine; see relay.py.
    """
    wait_for_name(endpoint, join_timeout_s)
    mine = own_addresses()
    addresses = endpoint_addresses(endpoint, one_machine)
    usable = [a for a in addresses if a in mine or is_loopback(a)]
    everywhere = not usable or (not one_machine and is_guess(endpoint))
    ipv6 = ":" in (usable or addresses)[0] or (everywhere and any(":" in a and a != "::1" for a in mine))
    address = ("::" if ipv6 else "0.0.0.0") if everywhere else usable[0]
    if is_loopback(address) and not any(map(is_loopback, mine)):  # Linux lets it be bound all the same
        raise UserError(
            f"the loopback interface of {socket.gethostname()} is down, and the ranks of one machine meet at "
            f"{address}: bring it up, `ip link set lo up`"
        )
    try:
        listener = socket.create_server(
            (address, endpoint.port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=ipv6 and everywhere,
        )
    except OSError as error:
        if limit := limit_reached(error):
            raise TransientError(limit) from None
        raise PortTaken(
            f"{endpoint.port_name} cannot be opened on {endpoint.host} ({os.strerror(error.errno or 0)}): "
            "end the program that has it, or choose another port on every machine"
        ) from None
    port = listener.getsockname()[1]
    if not (everywhere or one_machine or address == endpoint.host):
        relay_other_family(address, port)
    return dist.TCPStore(
        ("::1" if ipv6 else "127.0.0.1") if everywhere else address,
        port,
        is_master=True,
        timeout=timedelta(seconds=join_timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reach_store(
    endpoint: Endpoint, join_timeout_s: float, one_machine: bool, silence_s: float | None = None
) -> dist.TCPStore:
    """A client of the store, as soon as it is there; UserError if nothing or another program answers."""
    began = time.monotonic()
    address = wait_for_master(endpoint, join_timeout_s, one_machine, silence_s)
    left_s = max(2.0, began + join_timeout_s - time.monotonic())
    try:
        with without_stderr():
            client = connect_store(address, endpoint.port, left_s)
            if not one_machine and address not in own_addresses():
                client.compare_set(_REACHED, "", address)
    except LargePacketsLost:
        name_interface(endpoint, one_machine)
        raise TransientError(f"{endpoint} {LARGE_LOST}: {mtu_cure()}") from None
    except (OSError, RuntimeError, ValueError) as error:
        if limit := limit_reached(error):
            raise TransientError(limit) from error
        raise UserError(
            f"{endpoint} answers, but not as a PyTorch store ({first_line(error)}): "
            "another program has this port, choose a free one"
        ) from error
    client.set_timeout(timedelta(seconds=join_timeout_s))
    return client


def host_or_reach(
    endpoint: Endpoint, hosts: bool, numbered: bool, timeout_s: float, one_machine: bool, job: str
) -> tuple[dist.Store, bool]:
    """The store of the job, and whether this process hosts it, which it tries first if `hosts`.

    numbered: whether the machine was given a number. PortTaken if the port of number 0 is taken.
    """
    taken: PortTaken | None = None
    if hosts:
        try:
            server = host_store(endpoint, timeout_s, one_machine)
            claim(server, job)
            return server, True
        except PortTaken as error:
            taken = error  # perhaps by another launcher of this machine
    store = reach_store(endpoint, timeout_s, one_machine)
    require_job(store, job, endpoint)
    if taken and numbered:
        raise taken
    return store, False
