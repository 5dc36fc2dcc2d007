"""What ranks tell each other at the store: values, errors, who is missing, and how many operations."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from ddp_lib.distributed import store_group
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.handshake import handshake
from ddp_lib.distributed.placement import Place, Seen
from ddp_lib.distributed.probe import to_try
from ddp_lib.distributed.store_client import unset
from ddp_lib.distributed.store_group import StoreGroup
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
    group.exchange("flags", {"--lr": 0.1}, TIMEOUT_S, lambda values: None, answered=False)
    assert group.broadcast("job", "abc" if group.rank == 0 else None, TIMEOUT_S) == "abc"
    return own


def test_each_rank_joins_in_as_many_operations_however_many_there_are(monkeypatch):
    monkeypatch.setattr(store_group, "WAIT_S", TIMEOUT_S)  # a wait is one operation
    counts = {}
    for size in (4, 16, 64):
        ends, operations = on_ranks(size, join)
        why = "rank 0 on here: asked for"
        assert ends == [Place("cpu", "gloo", why, rank, size) for rank in range(size)]
        assert len(set(operations[1:])) == 1
        counts[size] = operations[:2]
    assert counts[4] == counts[16] == counts[64]  # rank 0's, and each other's


@pytest.mark.parametrize(
    "other_size, wrong", [(3, "RANK=1 is taken by another process"), (4, "WORLD_SIZE=3 ")]
)
def test_a_wrong_number_is_everybodys_error(other_size, wrong):
    """Three ranks, of which none has number 2; one that has a number twice, or another WORLD_SIZE."""
    shared, ends = dist.HashStore(), []

    def run(rank: int, size: int) -> None:
        try:
            group = StoreGroup(shared, rank, size)
            with group.publishing_errors():
                join(group)
        except UserError as error:
            ends.append(str(error))

    others = [(0, 3), (1, 3), (1 if other_size == 3 else 2, other_size)]
    threads = [threading.Thread(target=run, args=args) for args in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(ends) == 3 and all(wrong in end for end in ends), ends


@pytest.mark.parametrize("rank, wrong", [(1, "RANK=1 is taken"), (2, "WORLD_SIZE=2 for rank 0")])
def test_a_rank_too_many_is_its_own_error(rank, wrong):
    shared = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(join, [StoreGroup(shared, rank, 2) for rank in range(2)]))
    late = StoreGroup(shared, rank, max(2, rank + 1))
    with pytest.raises(PeerError, match=wrong):
        join(late)
    assert late.published_error() is None


@pytest.mark.parametrize("machines", [2, 64, 65, 300])
def test_every_machine_is_tried_by_as_many_others_as_it_tries(machines):
    tried = [to_try(machines, number) for number in range(machines)]
    counts = Counter(other for others in tried for other in others)
    assert all(number not in others for number, others in enumerate(tried))
    assert {counts[number] for number in range(machines)} == {len(set(others)) for others in tried}
    assert len(tried[0]) == (machines - 1 if machines <= 64 else (machines - 1).bit_length())


def test_every_rank_gets_what_rank_0_concludes():
    ends, _ = on_ranks(3, lambda group: group.exchange("x", group.rank * 10, TIMEOUT_S))
    assert ends == [[0, 10, 20]] * 3
    ends, _ = on_ranks(3, lambda group: group.exchange("x", group.rank, TIMEOUT_S, sum))
    assert ends == [3, 3, 3]


@pytest.mark.parametrize("failing, answered", [(0, True), (2, True), (0, False)])
def test_the_error_of_a_rank_that_leaves_reaches_those_that_wait(failing, answered):
    def work(group: StoreGroup) -> None:
        if group.rank == failing:
            error = UserError("the disk is full")
            group.publish_error(error)
            raise error
        group.exchange("x", 1, TIMEOUT_S, answered=answered)

    ends, _ = on_ranks(4, work)
    for rank, error in enumerate(ends):
        assert isinstance(error, PeerError) == (rank != failing)
        assert str(error).endswith("the disk is full")
        assert rank == failing or str(error).startswith(f"rank {failing} on ")


@pytest.mark.parametrize("answered", [True, False])
def test_an_error_of_rank_0s_conclusion_is_everybodys(answered):
    def refuse(values: list[Any]) -> None:
        raise UserError("they differ")

    ends, _ = on_ranks(3, lambda group: group.exchange("x", 1, TIMEOUT_S, refuse, answered=answered))
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


@pytest.mark.parametrize("missing", [[], [0], [3, 700], range(1000)])
def test_who_is_missing_is_found_in_few_operations(missing):
    keys = [f"{rank}" for rank in range(1000)]
    shared = dist.HashStore()
    for rank in {*range(1000)} - {*missing}:
        shared.set(keys[rank], "")
    store = CountedStore(shared)
    assert unset(store, keys) == [keys[rank] for rank in missing]
    assert store.calls.total() <= 1 + 2 * len(missing) * math.log2(len(keys))


def test_the_ranks_that_did_not_time_out_too_are_named(monkeypatch):
    all_said = threading.Barrier(6)  # instead of seconds in which they say that they timed out
    clock = SimpleNamespace(sleep=lambda seconds: all_said.wait(TIMEOUT_S), monotonic=time.monotonic)
    monkeypatch.setattr(store_group, "time", clock)
    monkeypatch.setattr(store_group, "_SILENT_S", TIMEOUT_S)

    def time_out(group: StoreGroup) -> str:
        group.hosts = [f"host{rank // 2}" for rank in range(group.world_size)]
        return "" if group.rank in (2, 3) else str(group.silent_ranks())

    ends, operations = on_ranks(8, time_out)
    said = {text for text in ends if text}
    assert len(said) == 1 and said.pop().startswith("rank 2 on host1, rank 3 on host1 did not come")
    assert max(operations) <= 1 + 1 + 2 * 2 * 3
