"""What ranks tell each other over the store: plain values.

Each rank writes its own key in the store. Rank 0 collects them as they come and publishes one answer; the
others wait for that answer, which may be an error. So the number of operations grows with the number of ranks
N, not with N * N, and only rank 0's grows at all.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ddp_lib.distributed.addresses import wait_until_true
from ddp_lib.errors import PeerError, TransientError, UserError

if TYPE_CHECKING:
    from ddp_lib.distributed.world import World

# How long the store's host waits for the others to read its error before it exits.
LINGER_S = 3.0
# A wait inside C++ holds the connection and blocks signal handlers, so ranks wait in pieces this long.
WAIT_S = 0.5
# How many posts rank 0 reads at a time: of many ranks, nearly all come at once.
_BATCH = 64
# How long a rank that timed out waits for the others to say that they did too.
_SILENT_S = 2.0
# How much longer than its own timeout a rank waits for rank 0 to publish who is missing.
_ANSWER_S = 2.0


@dataclass
class StoreGroup:
    """The ranks of a job as they talk over the store, before and beside the process group.

    rank None: ranks are numbered from 1 as they arrive. hosts_store: the store ends with this process. All
    ranks make the same calls in the same order. Values are anything JSON holds. `StoreGroup()`: one rank.
    """

    store: dist.Store = field(default_factory=dist.HashStore)
    rank: int | None = 0
    world_size: int = 1
    hosts_store: bool = False
    hosts: list[str] = field(default_factory=list)  # each rank's machine, once they have joined
    _published: bool = field(default=False, repr=False)
    _calls: int = field(default=0, repr=False)

    @property
    def _key(self) -> str:
        return f"call/{self._calls}"

    def exchange(
        self,
        what: str,
        value: Any,
        timeout_s: float,
        conclude: Callable[[list[Any]], Any] = list,
        check: Callable[[int, Any], None] = lambda rank, value: None,
        deadline: float | None = None,
        complete: bool = True,
    ) -> Any:
        """Returns on every rank what `conclude` makes on rank 0 of all ranks' values, in rank order.

        check(rank, value): called on rank 0 as each value arrives. deadline: monotonic time; default:
        timeout_s from now. complete False: at the deadline rank 0 concludes from the values it has.

        UserError, on every rank, if conclude or check raise it on rank 0 or a rank publishes an error instead
        of a value. At the deadline, a UserError names the ranks that did not come.
        """
        if deadline is None:
            deadline = time.monotonic() + timeout_s
        self._post({"value": value})
        if self.rank != 0:
            return self.broadcast(what, None, timeout_s, deadline if complete else deadline + _ANSWER_S)
        try:
            values = {0: json.loads(json.dumps(value))}
            while len(values) < self.world_size:
                texts = self._next_posts(len(values), deadline)
                if not texts and complete:
                    raise TransientError(self._who_is_missing(what, timeout_s))
                if not texts:
                    break
                for record in map(json.loads, texts):
                    if "error" in record:
                        raise PeerError(record["error"], record["status"])
                    check(record["rank"], record["value"])
                    values[record["rank"]] = record["value"]
            answer = conclude([values.get(rank) for rank in range(max(values) + 1)])
        except UserError as error:
            self._publish(error)
            raise
        return self.broadcast(what, answer, timeout_s)

    def broadcast(self, what: str, value: Any, timeout_s: float, deadline: float | None = None) -> Any:
        """Rank 0's value, on every rank; the others' is ignored. Deadline and UserError as in `exchange`."""
        if self.rank == 0:
            self.store.set(f"{self._key}/answer", json.dumps({"value": value}))
        deadline = time.monotonic() + timeout_s if deadline is None else deadline
        text = wait_for(self.store, f"{self._key}/answer", deadline)
        if text is None:
            missing = TransientError(self._who_is_missing(what, timeout_s))
            self._publish(missing)
            raise missing
        answer = json.loads(text)
        if "error" in answer:
            self.count_as_read()
            raise PeerError(answer["error"], answer["status"])
        self._calls += 1
        return answer["value"]

    @contextmanager
    def publishing_errors(self) -> Iterator[None]:
        """Publishes a UserError that leaves the block."""
        try:
            yield
        except UserError as error:
            self.publish_error(error)
            raise

    def publish_error(self, error: UserError) -> None:
        """Tells every rank why this rank leaves. They see it in their current or next call, or, if they lose
        their connection to this rank, from `published_error`."""
        if not isinstance(error, PeerError):
            prefix = "" if self.rank is None else f"rank {self.rank} on {socket.gethostname()}: "
            self._publish(error, prefix)

    def published_error(self) -> PeerError | None:
        """The first error that any rank has published, if any."""
        with suppress(RuntimeError):  # the store is gone
            if self.store.check(["error"]):
                self.count_as_read()
                published = json.loads(self.store.get("error"))
                return PeerError(published["error"], published["status"])
        return None

    def silent_ranks(self) -> TransientError | None:
        """Says which ranks did not time out as this one did: they are frozen, off, or elsewhere."""
        if not self.hosts:
            return None
        answers: dict[int, bool] = {}

        def ask() -> None:
            with suppress(RuntimeError):
                self.store.set(f"timed out/{self.rank}", "")
                time.sleep(_SILENT_S)
                for rank in range(self.world_size):
                    answers[rank] = self.store.check([f"timed out/{rank}"])

        # If rank 0's machine is silent, the call into C++ does not return.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * _SILENT_S)
        if not answers:
            answers = {rank: rank != 0 for rank in range(self.world_size)}
        silent = [f"rank {rank} on {self.hosts[rank]}" for rank in answers if not answers[rank]]
        if not silent:
            return None
        return TransientError(
            f"{', '.join(silent)} did not come to a collective, and does not answer: hung, frozen, off, or "
            "cut off from the network; the same command goes on from the last checkpoint"
        )

    def wait_until_read(self) -> None:
        """Makes the store's host wait, at most LINGER_S, until the others have read the last answer."""
        until = time.monotonic() + LINGER_S
        with suppress(RuntimeError):
            wait_until_true(lambda: self.store.add("read", 0) >= self.store.add("call/0/arrived", 0), until)

    def count_as_read(self) -> None:
        """This rank makes no more calls, so the store's host need not wait for it."""
        with suppress(RuntimeError):
            self.store.add("read", 1)

    def _publish(self, error: UserError, prefix: str = "") -> None:
        if self._published:
            return
        self._published = True
        record = {"error": f"{prefix}{error}", "status": error.status}
        with suppress(RuntimeError):
            self.store.compare_set("error", "", json.dumps(record))
            if self.rank == 0:
                self.store.set(f"{self._key}/answer", json.dumps(record))
            else:
                self._post(record)
                self.count_as_read()
        if self.hosts_store:
            # Python waits for this thread before the process ends, and the store with it.
            threading.Thread(target=self.wait_until_read, name="linger").start()

    def _post(self, record: dict[str, Any]) -> None:
        """Writes this rank's record of the current call: rank 0's has number 0, the others' are counted."""
        number = 0 if self.rank == 0 else self.store.add(f"{self._key}/arrived", 1)
        if self.rank is None:
            self.rank = number
        self.store.set(f"{self._key}/{number}", json.dumps({"rank": self.rank, **record}))

    def _next_posts(self, number: int, deadline: float) -> list[str]:
        """On rank 0: post `number` of the current call, as soon as it is there, and those after it that have
        come too. Empty at the deadline."""
        text = wait_for(self.store, f"{self._key}/{number}", deadline)
        if text is None:
            return []
        came = self.store.add(f"{self._key}/arrived", 0)
        keys = [f"{self._key}/{n}" for n in range(number + 1, min(came + 1, number + _BATCH))]
        more = self.store.multi_get(keys) if keys and self.store.check(keys) else []
        return [text, *(value.decode() for value in more)]

    def _who_is_missing(self, what: str, timeout_s: float) -> str:
        keys = [f"{self._key}/{n}" for n in range(self.store.add(f"{self._key}/arrived", 0) + 1)]
        came = {json.loads(self.store.get(key))["rank"] for key in keys if self.store.check([key])}
        missing = ", ".join(str(rank) for rank in range(self.world_size) if rank not in came)
        if not missing:
            return f"rank 0 did not answer in '{what}' within {timeout_s:g} s: look at its output"
        return (
            f"rank(s) {missing} of {self.world_size} did not reach '{what}' within {timeout_s:g} s: "
            "start them, look at their output, or lower WORLD_SIZE"
        )


