"""The key-value store at the master: hosting it, reaching it, and talking over it."""

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ddp_lib.errors import UserError, first_line
from ddp_lib.master import listen, wait_for_master
from ddp_lib.network import Endpoint, first_hit, is_here
from ddp_lib.place import Place

# A rank that torchrun started knows that the master's machine is up: packets that vanish so long
# are a firewall's doing. Three have been sent by then.
_SILENCE_S = 5.0
# How long the host of the store waits, before it leaves with an error, for the others to have read it.
LINGER_S = 3.0
# How long torch may take to give up connecting, over its limit: a stack dump alone takes it seconds.
_GIVE_UP_S = 30.0


def open_store(place: Place, env: Mapping[str, str], join_timeout_s: float) -> dist.Store:
    """The key-value store at the master: hosted by rank 0, or already by torchrun's agent."""
    by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and not by_agent
    if hosts:
        store = host_store(place.endpoint, join_timeout_s, place.one_machine)
    else:
        silence_s = _SILENCE_S if "TORCHELASTIC_RUN_ID" in env else None
        store = reach_store(place.endpoint, join_timeout_s, place.one_machine, silence_s)
    # After a restart torchrun's agent's store still holds the keys of the attempt before. A store of
    # rank 0's own is new each time; and each agent counts its own failures alone, so that after one
    # machine's the counts differ.
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0") if by_agent else ""
    prefix = f"ddp_lib/{env.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"
    ours = dist.PrefixStore(prefix, store)
    if hosts:
        me = f"{socket.gethostname()} {os.urandom(8).hex()}"
        ours.set("host", me)
        if not is_here(place.endpoint):
            look = (place.endpoint, prefix, ours, me, time.monotonic() + join_timeout_s)
            threading.Thread(target=_look_for_rival, args=look).start()
    return ours


