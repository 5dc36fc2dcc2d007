"""Many ranks: joining a group, and exchanging a value over the store.

python benchmarks/many_ranks.py [--rounds 5] [--ranks 64] [--clients 64 256 1024 4096]

- Real ranks, started by run_ranks on this machine: from the moment at which the first of them calls
  World.join, or init_process_group with gloo, to the end of the first barrier on all.
- Simulated clients of the store: threads of some processes, each with a connection of its own. They compare a
  value, and exchange one for an answer. Beside them, the same clients at a bare TCPStore: each sets one key
  and waits for another, which the last of them sets.

- What grows how with the number of ranks: operations, counted; connections; files.

The ways take turns in each round, so that a moment in which the machine is busy affects both alike.

torch's store asks the name server for the name of each client, and answers nobody meanwhile. World.join
listens so that /etc/hosts knows the name of loopback; init_process_group and the bare store do not. So this
refuses to run where a lost question costs seconds, but not in a network of its own, which has no name server:
unshare --net sh -c "ip link set lo up; python benchmarks/many_ranks.py"
"""

import argparse
import os
import resource
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

from report import save, table

from ddp_lib import World, run_ranks
from ddp_lib.distributed import store_group
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.handshake import handshake
from ddp_lib.distributed.placement import Seen
from ddp_lib.distributed.probe import to_try
from ddp_lib.distributed.store_group import StoreGroup

TIMEOUT_S = 600.0
ASKED = 200  # questions to the name server
HOLDERS = 32  # processes with the clients, but for client 0, which has one of its own


def by_torch() -> tuple[float, float]:
    """The seconds since the epoch at which this rank began, and at which it left the barrier."""
    import torch.distributed as dist

    began = time.time()
    dist.init_process_group("gloo")
    dist.barrier()
    ended = time.time()
    dist.destroy_process_group()
    return began, ended


def by_world() -> tuple[float, float]:
    began = time.time()
    with World.join(backend="gloo", log=lambda line: None):  # it ends with a barrier
        return began, time.time()


def join(way: Any, ranks: int) -> float:
    times = run_ranks(way, ranks, timeout_s=TIMEOUT_S)
    return max(ended for _, ended in times) - min(began for began, _ in times)


def bare(store: Any, rank: int, size: int) -> None:
    if store.add("set", 1) == size:
        store.set("all", "")
    store.wait(["all"])


def compare(store: Any, rank: int, size: int) -> None:
    exchange(store, rank, size, answered=False)


def exchange(store: Any, rank: int, size: int, answered: bool = True) -> None:
    StoreGroup(store, rank, size).exchange("value", rank, TIMEOUT_S, lambda values: None, answered=answered)


WAYS = {"bare store": bare, "compare": compare, "exchange": exchange}


class Enough(Exception):
    pass


class Counted:
    """A store, how often it was called, and whether the rank may wait there."""

    def __init__(self, store: Any, waits: bool) -> None:
        self.store, self.waits, self.calls = store, waits, 0

    def __getattr__(self, name: str) -> Any:
        if name == "wait" and not self.waits:
            raise Enough
        self.calls += 1
        return getattr(self.store, name)


def operations(way: Any, size: int) -> tuple[int, int]:
    """How many rank 0 and rank 1 make, of so many, if the others have come."""
    import torch.distributed as dist

    shared = dist.HashStore()
    for rank in range(2, size):
        with suppress(Enough):
            way(Counted(shared, False), rank, size)
    stores = [Counted(shared, True), Counted(shared, True)]
    with patch.object(store_group, "WAIT_S", TIMEOUT_S), ThreadPoolExecutor() as pool:
        list(pool.map(way, stores, range(2), [size, size]))
    return stores[0].calls, stores[1].calls


def shake_hands(store: Any, rank: int, size: int) -> None:
    env = RankEnv(rank, size, rank, size, 0, "127.0.0.1", 1)
    seen = Seen("here", "here", "gloo", rank, size)
    handshake(StoreGroup(store, rank, size), env, seen, TIMEOUT_S, time.monotonic() + TIMEOUT_S)


def growth(sizes: list[int], comparing_s: list[float]) -> list[dict[str, str]]:
    """What grows how with the number of ranks: counted here for `sizes`, and the seconds of a comparison."""
    by_what: dict[str, list[Any]] = {}
    for what, way in {"join": shake_hands, "comparison": compare, "exchange": exchange}.items():
        counts = [operations(way, size) for size in sizes]
        by_what[f"store operations of a rank, {what}"] = [other for _, other in counts]
        by_what[f"store operations of rank 0, {what}"] = [first for first, _ in counts]
    by_what["seconds of a comparison, all ranks at one store"] = [f"{run:.3f}" for run in comparing_s]
    by_what["connections that a machine tries, of so many machines"] = [len(to_try(n, 0)) for n in sizes]
    return [
        {"what": what, **{f"N = {n:,}": f"{value}" for n, value in zip(sizes, values, strict=True)}}
        for what, values in by_what.items()
    ]


