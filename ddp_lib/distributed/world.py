"""World: which rank this process is, on which device; it joins and leaves the process group."""

import faulthandler
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the process group at the time of the import as a default argument. If DDP imported it
# with its first model, they would keep the group's threads alive after `leave`.
import torch.distributed.nn.functional

from ddp_lib.distributed.addresses import own_addresses
from ddp_lib.distributed.device import thread_budget
from ddp_lib.distributed.environment import RankEnv, read_rank_env, seconds_of
from ddp_lib.distributed.handshake import handshake, versions
from ddp_lib.distributed.placement import first_device, look, place, require_device
from ddp_lib.distributed.store import open_store
from ddp_lib.distributed.store_group import StoreGroup
from ddp_lib.errors import (
    TransientError,
    UserError,
    first_line,
    gpu_cause,
    is_peer_gone,
    is_timeout,
    limit_reached,
    require_seconds,
)


@dataclass(frozen=True)
class World(RankEnv):
    """This process among the ranks, on its device. `World()` is a single rank without a process group;
    `World.join()` gives a single rank a group of its own, which DistributedDataParallel asks for.

    with World.join() as world:
        ...   # world.rank, world.world_size, world.device
    """

    device: torch.device = field(default_factory=first_device)
    backend: str = "none"
    store_group: StoreGroup = field(default_factory=StoreGroup, repr=False, compare=False)
    timeout_s: float = field(default=120.0, repr=False, compare=False)
    versions: dict[str, str] = field(default_factory=versions, repr=False, compare=False)
    group_of_one: bool = field(default=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, on the master. (`Checkpoint.is_writer`: one rank per disk.)"""
        return self.rank == 0

    @property
    def store(self) -> dist.Store:
        """The key-value store at the master; this process's own if the world size is 1."""
        return self.store_group.store

    @classmethod
    def join(
        cls,
        *,
        backend: str = "auto",
        join_timeout_s: float = 60.0,
        timeout_s: float | None = None,
        environ: Mapping[str, str] | None = None,
        log: Callable[[str], None] | None = None,
        **flags: int | str | None,
    ) -> "World":
        """Joins the process group that flags or environment describe (see `read_rank_env`).

        backend: auto, nccl, or gloo, which keeps this rank on the CPU, also where there are GPUs.
        join_timeout_s: how long to wait for the master and for the other ranks, seconds.
        timeout_s: how long a collective waits for the slowest rank, seconds; default: what ddp-launch run
        was given as --timeout-s, else 120.
        log: called with one line that says what was chosen, and why. Default: rank 0 prints it.
        Raises UserError if the environment is inconsistent, ranks do not come, or not all that need a GPU
        have one (see `place`).
        """
        env = os.environ if environ is None else environ
        rank_env = read_rank_env(env, **flags)
        started = time.monotonic()
        if timeout_s is None:
            timeout_s = seconds_of(env, "DDP_LIB_TIMEOUT_S", 120.0)
        require_seconds("timeout_s", timeout_s)
        require_seconds("join_timeout_s", join_timeout_s)
        if "OMP_NUM_THREADS" not in env:
            torch.set_num_threads(thread_budget(rank_env.local_world_size))
        seen = look(rank_env, backend, env)
        if rank_env.world_size == 1:
            group, own, how = StoreGroup(), place([seen])[0], "alone"
        else:
            try:
                group = open_store(rank_env, env, join_timeout_s)
                deadline = started + join_timeout_s
                with group.publishing_errors():
                    own = handshake(group, rank_env, seen, join_timeout_s, deadline)
            except TransientError as error:
                if rank_env.hint:
                    raise TransientError(f"{error}{rank_env.hint}") from None
                raise
            how = f"backend {own.backend} ({own.why})"
        numbers = {"local_rank": own.local_rank, "local_world_size": own.local_world_size}
        world = cls(
            **{**vars(rank_env), **numbers},
            device=torch.device(own.device),
            backend=own.backend,
            store_group=group,
            timeout_s=timeout_s,
            group_of_one=rank_env.world_size == 1 and not dist.is_initialized(),
        )
        if world.world_size > 1:
            world._init_process_group()
        elif world.group_of_one:
            world._init_group_of_one()
        if log is not None or world.is_main:
            (log or world.say)(
                f"{world.world_size} rank(s); rank {world.rank} on {socket.gethostname()}: {how}, "
                f"device {world.device}, {torch.get_num_threads()} thread(s), "
                f"rank from {world.source}, joined in {time.monotonic() - started:.1f} s"
            )
        return world

    def _init_process_group(self) -> None:
        gpu = self.device if self.device.type == "cuda" else None
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            dist.init_process_group(
                # NCCL serves no tensors on the CPU.
                "cpu:gloo,cuda:nccl" if self.backend == "nccl" else self.backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout_s),
                device_id=gpu,
            )
            # No rank may exit before its peers have connected to it.
            dist.barrier()
        except (RuntimeError, ValueError) as error:
            self.leave()
            if limit := limit_reached(error):
                raise TransientError(limit) from error
            kind = TransientError if is_peer_gone(error) or is_timeout(error) else UserError
            told = gpu_cause(str(error))
            what = "NCCL could not start" if told else "the ranks could not connect to each other"
            cause, cure = told or (
                first_line(error),
                "open all ports between the machines, and set GLOO_SOCKET_IFNAME to the interface that joins "
                "them",
            )
            raise kind(f"rank {self.rank} reached the master, but {what} ({cause}): {cure}") from error

    def _init_group_of_one(self) -> None:
        """Nothing here needs it, so if it cannot be made, this rank goes on without it."""
        with_gpu = self.device.type == "cuda" and dist.is_nccl_available()
        named = os.environ.get("GLOO_SOCKET_IFNAME")
        if loopback := own_addresses().get("127.0.0.1"):  # else gloo looks up the machine's own name
            os.environ["GLOO_SOCKET_IFNAME"] = loopback
        try:
            backend = "cpu:gloo,cuda:nccl" if with_gpu else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        except (RuntimeError, ValueError):
            pass
        finally:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
            if named is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = named

    def say(self, text: str, every_node: bool = False) -> None:
        """Prints a line of rank 0, or of each machine's first rank."""
        if self.is_main or (every_node and self.local_rank == 0):
            # ddp-launch run puts the rank in front of each line itself.
            prefix = "" if "DDP_LIB_PREFIXED" in os.environ else f"[rank {self.rank}] "
            print(f"{prefix}{text}", flush=True)

    def describe(self) -> dict[str, Any]:
        """Rank, host and device, as plain values for logs."""
        numbers = dict(rank=self.rank, world_size=self.world_size, local_rank=self.local_rank, node=self.node)
        return numbers | dict(host=socket.gethostname(), backend=self.backend, device=str(self.device))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over all ranks, in place, on every rank. Devices and UserError as in `reduce`."""
        return self.reduce(values, dist.ReduceOp.SUM)

    def reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """`values` of all ranks combined by `op`, in place, on every rank.

        values: on this rank's device or on the CPU, also if other ranks' are not: they are combined on the
        ranks' devices. (In a group for both, a tensor on the CPU would go to gloo, and wait there for ranks
        that went to NCCL.) UserError if they are on any other device.
        """
        if values.device.type != "cpu":
            require_device("the tensor", [values], self.device)
        if self.world_size > 1:
            here = values.to(self.device)
            dist.all_reduce(here, op)
            if here is not values:
                values.copy_(here)
        return values

    def max(self, number: int) -> int:
        """The largest of all ranks' numbers, on every rank, such as a signal that one of them received."""
        return int(self.reduce(torch.tensor(number, device=self.device), dist.ReduceOp.MAX).item())

    def leave(self) -> None:
        """Leaves the process group; safe to call twice.

        Collects garbage first: a DistributedDataParallel model that is still alive keeps gloo's threads, and
        they may abort the process if they free their last all-reduce during shutdown. Destroying the group
        may hang (PyTorch issue 75097). After twice timeout_s, when the last collective has timed out, the
        process prints a traceback and exits with status 1.
        """
        if not (self.world_size > 1 or self.group_of_one) or not dist.is_initialized():
            return
        # Runs in a C thread: the stuck code may hold the GIL.
        faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=2)
        try:
            gc.collect()
            dist.destroy_process_group()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Published before leaving the group: leaving may hang while the others wait for this rank.
        if self.world_size > 1 and isinstance(error, UserError):
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=2)  # as in `leave`
            self.store_group.publish_error(error)
        # An error's frames also keep the model alive.
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        self.leave()
