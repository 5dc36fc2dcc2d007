"""Backend, threads and memory of a rank."""

import os
import platform
import resource

import pytest
import torch

from ddp_lib.distributed.device import choose_backend, keep_freed_memory, thread_budget
from ddp_lib.errors import UserError
from ddp_lib.notebook.run_ranks import run_ranks
from tests.lab.joining import TIMEOUT_S


def test_nccl_needs_a_gpu_per_rank():
    assert choose_backend("auto", 2, 0)[0] == "gloo"
    assert choose_backend("auto", 2, 1)[0] == "gloo"  # one GPU, two ranks in a notebook
    assert choose_backend("auto", 2, 2)[0] == "nccl"
    assert choose_backend("gloo", 1, 8)[0] == "gloo"
    with pytest.raises(UserError, match="--backend gloo"):
        choose_backend("nccl", 2, 1)
    with pytest.raises(UserError, match="mpi"):
        choose_backend("mpi", 1, 1)


def test_ranks_divide_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert thread_budget(1) == cores
    assert thread_budget(10 * cores) == 1


def page_faults() -> int:
    """While 4 blocks of 8 MB are allocated, filled and freed, 20 times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(2**23, dtype=torch.uint8) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.ranks
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc: nothing to set")
def test_freed_memory_is_kept():
    def before_and_after() -> tuple[int, int]:
        plain = page_faults()
        assert keep_freed_memory()
        page_faults()
        return plain, page_faults()

    ((plain, kept),) = run_ranks(before_and_after, 1, timeout_s=TIMEOUT_S)
    assert 10 * kept < plain