def _look_for_rival(
    endpoint: Endpoint, prefix: str, ours: dist.Store, me: str, until: float
) -> None:
    """Rank 0 on a machine that has not MASTER_ADDR: does another rank 0 answer there?

    If this one does, its port is published, as a container's may be. If another does, both get to
    know it. Python waits for this thread before it goes down, some seconds at most: one that comes
    back from C++ after that would abort.
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
                        store.compare_set("told", "", text)
                return
        except (UserError, RuntimeError, ValueError, TimeoutError):
            time.sleep(0.5)


def host_store(endpoint: Endpoint, join_timeout_s: float, one_machine: bool) -> dist.TCPStore:
    """Hosts it here, on the address towards the peers and no other; PortTaken where that fails."""
    server, address = listen(endpoint, join_timeout_s, one_machine)
    return dist.TCPStore(
        address,
        server.getsockname()[1],
        None,
        True,
        timedelta(seconds=join_timeout_s),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def reach_store(
    endpoint: Endpoint, join_timeout_s: float, one_machine: bool, silence_s: float | None = None
) -> dist.TCPStore:
    """A client of the store, as soon as it is there.

    UserError where something else answers, or nothing does.
    """
    began = time.monotonic()
    address = wait_for_master(endpoint, join_timeout_s, one_machine, silence_s)
    left_s = max(2.0, began + join_timeout_s - time.monotonic())
    try:
        with _without_stderr():
            found = _client(address, endpoint.port, left_s)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"{endpoint} answers, but not as a PyTorch store ({first_line(error)}): "
            "another program has this port, choose a free one"
        ) from error
    found.set_timeout(timedelta(seconds=join_timeout_s))
    return found


def _client(address: str, port: int, limit_s: float) -> dist.TCPStore:
    """Connects in a thread: torch waits without limit for the first word of a program that accepts.

    TimeoutError where it is silent; torch's error where it says another word.
    """
    # The port has answered, so a store says so at once. The rest is for torch to give up.
    wait = timedelta(seconds=limit_s / 2)
    others = _connections((address, port))
    outcome: list[dist.TCPStore | Exception] = []

    def connect() -> None:
        try:
            outcome.append(dist.TCPStore(address, port, None, False, wait, wait_for_workers=False))
        except (RuntimeError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(limit_s)
    silent = not outcome
    # A thread that comes back from C++ while the interpreter goes down would abort it: the end of its
    # connection ends its wait.
    until = time.monotonic() + _GIVE_UP_S
    while thread.is_alive() and time.monotonic() < until:
        for file in _connections((address, port)) - others:
            _hang_up(file)
        thread.join(0.1)
    found = TimeoutError("it accepts and is silent") if silent else outcome[0]
    if isinstance(found, Exception):
        raise found
    return found


def _connections(peer: tuple[str, int]) -> set[int]:
    """The descriptors of this process's connections to `peer`, also of those that C++ has opened.

    /dev/fd lists all on Linux and on macOS. An IPv4 peer may be written as IPv6.
    """
    names = (peer, (f"::ffff:{peer[0]}", peer[1]))
    found = set()
    for file in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed meanwhile, or connected to nobody
            if stat.S_ISSOCK(os.fstat(file).st_mode):
                with socket.socket(fileno=os.dup(file)) as connection:
                    if connection.getpeername()[:2] in names:
                        found.add(file)
    return found


def _hang_up(file: int) -> None:
    """Ends a connection: whoever waits for its next word gets an error."""
    with suppress(OSError), socket.socket(fileno=os.dup(file)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


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


def exchange(
    store: dist.Store,
    what: str,
    rank: int,
    world_size: int,
    value: str,
    deadline: float,
    limit_s: float,
    check: Callable[[int, str], None] = lambda rank, text: None,
) -> list[str]:
    """Every rank's value, in rank order; `check(rank, value)` is called as each arrives.

    Over the store and not a collective: it works before the group stands, and names who is missing.
    A UserError that another rank has told is raised here too.
    """
    store.set(f"{what}/{rank}", value)
    found: dict[int, str] = {}
    pause_s = 0.005
    while len(found) < world_size:
        raise_what_was_told(store)
        for other in range(world_size):
            if other not in found and store.check([f"{what}/{other}"]):
                found[other] = store.get(f"{what}/{other}").decode()
                check(other, found[other])
        if len(found) == world_size:
            break
        if time.monotonic() > deadline:
            missing = ", ".join(str(r) for r in range(world_size) if r not in found)
            raise UserError(
                f"rank(s) {missing} of {world_size} did not reach '{what.partition('/')[0]}' within "
                f"{limit_s:g} s: start them, look at their output, or lower WORLD_SIZE"
            )
        time.sleep(pause_s)
        pause_s = min(0.2, pause_s * 1.5)
    return [found[other] for other in range(world_size)]


def share(store: dist.Store, what: str, value: str | None, timeout_s: float) -> str:
    """The value that one rank gives (the others give None), on every rank."""
    if value is not None:
        store.set(what, value)
        return value

    def is_there() -> bool:
        raise_what_was_told(store)
        return bool(store.check([what]))

    if not first_hit(is_there, time.monotonic() + timeout_s):
        raise UserError(
            f"rank 0 did not give '{what.partition('/')[0]}' within {timeout_s:g} s: look at its output"
        )
    return store.get(what).decode()


class Told(UserError):
    """Another rank's UserError, heard over the store."""


def raise_what_was_told(store: dist.Store) -> None:
    if store.check(["told"]):
        raise Told(store.get("told").decode())


def tell_all(store: dist.Store, error: UserError, hosts: bool) -> None:
    """Before this rank leaves with `error`: all that wait at the store get to know it.

    hosts: the store ends with this process, which waits for the others that came.
    """
    try:
        store.compare_set("told", "", str(error))
        store.add("left", 1)
        if hosts:
            deadline = time.monotonic() + LINGER_S
            first_hit(lambda: store.add("left", 0) >= store.add("came", 0), deadline)
    except RuntimeError:
        return  # the store is gone already
