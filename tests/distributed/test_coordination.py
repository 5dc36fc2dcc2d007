"""What ranks tell each other at the store: values, errors, who is missing, and how many operations."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from ddp_lib.distributed import coordination
from ddp_lib.distributed.coordination import StoreGroup
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.handshake import handshake
from ddp_lib.distributed.placement import Place, Seen
from ddp_lib.errors import PeerError, UserError

TIMEOUT_S = 60.0


class CountedStore:
    """A store of one process, and how often a rank calls it."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.calls = store, Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls[name] += 1
            return getattr(self.store, name)(*args)

        return call


def on_ranks(size: int, work: Callable[[StoreGroup], Any]) -> tuple[list[Any], list[int]]:
    """What `work` returns or raises on each of `size` simulated ranks, and each one's operations."""
    shared = dist.HashStore()
    stores = [CountedStore(shared) for _ in range(size)]
    ends: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            ends[rank] = work(StoreGroup(stores[rank], rank, size))
        except UserError as error:
            ends[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
    return ends, [store.calls.total() for store in stores]


def join(group: StoreGroup) -> Place:
    """The handshake, and what fit compares and asks for at its start."""
    env = RankEnv(group.rank, group.world_size, group.rank, group.world_size, 0, "127.0.0.1", 1)
    seen = Seen("here", "here", "gloo", env.local_rank, env.local_world_size)
    own = handshake(group, env, seen, TIMEOUT_S, time.monotonic() + TIMEOUT_S)
    group.exchange("flags", {"--lr": 0.1}, TIMEOUT_S, lambda values: None)
    assert group.broadcast("job", "abc" if group.rank == 0 else None, TIMEOUT_S) == "abc"
    return own


def test_operations_of_a_join_grow_with_the_number_of_ranks_and_no_faster(monkeypatch):
    monkeypatch.setattr(coordination, "WAIT_S", TIMEOUT_S)  # a wait is one operation
    total, most = {}, {}
    for size in (4, 16, 64):
        ends, operations = on_ranks(size, join)
        why = "rank 0 on here: asked for"
        assert ends == [Place("cpu", "gloo", why, rank, size) for rank in range(size)]
        total[size], most[size] = sum(operations), max(operations[1:])
    assert most[4] == most[16] == most[64]
    assert all(total[size] < 20 * size for size in total)  # rank 0 reads several posts at once if it can


def test_every_rank_gets_what_rank_0_concludes():
    ends, _ = on_ranks(3, lambda group: group.exchange("x", group.rank * 10, TIMEOUT_S))
    assert ends == [[0, 10, 20]] * 3
    ends, _ = on_ranks(3, lambda group: group.exchange("x", group.rank, TIMEOUT_S, sum))
    assert ends == [3, 3, 3]


@pytest.mark.parametrize("failing", [0, 2])
def test_the_error_of_a_rank_that_leaves_reaches_those_that_wait(failing):
    def work(group: StoreGroup) -> None:
        if group.rank == failing:
            error = UserError("the disk is full")
            group.publish_error(error)
            raise error
        group.exchange("x", 1, TIMEOUT_S)

    ends, _ = on_ranks(4, work)
    for rank, error in enumerate(ends):
        assert isinstance(error, PeerError) == (rank != failing)
        assert str(error).endswith("the disk is full")
        assert rank == failing or str(error).startswith(f"rank {failing} on ")


def test_an_error_of_rank_0s_conclusion_is_everybodys():
    def refuse(values: list[Any]) -> None:
        raise UserError("they differ")

    ends, _ = on_ranks(3, lambda group: group.exchange("x", 1, TIMEOUT_S, refuse))
    assert [str(end) for end in ends] == ["they differ"] * 3


def test_a_rank_that_does_not_come_is_named_on_all_others():
    def work(group: StoreGroup) -> None:
        if group.rank != 1:
            group.exchange("data", 1, 0.3)

    ends, _ = on_ranks(3, work)
    for rank in (0, 2):
        assert "rank(s) 1 of 3 did not reach 'data' within 0.3 s" in str(ends[rank])


def test_the_first_published_error_stands():
    group = StoreGroup(dist.HashStore(), 1, 2)
    other = StoreGroup(group.store, 0, 2)
    assert other.published_error() is None
    group.publish_error(UserError("first"))
    other.publish_error(UserError("second"))
    assert str(other.published_error()).endswith(": first")


def test_ranks_without_a_number_are_numbered_as_they_come():
    store = dist.HashStore()
    host = StoreGroup(store, 0, 5)
    came: list[Any] = []

    def arrive() -> None:
        group = StoreGroup(store, None, 5)
        answer = group.exchange("x", "m", 1.0, complete=False)
        came.append((group.rank, answer))

    threads = [threading.Thread(target=arrive) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert host.exchange("x", "host", 1.0, complete=False) == ["host", "m", "m"]
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(number for number, _ in came) == [1, 2]
    assert [answer for _, answer in came] == [["host", "m", "m"]] * 2
