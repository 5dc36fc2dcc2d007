"""The key-value store at the master: host it, or wait for the master and connect to it."""

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_here,
    is_loopback,
    own_addresses,
    resolve,
    wait_until_true,
)
from ddp_lib.distributed.coordination import StoreGroup
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.relay import relay_other_family
from ddp_lib.errors import TransientError, UserError, first_line

# Pause between two attempts to reach a master that is not there yet.
_RETRY_S = 0.2


def wait_for_name(endpoint: Endpoint, join_timeout_s: float) -> None:
    """Returns when the endpoint's host resolves; UserError after `join_timeout_s`."""
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
# How long torch may take to give up after its timeout: its stack dump alone takes seconds.
_GIVE_UP_S = 30.0


def open_store(rank_env: RankEnv, env: Mapping[str, str], join_timeout_s: float) -> StoreGroup:
    """The ranks at the master's key-value store, which rank 0 or torchrun's agent hosts."""
    by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank_env.rank == 0 and not by_agent
    if hosts:
        server = host_store(rank_env.endpoint, join_timeout_s, rank_env.one_machine)
    else:
        silence_s = _SILENCE_S if "TORCHELASTIC_RUN_ID" in env else None
        server = reach_store(rank_env.endpoint, join_timeout_s, rank_env.one_machine, silence_s)
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
    return StoreGroup(store, rank_env.rank, rank_env.world_size, hosts)


def _look_for_other_rank0(endpoint: Endpoint, prefix: str, ours: dist.Store, me: str, until: float) -> None:
    """On rank 0, if MASTER_ADDR is not this machine: does another rank 0 answer there?

    If this process answers, its port is published, as a container's may be. If another rank 0 does, both get
    an error. Python waits for this thread, some seconds at most, before the interpreter shuts down: a thread
    that returned from C++ after that would abort.
    """
    while time.monotonic() < until and threading.main_thread().is_alive():
        try:
            address = wait_for_master(endpoint, 1.0)
            theirs = dist.PrefixStore(prefix, _client(address, endpoint.port, 6.0))
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
    the endpoint is no address of this machine (a published container port), or is a name that means loopback
    here and the machine has several outward addresses. A name may mean IPv4 here and IPv6 on another machine;
    see relay.py.
    """
    wait_for_name(endpoint, join_timeout_s)
    mine = own_addresses()
    addresses = endpoint_addresses(endpoint, one_machine)
    usable = [a for a in addresses if a in mine or is_loopback(a)]
    outward = [a for a in usable if not is_loopback(a)]
    guessed = addresses != resolve(endpoint.host, endpoint.port)
    everywhere = not usable or (guessed and len(outward) != 1)
    ipv6 = ":" in (usable or addresses)[0]
    address = ("::" if ipv6 else "0.0.0.0") if everywhere else usable[0]
    try:
        listener = socket.create_server(
            (address, endpoint.port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=ipv6 and everywhere,
        )
    except OSError as error:
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
        with _without_stderr():
            client = _client(address, endpoint.port, left_s)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"{endpoint} answers, but not as a PyTorch store ({first_line(error)}): "
            "another program has this port, choose a free one"
        ) from error
    client.set_timeout(timedelta(seconds=join_timeout_s))
    return client


def host_or_reach(
    endpoint: Endpoint, hosts: bool, numbered: bool, timeout_s: float, one_machine: bool
) -> tuple[dist.Store, bool]:
    """The store, and whether this process hosts it, which it tries first if `hosts`.

    numbered: whether the machine was given a number. PortTaken if the port of number 0 is taken.
    """
    if hosts:
        try:
            return host_store(endpoint, timeout_s, one_machine), True
        except PortTaken:
            if numbered:
                raise  # without a number, perhaps another launcher of this machine hosts it
    return reach_store(endpoint, timeout_s, one_machine), False


def _client(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connects in a thread, since torch waits forever for the first byte of a program that accepts.

    TimeoutError if that program is silent; torch's error if it answers something else.
    """
    # The port has answered, so a store replies at once. The other half is for torch to give up.
    wait = timedelta(seconds=timeout_s / 2)
    others = _connections(address, port)
    client: Future[dist.TCPStore] = Future()

    def connect() -> None:
        try:
            client.set_result(dist.TCPStore(address, port, timeout=wait, wait_for_workers=False))
        except Exception as error:
            client.set_exception(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(timeout_s)
    silent = thread.is_alive()
    # A thread that returns from C++ while the interpreter shuts down would abort it. Closing its connection
    # ends its wait.
    until = time.monotonic() + _GIVE_UP_S
    while thread.is_alive() and time.monotonic() < until:
        for file in _connections(address, port) - others:
            with suppress(OSError), socket.socket(fileno=os.dup(file)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(0.1)
    if silent:
        raise TimeoutError("it accepts and is silent")
    return client.result()


def _connections(address: str, port: int) -> set[int]:
    """File descriptors of this process's connections to a peer, including those that C++ opened.

    /dev/fd lists all on Linux and on macOS. An IPv4 peer may be written as IPv6.
    """
    connected = set()
    for file in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(file).st_mode):
                with socket.socket(fileno=os.dup(file)) as connection:
                    if connection.getpeername()[:2] in ((address, port), (f"::ffff:{address}", port)):
                        connected.add(file)
    return connected


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keeps the C++ side's stack dumps off the screen: its exception says the same in one line."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
