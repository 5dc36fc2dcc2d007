"""What ranks tell each other over the store: plain values.

Each rank writes its own key in the store. Rank 0 waits for all keys, reads them at once and publishes one
answer; the others wait for that answer, which may be an error. So a rank makes the same few operations
however many ranks there are.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ddp_lib.distributed.addresses import wait_until_true
from ddp_lib.distributed.store_client import WAIT_S, read, unset, wait, wait_for
from ddp_lib.errors import PeerError, TransientError, UserError

# How long the store's host waits for the others to read its error before it exits.
LINGER_S = 3.0
# Of many ranks the pieces of a wait are longer, so that together they make no more per second than this.
_WAITS_PER_S = 1024
# How long a rank that timed out waits for the others to say that they did too.
_SILENT_S = 2.0
# How much longer than its own timeout a rank waits for rank 0 to publish who is missing.
_ANSWER_S = 2.0


@dataclass(frozen=True)
class Own:
    """A conclusion of which each rank gets a part: (common, own[rank])."""

    common: Any
    own: list[Any]


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
        taken: Callable[[Any], UserError] | None = None,
        answered: bool = True,
    ) -> Any:
        """Returns on every rank what `conclude` makes on rank 0 of all ranks' values, in rank order.

        What it makes goes to every rank, so of many ranks it should be short; see also `Own`.

        check(rank, value): called on rank 0 for each value. deadline: monotonic time; default: timeout_s from
        now. complete False: at the deadline rank 0 concludes from the values it has. taken(value): what to
        raise if another process has this rank's number, and has given `value`; without it, the last counts.
        answered False: conclude may only raise; that saves an operation of each rank.

        UserError, on every rank, if conclude or check raise it on rank 0 or a rank publishes an error instead
        of a value. At the deadline, a UserError names the ranks that did not come.
        """
        if deadline is None:
            deadline = time.monotonic() + timeout_s
        other = self._post({"value": value}, once=taken is not None)
        if taken is not None and other is not None:
            raise self._refuse(taken(other["value"]))
        if self.rank != 0:
            return (self._read_answer if answered else self._go_on)(what, timeout_s, deadline + _ANSWER_S)
        try:
            values = {0: json.loads(json.dumps(value)), **self._collect(check, deadline)}
            if complete and len(values) < self.world_size:
                missing = ", ".join(str(rank) for rank in range(self.world_size) if rank not in values)
                raise self._missing(missing, what, timeout_s)
            answer = conclude([values.get(rank) for rank in range(max(values) + 1)])
        except UserError as error:
            self._publish(error)
            raise
        if answered:
            return self._publish_answer(answer)
        self.store.set(f"{self._key}/go on", "")
        self._calls += 1
        return None

    def broadcast(self, what: str, value: Any, timeout_s: float) -> Any:
        """Rank 0's value, on every rank; the others' is ignored. UserError as in `exchange`."""
        if self.rank == 0:
            return self._publish_answer(value)
        return self._read_answer(what, timeout_s, time.monotonic() + timeout_s)

    def _publish_answer(self, answer: Any) -> Any:
        own = answer.own if isinstance(answer, Own) else []
        common = answer.common if isinstance(answer, Own) else answer
        if own:  # first, so that they are there for whoever has read the answer
            keys = [f"{self._key}/own/{rank}" for rank in range(len(own))]
            values = [json.dumps(value) for value in own]
            self.store.multi_set(keys, values)  # type: ignore[attr-defined]  # torch's stubs lack it
        text = json.dumps({"value": common, "own": len(own)})
        self.store.set(f"{self._key}/answer", text)
        self._calls += 1
        common = json.loads(text)["value"]
        return (common, json.loads(json.dumps(own[0]))) if own else common

    def _read_answer(self, what: str, timeout_s: float, deadline: float) -> Any:
        text = wait_for(self.store, f"{self._key}/answer", deadline, self._wait_s)
        if text is None:
            raise self._without_rank_0(what, timeout_s)
        answer = json.loads(text)
        if "error" in answer:
            self.count_as_read()
            raise PeerError(answer["error"], answer["status"])
        own = None
        if self.rank is not None and self.rank < answer["own"]:
            own = json.loads(read(self.store, f"{self._key}/own/{self.rank}"))
        self._calls += 1
        return (answer["value"], own) if answer["own"] else answer["value"]

    def _go_on(self, what: str, timeout_s: float, deadline: float) -> None:
        while not wait(self.store, [f"{self._key}/go on"], min(self._wait_s, deadline - time.monotonic())):
            if error := self.published_error():
                raise error
            if time.monotonic() >= deadline:
                raise self._without_rank_0(what, timeout_s)
        self._calls += 1

    def _collect(self, check: Callable[[int, Any], None], deadline: float) -> dict[int, Any]:
        """On rank 0: the others' values of the current call by rank, as far as they come by the deadline.

        Waits for all keys at once, and reads them at once, so that the usual case takes two operations.
        """
        values: dict[int, Any] = {}
        while len(values) < self.world_size - 1:
            keys = [f"{self._key}/{rank}" for rank in range(1, self.world_size) if rank not in values]
            over = time.monotonic() >= deadline
            if not wait(self.store, keys, min(self._wait_s, deadline - time.monotonic())):
                if error := self.published_error():
                    raise error
                missing = set(unset(self.store, keys))
                keys = [key for key in keys if key not in missing]
            for record in map(json.loads, self.store.multi_get(keys) if keys else []):
                if "error" in record:
                    raise PeerError(record["error"], record["status"])
                check(record["rank"], record["value"])
                values[record["rank"]] = record["value"]
            if over:
                break
        return values

    def _refuse(self, error: UserError) -> UserError:
        """This process has a number that another one has: what to raise, on every rank, unless they have
        gone on without this one."""
        if self.store.check([f"{self._key}/answer"]):
            return PeerError(str(error), error.status)
        self._publish(error)
        return error

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
        keys = [f"timed out/{rank}" for rank in range(self.world_size)]
        answers: list[list[str]] = []

        def ask() -> None:
            with suppress(RuntimeError):
                self.store.set(keys[self.rank or 0], "")
                time.sleep(_SILENT_S)
                answers.append(unset(self.store, keys))

        # If rank 0's machine is silent, the call into C++ does not return.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * _SILENT_S)
        unanswered = answers[0] if answers else keys[:1]
        silent = [f"rank {rank} on {self.hosts[rank]}" for rank, key in enumerate(keys) if key in unanswered]
        if not silent:
            return None
        return TransientError(
            f"{', '.join(silent)} did not come to a collective, and does not answer: hung, frozen, off, or "
            "cut off from the network; the same command goes on from the last checkpoint"
        )

    def wait_until_read(self) -> None:
        """Makes the store's host wait, at most LINGER_S or two waits, until the others have read the last
        answer."""
        until = time.monotonic() + max(LINGER_S, 2 * self._wait_s)
        with suppress(RuntimeError):
            others = [f"call/0/{rank}" for rank in range(1, self.world_size)]
            came = len(others) - len(unset(self.store, others))
            wait_until_true(lambda: self.store.add("read", 0) >= came, until)

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

    def _post(self, record: dict[str, Any], once: bool = False) -> dict[str, Any] | None:
        """Writes this rank's record of the current call. once: not if there is one, which is returned."""
        if self.rank is None:
            self.rank = self.store.add(f"{self._key}/arrived", 1)
        key, text = f"{self._key}/{self.rank}", json.dumps({"rank": self.rank, **record})
        if not once:
            self.store.set(key, text)
        elif (there := self.store.compare_set(key, "", text).decode()) != text:
            return json.loads(there)
        return None

    @property
    def _wait_s(self) -> float:
        return max(WAIT_S, self.world_size / _WAITS_PER_S)

    def _without_rank_0(self, what: str, timeout_s: float) -> UserError:
        if not self.store.check([f"{self._key}/0"]):
            error = self._missing("0", what, timeout_s)
        else:
            text = f"rank 0 did not answer in '{what}' within {timeout_s:g} s: look at its output"
            error = TransientError(text)
        self._publish(error)
        return error

    def _missing(self, ranks: str, what: str, timeout_s: float) -> TransientError:
        return TransientError(
            f"rank(s) {ranks} of {self.world_size} did not reach '{what}' within {timeout_s:g} s: "
            "start them, look at their output, or lower WORLD_SIZE"
        )
