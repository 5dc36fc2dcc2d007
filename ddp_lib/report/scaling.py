"""What a training step costs on more ranks: the alpha-beta model of an all-reduce, and buckets that
travel while backward runs.

alpha-beta (Hockney, 1994): a message takes a fixed time, and a time a byte. Ring all-reduce
(Patarasuk and Yuan, 2009): 2 (n - 1) messages one after the other, each an n-th of the tensor.
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

DEFAULT_BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb


@dataclass(frozen=True)
class Link:
    """The way between two neighbours. latency_s: alpha, seconds a message; bytes_per_s: 1 / beta."""

    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of `nbytes` bytes; 0 for one rank."""
        messages = 2 * (ranks - 1)
        return messages * (self.latency_s + nbytes / ranks / self.bytes_per_s)


@dataclass(frozen=True)
class Step:
    """A rank's step, without what it waits for. Seconds and bytes.

    compute_s: forward, backward and optimizer; backward_s: the part of it that is the (last)
    backward, during which gradients can travel; gradient_bytes: all gradients together.
    """

    compute_s: float
    backward_s: float
    gradient_bytes: int
    bucket_bytes: int = DEFAULT_BUCKET_BYTES

    def shared(self, ranks: int) -> "Step":
        """This step's batch divided among the ranks; the time is taken to shrink alike."""
        return replace(self, compute_s=self.compute_s / ranks, backward_s=self.backward_s / ranks)

    def accumulated(self, parts: int) -> "Step":
        """`parts` times the batch in one step, gradients sent once (`no_sync`)."""
        return replace(self, compute_s=self.compute_s * parts)


def predict_step_s(step: Step, link: Link, ranks: int, overlap: bool = True) -> float:
    """Seconds of the step on `ranks` ranks.

    Gradients are taken to come evenly over backward; a bucket is sent as soon as it is full and the
    one before it has arrived. Without `overlap`, all are sent after backward.
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
    """Images/s on `ranks` ranks over `ranks` times one rank's, each with the same batch: 0 to 1."""
    return step.compute_s / predict_step_s(step, link, ranks)


def fit_link(runs: Mapping[int, Sequence[float]], ranks: int) -> Link:
    """The link whose ring all-reduce comes nearest to what was measured: bytes -> seconds, one a run.

    Least squares of the *relative* errors of each size's median, so that small tensors count as much
    as large ones, and a run that another program disturbed counts for nothing.
    UserError for fewer than two sizes, one rank, or times that do not grow with the size.
    """
    if ranks < 2 or len(runs) < 2:
        raise UserError(
            f"{len(runs)} size(s) on {ranks} rank(s) fix no line: measure 2 or more on 2 or more"
        )
    sizes = torch.tensor(list(runs), dtype=torch.float64)
    medians = [statistics.median(times) for times in runs.values()]
    times = torch.tensor(medians, dtype=torch.float64)
    messages = 2 * (ranks - 1)
    columns = messages * torch.stack([torch.ones_like(sizes), sizes / ranks], dim=1)
    weighted = columns / times[:, None]
    goal = torch.ones(len(sizes), 1, dtype=torch.float64)
    alpha, beta = torch.linalg.lstsq(weighted, goal).solution[:, 0].tolist()
    if alpha < 0:  # nothing travels in less than no time: the line through zero
        slope = weighted[:, 1:]
        alpha, beta = 0.0, (torch.linalg.lstsq(slope, goal).solution).item()
    if beta <= 0:
        raise UserError(
            f"all-reduces of {min(runs)} to {max(runs)} bytes take the same time: "
            "measure larger tensors"
        )
    return Link(alpha, 1 / beta)


def measure_all_reduce(
    world: World, sizes: Sequence[int], repeats: int = 7
) -> dict[int, list[float]]:
    """Seconds of float32 all-reduces, bytes -> one time a repeat, the slowest rank's, on every rank.

    The sizes take turns, so that a slow while falls on all of them. The first of each size, which
    allocates, is not counted. Needs 2 or more ranks.
    """
    tensors = {size: torch.ones(max(1, size // 4), device=world.device) for size in sizes}
    runs: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats + 1):
        for size, tensor in tensors.items():
            dist.barrier()
            _finish(world)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            _finish(world)
            runs[size].append(time.perf_counter() - began)
            tensor.fill_(1.0)
    slowest = torch.tensor(list(runs.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(runs, slowest[:, 1:].tolist(), strict=True))


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
