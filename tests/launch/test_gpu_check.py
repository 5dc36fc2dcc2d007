"""ddp-launch check --gpus: what it says of machines with GPUs, and on CPUs."""

import sys

import pytest

from ddp_lib.launch.gpu_check import lines
from tests.lab.processes import HOST, end, start_piped


def rank(host: str, node: int, gpus: bool = True, **more) -> dict:
    facts = {"driver": "570.86.15", "CUDA": "12.8", "NCCL": "2.28.9", "peers": [True], "device": "H100"}
    if not gpus:
        facts |= {"driver": "", "CUDA": "", "NCCL": "", "peers": [], "device": "CPU"}
    return {"host": host, "node": node, "shm": 8 << 30, "infiniband": ["mlx5_0"], **facts, **more}


def test_machines_with_gpus_have_a_line_each_and_one_per_rate():
    ranks = [rank("a", 0), rank("a", 0), rank("b", 1, infiniband=[]), rank("b", 1, infiniband=[])]
    among = "all 4 ranks", "the 2 ranks of a", "the 2 ranks of b", "one rank of each machine"
    rates = [{among[0]: 9e9, among[1]: 200e9, among[3]: 10e9}, {among[0]: 8e9, among[1]: 210e9}]
    rates += [{among[0]: 9e9, among[2]: 190e9, among[3]: 11e9}, {among[0]: 9e9, among[2]: 195e9}]
    facts = "2 x H100; driver 570.86.15; CUDA 12.8; NCCL 2.28.9; peer access yes; /dev/shm 8,192 MiB free"
    assert lines(ranks, rates) == [
        f"a: {facts}; InfiniBand mlx5_0",
        f"b: {facts}; InfiniBand none",
        "NCCL, all-reduce among all 4 ranks: 8.00 GB/s per link",
        "NCCL, all-reduce among the 2 ranks of a: 200.00 GB/s per link",
        "NCCL, all-reduce among one rank of each machine: 10.00 GB/s per link",
        "NCCL, all-reduce among the 2 ranks of b: 190.00 GB/s per link",
    ]


@pytest.mark.parametrize(
    ("ranks", "last"),
    [
        ([rank("a", 0, gpus=False)] * 2, "not tested: NCCL (the ranks are on CPUs)"),
        ([rank("a", 0)], "not tested: NCCL between ranks (there is one)"),
        ([rank("a", 0, peers=[False], shm=64 << 20)] * 2, "a has little room in /dev/shm"),
    ],
)
def test_what_was_not_tested_or_is_wrong_is_said_last(ranks, last):
    assert lines(ranks, [{}] * len(ranks))[-1].startswith(last)


@pytest.mark.ranks
def test_on_cpus_gloo_is_measured(monkeypatch, tmp_path, started):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "ddp_lib.launch", "check", "--gpus", "--nproc-per-node=2"]
    started.append(start_piped(command, tmp_path))
    status, out, err = end(started[0])
    assert (status, err) == (0, []), err
    assert f"{HOST}: 2 x CPU; " in out and "gloo, all-reduce among all 2 ranks: " in out
    assert out.splitlines()[-1] == "not tested: NCCL (the ranks are on CPUs)"
