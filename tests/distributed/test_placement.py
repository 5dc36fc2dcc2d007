"""Which backend and which GPU, over a table of clusters."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ddp_lib.distributed.environment import RankEnv
from ddp_lib.distributed.placement import Place, Seen, look, place
from ddp_lib.errors import UserError

ALL = None  # CUDA_VISIBLE_DEVICES is not set


def visible(machine: str, gpus: int, variable: str | None) -> list[str]:
    """The GPUs that CUDA shows: all, those with these numbers, or those whose UUIDs begin so."""
    physical = [f"{machine}-GPU-{number}" for number in range(gpus)]
    if variable is ALL:
        return physical
    words = variable.split(",") if variable else []
    if words and words[0].startswith("MIG-"):
        return [f"{machine}-{words[0]}"]  # one slice per process, whatever is named
    return [gpu for word in words for gpu in physical if gpu.endswith(word)]


def machine(
    name: str, gpus: int, *shown: str | None, asked: str = "auto", numbered: bool = True
) -> list[Seen]:
    """A rank for each of `shown`, its CUDA_VISIBLE_DEVICES. numbered: whether it has LOCAL_RANK."""
    return [
        Seen(
            name,
            f"{name} boot",
            asked,
            rank if numbered else 0,
            len(shown) if numbered else 1,
            visible(name, gpus, variable),
            "" if gpus else "no NVIDIA driver is loaded",
        )
        for rank, variable in enumerate(shown)
    ]


# Each: the ranks, the backend, and each rank's device.
CLUSTERS = {
    "alone, no GPU": (machine("a", 0, ALL), "none", "cpu"),
    "alone, 8 GPUs": (machine("a", 8, ALL), "none", "0"),
    "alone, gloo": (machine("a", 1, ALL, asked="gloo"), "none", "cpu"),
    "alone, GPUs hidden": (machine("a", 8, ""), "none", "cpu"),
    "alone, the second GPU": (machine("a", 8, "1"), "none", "0"),
    "no GPU": (machine("a", 0, ALL, ALL) + machine("b", 0, ALL), "gloo", "cpu cpu cpu"),
    "8 and 8": (machine("a", 8, *[ALL] * 8) + machine("b", 8, *[ALL] * 8), "nccl", "0 1 2 3 4 5 6 7 " * 2),
    "1 and 1": (machine("a", 1, ALL) + machine("b", 1, ALL), "nccl", "0 0"),
    "the second of each": (machine("a", 8, "1") + machine("b", 8, "1"), "nccl", "0 0"),
    "more GPUs than ranks": (machine("a", 8, ALL, ALL), "nccl", "0 1"),
    "unequal machines": (machine("a", 8, *[ALL] * 4) + machine("b", 1, ALL), "nccl", "0 1 2 3 0"),
    "one shown per task": (machine("a", 4, "0", "1", "2", "3"), "nccl", "0 0 0 0"),
    "one shown by UUID": (machine("a", 2, "GPU-1", "GPU-0"), "nccl", "0 0"),
    "two shown per task": (machine("a", 4, "0,1", "2,3"), "nccl", "0 0"),
    "one per task, one local rank": (machine("a", 2, "0", "1", numbered=False), "nccl", "0 0"),
    "one per task, all local rank 0": (
        [replace(seen, local_rank=0) for seen in machine("a", 2, "0", "1")], "nccl", "0 0",  # by torchrun
    ),
    "slices of MIG": (machine("a", 1, "MIG-1", "MIG-2"), "nccl", "0 0"),
    "no LOCAL_RANK": (machine("a", 2, ALL, ALL, numbered=False) + machine("b", 1, ALL), "nccl", "0 1 0"),
    "hidden everywhere": (machine("a", 8, "", "") + machine("b", 8, ""), "gloo", "cpu cpu cpu"),
    "a computer of the course": (machine("a", 1, ALL, ALL), "gloo", "cpu cpu"),
    "its rehearsal of two machines": (machine("a", 1, ALL, ALL, numbered=False), "gloo", "cpu cpu"),
    "gloo asked for": (machine("a", 0, ALL, asked="gloo") * 2, "gloo", "cpu cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "backend", "devices"), CLUSTERS.values(), ids=CLUSTERS)
def test_each_rank_has_its_device(ranks, backend, devices):
    places = place(ranks)
    assert {own.backend for own in places} == {backend}
    assert [own.device.removeprefix("cuda:") for own in places] == devices.split()


# Each: the ranks, and words of the line.
REFUSED = {
    "a machine without driver": (
        machine("a", 1, ALL) + machine("b", 0, ALL),
        "--backend auto: rank 1 on b has no GPU of its own (it sees 0 GPU(s) for 1 local rank(s); no NVIDIA "
        "driver is loaded), but rank 0 on a has one",
    ),
    "the master without driver": (machine("a", 0, ALL) + machine("b", 1, ALL), "rank 0 on a has no GPU"),
    "hidden on one": (machine("a", 1, ALL) + machine("b", 1, ""), "rank 1 on b has no GPU"),
    "hidden from one task": (machine("a", 2, "0", ""), "rank 1 on a has no GPU"),
    "too few on one": (machine("a", 2, ALL, ALL) + machine("b", 1, ALL, ALL), "rank 3 on b has no GPU"),
    "too few on both": (machine("a", 1, ALL, ALL) + machine("b", 1, ALL, ALL), "1 GPU(s) for 2 local"),
    "nccl, no GPU": (machine("a", 0, ALL, ALL, asked="nccl"), "--backend nccl: rank 0 on a has no GPU"),
    "nccl, alone": (machine("a", 0, ALL, asked="nccl"), "--backend gloo on every machine"),
    "nccl, one GPU for two": (machine("a", 1, ALL, ALL, asked="nccl"), "rank 1 on a has no GPU of its own"),
    "another backend": (
        machine("a", 1, ALL) + machine("b", 1, ALL, asked="nccl"),
        "--backend is 'nccl' for rank 1 on b, but 'auto' for rank 0 on a: give every machine the same",
    ),
    "an unknown backend": (machine("a", 0, ALL, asked="mpi"), "--backend 'mpi' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(ranks, words):
    with pytest.raises(UserError) as refused:
        place(ranks)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_ranks_without_local_rank_learn_it_only_for_gpus():
    gpus = place(machine("a", 2, ALL, ALL, numbered=False) + machine("b", 1, ALL, numbered=False))
    assert [(own.local_rank, own.local_world_size) for own in gpus] == [(0, 2), (1, 2), (0, 1)]
    (first, second) = place(machine("a", 0, ALL, ALL, numbered=False))
    assert first == second == Place("cpu", "gloo", "rank 0 on a: 0 GPU(s) for 1 local rank(s)", 0, 1)


@pytest.mark.parametrize("asked", ["auto", "gloo"])
def test_what_a_rank_sees(monkeypatch, asked):
    """gloo does not start CUDA."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}")
    )
    seen = look(RankEnv(), asked, {})
    assert list(seen.gpus) == ([] if asked == "gloo" else ["GPU-0", "GPU-1"])


def no_driver(number: int) -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")


@pytest.mark.parametrize(
    ("count", "variable", "trouble"), [(0, "", "CUDA_VISIBLE_DEVICES=''"), (1, "0", "too old")]
)
def test_why_there_is_no_gpu(monkeypatch, count, variable, trouble):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", no_driver)
    seen = look(RankEnv(), "auto", {"CUDA_VISIBLE_DEVICES": variable})
    assert trouble in seen.trouble and not seen.gpus
