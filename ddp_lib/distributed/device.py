"""What this machine can offer a rank: threads, a backend, a device."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_lib.errors import UserError

if TYPE_CHECKING:  # loaded only if a device is asked for: the launcher counts cores without it
    import torch


def usable_cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use: of its affinity, and whole ones of its container's quota
    (docker run --cpus), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control group and of those around it (cgroup v2 or v1)."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, names = root / "sys/fs/cgroup", ["cpu.max"]
            elif "cpu" in controllers.split(","):
                top, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            else:
                continue
            # A container may see its own group as the top one, under another path than it has on the host.
            group = top / path.strip("/")
            for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
                with suppress(OSError, ValueError):  # no such group here; "max": no quota
                    quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                    if quota > 0 and period > 0:  # -1: no quota
                        yield quota / period


def thread_budget(local_world_size: int) -> int:
    """Threads per rank: this machine's usable cores divided among its ranks."""
    return max(1, usable_cores() // local_world_size)


def choose_backend(asked: str, local_world_size: int, gpus: int) -> tuple[str, str]:
    """This machine's backend, and why. UserError for nccl without one GPU per local rank."""
    have = f"{gpus} GPU(s) for {local_world_size} local rank(s)"
    if asked not in ("auto", "gloo", "nccl"):
        raise UserError(f"--backend {asked!r} is unknown: use auto, gloo or nccl")
    if asked == "nccl" and gpus < local_world_size:
        raise UserError(
            f"--backend nccl needs one GPU per local rank, and there are {have}: use --backend gloo"
        )
    if asked != "auto":
        return asked, "asked for"
    return ("nccl" if gpus >= local_world_size else "gloo"), have


def pick_device(backend: str, local_rank: int) -> "torch.device":
    """This local rank's GPU for nccl; the first GPU, if any, for a single process; else the CPU."""
    import torch

    if backend == "nccl" or (backend == "none" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def keep_freed_memory() -> bool:
    """Makes this process keep the blocks it frees, up to 1 GB each; False if the C library cannot.

    glibc gives large blocks back to the system at once. A training step on a CPU allocates the same blocks as
    the step before, and the system would clear their pages each time: thousands of page faults per step. See
    mallopt(3); PyTorch's tuning guide suggests another allocator for the same reason.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # An older glibc accepts at most 32 MB.
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (2**30, 2**25))
    return bool(large and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))  # the largest: never
