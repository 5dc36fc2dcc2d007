"""A client of the key-value store: connects within a timeout, notices if large packets get lost, waits."""

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ddp_lib.distributed.addresses import is_loopback
from ddp_lib.distributed.probe import LARGE

# How long torch may take to give up after its timeout: its stack dump alone takes seconds.
_GIVE_UP_S = 30.0
# As soon as another machine's store is reached, a large piece goes both ways, within so many seconds.
_LARGE_S = 5.0
# A wait inside C++ holds the connection and blocks signal handlers, so ranks wait in pieces this long.
WAIT_S = 0.5
# A value that no key has.
_NO_VALUE = "\0"


class LargePacketsLost(TimeoutError):
    """Small messages get through to the store, and large ones do not."""


def connect_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connects in a thread, since torch waits forever for the first byte of a program that accepts.

    TimeoutError if that program is silent; torch's error if it answers something else.
    """
    # The port has answered, so a store replies at once. The other half is for torch to give up.
    wait = timedelta(seconds=timeout_s / 2)
    others = _connections(address, port)
    client: Future[dist.TCPStore] = Future()
    connected = threading.Event()

    def connect() -> None:
        try:
            store = dist.TCPStore(address, port, timeout=wait, wait_for_workers=False)
            connected.set()
            if not is_loopback(address):
                key = f"ddp_lib/large/{os.urandom(8).hex()}"
                store.set(key, "0" * LARGE)
                store.get(key)
                store.delete_key(key)
            client.set_result(store)
        except dist.DistStoreError as error:
            client.set_exception(LargePacketsLost() if connected.is_set() else error)
        except Exception as error:
            client.set_exception(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    until = time.monotonic() + timeout_s
    while thread.is_alive() and not connected.is_set() and time.monotonic() < until:
        thread.join(0.02)
    if connected.is_set():
        thread.join(_LARGE_S)
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
        raise LargePacketsLost if connected.is_set() else TimeoutError("it accepts and is silent")
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
def without_stderr() -> Iterator[None]:
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


def wait(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Whether all keys are set within so many seconds."""
    try:
        store.wait(keys, timedelta(seconds=max(0.001, seconds)))
        return True
    except dist.DistStoreError:  # not yet
        return False


def unset(store: dist.Store, keys: list[str]) -> list[str]:
    """Those of the keys that are not set: one operation if there are none, about log2(len(keys)) for each."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    half = len(keys) // 2
    return unset(store, keys[:half]) + unset(store, keys[half:])


def read(store: dist.Store, key: str) -> str:
    """The value of a key that is set, in one operation; `get` takes two. Changes nothing."""
    return store.compare_set(key, _NO_VALUE, "").decode()


def wait_for(store: dist.Store, key: str, deadline: float, wait_s: float = WAIT_S) -> str | None:
    """The key's value as soon as it is set; None if it is not by the monotonic time `deadline`.

    wait_s: seconds of one wait.
    """
    while True:
        if wait(store, [key], min(wait_s, deadline - time.monotonic())):
            return read(store, key)
        if time.monotonic() >= deadline:
            return None