def hold_clients(port: int, size: int, rounds: int) -> list[tuple[float, float]]:
    """On each rank: the process of some clients, rank 0 of client 0 alone, which is the busiest.

    Returns, for each round and way, when all began, and when the last client of this process was done.
    """
    import torch.distributed as dist

    me, holders = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1

    def connect() -> Any:
        timeout = timedelta(seconds=TIMEOUT_S)
        return dist.TCPStore("127.0.0.1", port, timeout=timeout, wait_for_workers=False)

    control, clients = connect(), {rank: connect() for rank in range(me, size if me else 1, holders)}
    times = []
    for number, way in enumerate([*WAYS.values()] * rounds):
        go, ends = threading.Event(), []

        def take_part(
            rank: int, way: Any = way, name: str = f"{number}", go: Any = go, ends: Any = ends
        ) -> None:
            go.wait()
            way(dist.PrefixStore(name, clients[rank]), rank, size)
            ends.append(time.time())

        threads = [threading.Thread(target=take_part, args=(rank,)) for rank in clients]
        for thread in threads:
            thread.start()
        if control.add(f"ready{number}", 1) == holders + 1:
            control.set(f"began{number}", str(time.time()))
        began = float(control.get(f"began{number}"))
        go.set()
        for thread in threads:
            thread.join()
        times.append((began, max(ends)))
    return times


def measure_clients(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    by_process = run_ranks(hold_clients, HOLDERS + 1, server.port, size, rounds, timeout_s=TIMEOUT_S)
    seconds = [max(end for _, end in times) - times[0][0] for times in zip(*by_process, strict=True)]
    return {name: seconds[number :: len(WAYS)] for number, name in enumerate(WAYS)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 8])
    parser.add_argument("--clients", type=int, nargs="*", default=[64, 256, 1024, 4096])
    options = parser.parse_args()
    began = time.monotonic()
    for _ in range(ASKED):
        with suppress(socket.gaierror):
            socket.getnameinfo(("::ffff:127.0.0.1", 1), socket.NI_NUMERICSERV)
    if time.monotonic() - began > 1:
        parser.error("the name server is slow or loses questions: run it in a network of its own (--help)")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection of each client
    rows, findings = [], []

    def add(what: str, seconds: dict[str, list[float]], first: str) -> None:
        for name, runs in seconds.items():
            row = {"name": f"{what}, {name}", "unit": "s", "runs": [round(run, 4) for run in runs]}
            rows.append(row)
            if name != first:
                ratio = statistics.median(runs) / statistics.median(seconds[first])
                findings.append(f"{what}, {name}: {ratio:.2f} of the time of {first}.")
                print(findings[-1], flush=True)

    for size in options.ranks:
        ways: dict[str, Any] = {"init_process_group": by_torch, "World.join": by_world}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                times[name].append(join(way, size))
        add(f"{size} ranks", times, "init_process_group")
    for size in options.clients:
        add(f"{size} clients", measure_clients(size, options.rounds), "bare store")
    medians = [
        statistics.median(row["runs"])
        for row in rows
        if row["name"] in [f"{n} clients, compare" for n in options.clients]
    ]
    what = (
        "From the first rank's call to the end of the first barrier on all, ranks started by run_ranks; and "
        "what simulated clients do at a store, of which "
        f"{HOLDERS + 1} processes hold all: compare a value (2 operations of each, as at the bare store), or "
        f"exchange one for an answer (3). The computer's load average was {os.getloadavg()[0]:.0f}."
    )
    print(table(save("many_ranks", "Many ranks", what, rows, findings)["rows"]))
    what = (
        "Operations counted on a store in one process; a comparison is one of those below (Many ranks). "
        "Each rank also holds a connection to the store and writes a log, and gloo connects it with every "
        "other."
    )
    finding = (
        "A rank makes as many store operations however many there are; seconds at the one store grow with N; "
        "of more than 64 machines each tries to connect to log2(N) others."
    )
    rows = growth(options.clients, medians)
    print(table(save("growth", "What grows how with the number of ranks", what, rows, [finding])["rows"]))


if __name__ == "__main__":
    main()