def wait_for(store: dist.Store, key: str, deadline: float) -> str | None:
    """The key's value as soon as it is set; None if it is not by the monotonic time `deadline`."""
    while True:
        left_s = min(WAIT_S, deadline - time.monotonic())
        try:
            store.wait([key], timedelta(seconds=max(0.001, left_s)))
            return store.get(key).decode()
        except dist.DistStoreError:  # not yet
            if time.monotonic() >= deadline:
                return None


def compare(world: "World", what: str, values: dict[str, Any], cure: str, timeout_s: float) -> None:
    """UserError, on every rank, if a value (anything JSON holds, on no device) differs between ranks.

    The message names the value, the machine, and `cure`. UserError too if a value is a tensor.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            raise UserError(
                f"{name} is a tensor, on {value.device}: compare takes plain values, such as "
                "tensor.tolist(), or a digest of it"
            )

    def conclude(answers: list[Any]) -> None:
        for name in values:
            require_equal(name, [(host, theirs.get(name)) for host, theirs in answers], cure)

    world.store_group.exchange(what, [socket.gethostname(), values], timeout_s, conclude)


def require_equal(name: str, answers: list[tuple[str, Any]], cure: str) -> None:
    """UserError if the values in `answers`, (machine, value) pairs in rank order, are not all equal."""
    first_host, first = answers[0]
    for rank, (host, value) in enumerate(answers):
        if value != first:
            raise UserError(
                f"{name} is {value!r} for rank {rank} on {host}, but {first!r} for rank 0 on "
                f"{first_host}: {cure}"
            )


def broadcast_result(world: "World", what: str, make: Callable[[], Any], timeout_s: float) -> Any:
    """Calls `make()` on rank 0 only and returns its result (anything JSON holds) on every rank.

    A UserError of rank 0 is raised on every rank.
    """
    with world.store_group.publishing_errors():
        value = make() if world.rank == 0 else None
    return world.store_group.broadcast(what, value, timeout_s)


def all_gather_results(world: "World", what: str, make: Callable[[], Any], timeout_s: float) -> list[Any]:
    """Calls `make()` on each rank; returns all results (anything JSON holds) in rank order, on every rank.

    A UserError of any rank is raised on every rank, with the rank and machine it came from.
    """
    with world.store_group.publishing_errors():
        value = make()
    return world.store_group.exchange(what, value, timeout_s)
