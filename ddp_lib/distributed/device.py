"""What this machine can offer a rank: threads, and memory that stays."""

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from ddp_lib.errors import UserError


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


def require_threads(environ: Mapping[str, str]) -> None:
    """UserError if OMP_NUM_THREADS is set, but is no number of threads: OpenMP would print a warning in each
    process, or start as many as it says."""
    text = environ.get("OMP_NUM_THREADS", "").strip()
    if text and not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", text, re.ASCII):
        raise UserError(
            f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']!r} is no number of threads: give 1 to 999, or "
            "unset it to have it chosen"
        )


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
