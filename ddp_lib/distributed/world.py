"""World: which rank this process is, on which device; it joins and leaves the process group."""

import faulthandler
import gc
import itertools
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

# Functions there take the group of the moment of the import as a default argument. Imported later, as
# DDP does for its first model, they would keep the group's threads alive after `leave`.
import torch.distributed.nn.functional

from ddp_lib.distributed.addresses import name_interface
from ddp_lib.distributed.coordination import exchange, share, tell_all
from ddp_lib.distributed.device import choose_backend, pick_device, thread_budget
from ddp_lib.distributed.environment import read_place
from ddp_lib.distributed.handshake import compare, meet
from ddp_lib.distributed.store import open_store
from ddp_lib.errors import UserError, first_line

Log = Callable[[str], None]


@dataclass(frozen=True)
class World:
    """This process among the ranks. `World()` is a world of one, without a process group.

    with World.join() as world:
        ...   # world.rank, world.world_size, world.device
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    device: torch.device = field(default_factory=lambda: pick_device("none", 0))
    backend: str = "none"
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    timeout_s: float = field(default=120.0, repr=False, compare=False)
    # Numbers the meetings at the store, so that a second training in one world finds no old answers.
    _meetings: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes checkpoints and the summary."""
        return self.rank == 0

    @classmethod
    def join(
        cls,
        *,
        backend: str = "auto",
        join_timeout_s: float = 60.0,
        timeout_s: float = 120.0,
        environ: Mapping[str, str] | None = None,
        log: Log | None = None,
        **flags: int | str | None,
    ) -> "World":
        """Joins the process group that flags or environment describe (see `read_place`).

        join_timeout_s: how long to wait for the master and for the other ranks, seconds.
        timeout_s: how long a collective waits for the slowest rank, seconds.
        log: called with one line that says what was chosen, and why. Default: rank 0 prints it.
        Raises UserError where the environment is inconsistent or the ranks do not come together.
        """
        env = os.environ if environ is None else environ
        place = read_place(env, **flags)
        started = time.monotonic()
        if "OMP_NUM_THREADS" not in env:
            torch.set_num_threads(thread_budget(place.local_world_size))
        possible, reason = choose_backend(
            backend, place.local_world_size, torch.cuda.device_count()
        )
        store = None
        if place.world_size == 1:
            chosen = "none"
        else:
            name_interface(place.endpoint, place.one_machine)
            store = open_store(place, env, join_timeout_s)
            store.add("came", 1)
            try:
                deadline = started + join_timeout_s
                chosen, reason = meet(store, place, possible, reason, deadline, join_timeout_s)
            except UserError as error:
                tell_all(store, error, place.rank == 0)
                raise
        device = pick_device(chosen, place.local_rank)
        world = cls(
            place.rank, place.world_size, place.local_rank, place.local_world_size, place.node,
            device, chosen, store, timeout_s,
        )  # fmt: skip
        if store is not None:
            world._init_process_group(store)
        if log is not None or world.is_main:
            how = "no process group" if store is None else f"backend {chosen} ({reason})"
            (log or world.say)(
                f"{world.world_size} rank(s); rank {world.rank} on {socket.gethostname()}: {how}, "
                f"device {device}, {torch.get_num_threads()} thread(s), place from {place.source}, "
                f"joined in {time.monotonic() - started:.1f} s"
            )
        return world

    def _init_process_group(self, store: dist.Store) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore("group", store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout_s),
                device_id=self.device if self.device.type == "cuda" else None,
            )
            # A rank that ends at once must not be gone before its peers have connected.
            dist.barrier()
        except (RuntimeError, ValueError) as error:
            self.leave()
            raise UserError(
                f"rank {self.rank} reached the master, but the ranks could not connect to each other "
                f"({first_line(error)}): open all ports between the machines, and set "
                "GLOO_SOCKET_IFNAME to the interface that joins them"
            ) from error

    def say(self, text: str, every_node: bool = False) -> None:
        """Prints a line of rank 0, or of each machine's first rank."""
        if self.is_main or (every_node and self.local_rank == 0):
            print(f"[rank {self.rank}] {text}", flush=True)

    def describe(self) -> dict[str, Any]:
        """Place, host and device, as plain values for logs."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "local_rank": self.local_rank,
            "node": self.node,
            "host": socket.gethostname(),
            "backend": self.backend,
            "device": str(self.device),
        }

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all ranks, in place, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def compare(self, what: str, values: dict[str, Any], cure: str, timeout_s: float) -> None:
        """UserError, on every rank, where a value (anything JSON holds) differs between ranks.

        It names the value, the machine, and `cure`.
        """
        if self.store is None:
            return
        card = json.dumps([socket.gethostname(), values])
        place, deadline = f"{what}/{next(self._meetings)}", time.monotonic() + timeout_s
        texts = exchange(self.store, place, self.rank, self.world_size, card, deadline, timeout_s)
        cards = [json.loads(text) for text in texts]
        for name in values:
            compare(name, [(host, theirs.get(name)) for host, theirs in cards], cure)

    def from_main(self, what: str, make: Callable[[], Any], timeout_s: float) -> Any:
        """What `make()` returns on rank 0 (anything JSON holds), on every rank; called there only.

        A UserError of rank 0 is raised on every rank, so that none waits for a master that left.
        """
        answer = None
        if self.is_main:
            try:
                answer = {"value": make()}
            except UserError as error:
                answer = {"error": str(error)}
        if self.store is not None:
            place = f"{what}/{next(self._meetings)}"
            text = share(self.store, place, json.dumps(answer) if self.is_main else None, timeout_s)
            answer = json.loads(text)
        assert answer is not None
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def from_all(self, what: str, make: Callable[[], Any], timeout_s: float) -> list[Any]:
        """What `make()` returns on each rank (anything JSON holds), in rank order, on every rank.

        A UserError of any rank is raised on every rank, with the name of the machine it came from.
        """
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": str(error), "host": socket.gethostname()}
        answers = [answer]
        if self.store is not None:
            deadline = time.monotonic() + timeout_s
            place = f"{what}/{next(self._meetings)}"
            texts = exchange(
                self.store,
                place,
                self.rank,
                self.world_size,
                json.dumps(answer),
                deadline,
                timeout_s,
            )
            answers = [json.loads(text) for text in texts]
        for one in answers:
            if "error" in one:
                where = "" if one == answer else f"{one['host']}: "
                raise UserError(where + one["error"])
        return [one["value"] for one in answers]

    def leave(self) -> None:
        """Leaves the process group; safe to call twice.

        A DistributedDataParallel model that still lives would keep gloo's threads, which may free their
        last all-reduce while the interpreter goes down, and abort it: so garbage first, then the group.
        Groups that never end are known (PyTorch's issue 75097): after twice timeout_s, by when the last
        collective has given up, the process prints where it stands, and ends with status 1.
        """
        if self.world_size == 1 or not dist.is_initialized():
            return
        # By a thread of C's: what is stuck may hold Python's lock.
        faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=2)
        try:
            gc.collect()
            dist.destroy_process_group()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The frames of an error hold the model too.
        told = error
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        self.leave()
        if self.store is not None and isinstance(told, UserError):
            tell_all(self.store, told, self.is_main)
