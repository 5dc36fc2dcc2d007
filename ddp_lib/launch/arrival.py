"""torch's rendezvous, with heartbeats that count from their arrival here and not by other machines' clocks.

torch's rendezvous writes the time of each machine's last heartbeat into a state that all share, and takes a
machine for dead whose heartbeat is 15 s old by the reader's clock. If the clocks of two machines differ by
more, each is dead for the other: the master trains alone.
"""

import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token


class ArrivalTimes(RendezvousBackend):
    """Another backend, whose state shows each time of another machine's clock as the time at which it was
    first seen here. What this machine writes shows the others' times unchanged.

    last_call: how long after it was first seen a joining phase ends, if another machine has set its end.
    """

    def __init__(self, backend: RendezvousBackend, last_call: timedelta) -> None:
        self._backend, self._last_call = backend, last_call
        self._sent: dict[Any, datetime] = {}  # by node (None: the end of the joining phase), as written
        self._seen: dict[Any, datetime] = {}  # when that was first seen here, by this machine's clock

    @property
    def name(self) -> str:
        return self._backend.name

    def get_state(self) -> tuple[bytes, Token] | None:
        got = self._backend.get_state()
        return got and (self._as_seen(got[0]), got[1])

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        done = self._backend.set_state(self._as_sent(state), token)
        return done and (self._as_seen(done[0]), *done[1:])

    def _as_seen(self, text: bytes) -> bytes:
        state, now = pickle.loads(text), datetime.now(UTC)
        for node, sent in state.last_heartbeats.items():
            state.last_heartbeats[node] = self._note(node, sent, now)
        if state.deadline is not None:
            state.deadline = self._note(None, state.deadline, now + self._last_call)
        return pickle.dumps(state)

    def _note(self, key: Any, sent: datetime, seen: datetime) -> datetime:
        if self._sent.get(key) != sent:
            self._sent[key], self._seen[key] = sent, seen
        return self._seen[key]

    def _as_sent(self, text: bytes) -> bytes:
        state = pickle.loads(text)
        for node, time in state.last_heartbeats.items():
            state.last_heartbeats[node] = self._restored(node, time)
        if state.deadline is not None:
            state.deadline = self._restored(None, state.deadline)
        return pickle.dumps(state)

    def _restored(self, key: Any, time: datetime) -> datetime:
        """What was written, unless this machine has just changed it."""
        return self._sent[key] if self._seen.get(key) == time else time
