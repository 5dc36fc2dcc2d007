"""Predicts the time of a training step on more ranks: the alpha-beta model of an all-reduce, and
buckets that are sent while backward runs.

alpha-beta model (Hockney, 1994): a message takes a fixed time, plus a time per byte. Ring all-reduce
(Patarasuk and Yuan, 2009): 2 (n - 1) messages one after the other, each 1/n of the tensor.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError


@dataclass(frozen=True)
class Link:
    """A link between neighbouring ranks. latency_s: alpha, seconds per message; bytes_per_s: 1 / beta."""

    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        """Seconds that a ring all-reduce of `nbytes` bytes takes; 0 for one rank."""
        return 2 * (ranks - 1) * (self.latency_s + nbytes / ranks / self.bytes_per_s)


@dataclass(frozen=True)
class Step:
    """A rank's training step, without the time that it waits for others. Seconds and bytes."""

    compute_s: float  # forward, backward and optimizer together
    backward_s: float  # the part that is the (last) backward, during which gradients can be sent
    gradient_bytes: int  # all gradients together
    bucket_bytes: int = 25 * 2**20  # DDP's bucket_cap_mb

    def divided(self, ranks: int) -> "Step":
        """This step with its batch divided among `ranks` ranks (strong scaling), its time in proportion."""
        return replace(self, compute_s=self.compute_s / ranks, backward_s=self.backward_s / ranks)

    def accumulated(self, parts: int) -> "Step":
        """A step with `parts` times the batch, whose gradients are sent once (`no_sync`)."""
        return replace(self, compute_s=self.compute_s * parts)


def predict_step_s(step: Step, link: Link, ranks: int, overlap: bool = True) -> float:
    """Seconds that the step takes on `ranks` ranks.

    Gradients are assumed to become ready at a constant rate during backward. A bucket is sent as soon as it
    is full and the bucket before it has arrived. Without `overlap`, all buckets are sent after backward.
    """
    if ranks == 1:
        return step.compute_s
    buckets = max(1, math.ceil(step.gradient_bytes / step.bucket_bytes))
    arrived = 0.0
    for number in range(buckets):
        full = min(1.0, (number + 1) * step.bucket_bytes / step.gradient_bytes)
        size = min(step.bucket_bytes, step.gradient_bytes - number * step.bucket_bytes)
        ready = step.backward_s * (full if overlap else 1.0)
        arrived = max(arrived, ready) + link.all_reduce_s(size, ranks)
    return step.compute_s - step.backward_s + max(step.backward_s, arrived)


def efficiency(step: Step, link: Link, ranks: int) -> float:
    """Images/s of `ranks` ranks, divided by `ranks` times the images/s of one rank: 0 to 1. Each rank has the
    same batch (weak scaling)."""
    return step.compute_s / predict_step_s(step, link, ranks)


def fit_link(runs: Mapping[int, Sequence[float]], ranks: int) -> Link:
    """The link whose ring all-reduce fits the measured times best; `runs` is bytes -> seconds per run.

    Minimises the squares of the *relative* errors of each size's median. So small tensors count as
    much as large ones, and a single run that another program has disturbed does not count.
    UserError for fewer than two sizes, for one rank, or if the times do not grow with the size.
    """
    if ranks < 2 or len(runs) < 2:
        raise UserError(f"{len(runs)} size(s) on {ranks} rank(s) fix no line: measure 2 or more on 2 or more")
    sizes = torch.tensor(list(runs), dtype=torch.float64)
    times = torch.tensor([statistics.median(seconds) for seconds in runs.values()], dtype=torch.float64)
    columns = 2 * (ranks - 1) * torch.stack([torch.ones_like(sizes), sizes / ranks], dim=1)
    relative = columns / times[:, None]
    ones = torch.ones(len(sizes), 1, dtype=torch.float64)
    alpha, beta = torch.linalg.lstsq(relative, ones).solution[:, 0].tolist()
    if alpha < 0:  # a latency cannot be negative: fit a line through zero instead
        alpha, beta = 0.0, torch.linalg.lstsq(relative[:, 1:], ones).solution.item()
    if beta <= 0:
        raise UserError(
            f"all-reduces of {min(runs)} to {max(runs)} bytes take the same time: measure larger tensors"
        )
    return Link(alpha, 1 / beta)


def measure_all_reduce(world: World, sizes: Sequence[int], repeats: int = 7) -> dict[int, list[float]]:
    """Times float32 all-reduces: bytes -> seconds per repeat, those of the slowest rank.

    All ranks call this together and get the same result. The sizes take turns, so that a moment in
    which the machine is busy affects all of them. The first all-reduce of each size, which allocates
    memory, is not counted. Needs 2 or more ranks.
    """
    tensors = {size: torch.ones(max(1, size // 4), device=world.device) for size in sizes}
    runs: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats + 1):
        for size, tensor in tensors.items():
            dist.barrier()
            _synchronize(world)
            start = time.perf_counter()
            dist.all_reduce(tensor)
            _synchronize(world)
            runs[size].append(time.perf_counter() - start)
            tensor.fill_(1.0)
    slowest = torch.tensor(list(runs.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(runs, slowest[:, 1:].tolist(), strict=True))


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
