"""Threads and memory of a rank."""

import os
import platform
import resource

import pytest
import torch

from ddp_lib.distributed.device import keep_freed_memory, thread_budget, usable_cores
from ddp_lib.notebook.run_ranks import run_ranks
from tests.lab.joining import TIMEOUT_S


def test_ranks_divide_the_cores():
    cores = usable_cores()
    assert thread_budget(1) == cores
    assert thread_budget(10 * cores) == 1


V2 = {"proc/self/cgroup": "0::/pod/box\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/x\n"}
UP, DOWN = "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/pod/box/cpu.max"
OF_V1 = "sys/fs/cgroup/cpu/{}cpu.cfs_{}_us"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),  # not Linux
        (V2, 64),
        (V2 | {DOWN: "max 100000\n"}, 64),
        (V2 | {DOWN: "250000 100000\n"}, 2),
        (V2 | {DOWN: "50000 100000\n"}, 1),
        (V2 | {DOWN: "max 100000\n", "sys/fs/cgroup/pod/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", UP: "800000 100000\n"}, 8),  # a container of its own
        (V2 | {UP: "9900000 100000\n"}, 64),  # more than there are
        (V2 | {DOWN: "nonsense"}, 64),
        (V1 | {OF_V1.format("docker/1f/", "quota"): "-1", OF_V1.format("docker/1f/", "period"): "1"}, 64),
        (V1 | {OF_V1.format("", "quota"): "400000", OF_V1.format("", "period"): "100000"}, 4),
        (V1 | {OF_V1.format("docker/1f/", "quota"): "150", OF_V1.format("docker/1f/", "period"): "50"}, 3),
    ],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


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
