"""ddp-launch check --gpus: the ranks of a training meet, and measure the all-reduce between their GPUs."""

import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ddp_lib.distributed.world import World
from ddp_lib.processes.exit_status import as_exit_status

# Bytes of an all-reduce: as much as a large gradient on GPUs, less on CPUs. How often it is done.
_GPU_BYTES, _CPU_BYTES, _TIMES = 1 << 28, 1 << 22, 10
# NCCL's ranks of a machine share some MiB each where their GPUs have no access to each other.
_LEAST_SHM = 1 << 28


def run(backend: str, timeout_s: float) -> int:
    """Measures as a rank in this process; returns the exit status."""
    with (
        as_exit_status() as outcome,
        World.join(backend=backend, join_timeout_s=timeout_s, timeout_s=timeout_s) as world,
        outcome.reported_first(world.store_group.published_error, world.store_group.silent_ranks),
    ):
        ranks = world.store_group.exchange("GPUs", describe(world), timeout_s)
        rates = world.store_group.exchange("rates", measure(world, ranks), timeout_s)
        if world.is_main:
            print("\n".join([*lines(ranks, rates)]), flush=True)
    return outcome.status


def describe(world: World) -> dict[str, Any]:
    """What this rank sees, as plain values."""
    driver, infiniband, peers, nccl = "", [], [], ""
    with suppress(OSError, IndexError):  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."
        text = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        driver = next(word for word in text.split() if word[0].isdigit() and "." in word)
    with suppress(OSError):
        infiniband = sorted(path.name for path in Path("/sys/class/infiniband").iterdir())
    name = "CPU"
    if world.device.type == "cuda":
        name, own = torch.cuda.get_device_name(world.device), world.device.index or 0
        others = [n for n in range(torch.cuda.device_count()) if n != own]
        peers = [torch.cuda.can_device_access_peer(own, n) for n in others]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    facts = {"driver": driver, "CUDA": torch.version.cuda or "", "NCCL": nccl}
    where = {"host": socket.gethostname(), "node": world.node, "backend": world.backend, "device": name}
    return {**where, **facts, "peers": peers, "shm": shm, "infiniband": infiniband}


def measure(world: World, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What -> bytes per second and link of an all-reduce, of those in which this rank takes part."""
    machines = by_machine(ranks)
    sets = {f"all {len(ranks)} ranks": [*range(len(ranks))]}
    if len(machines) > 1:
        sets |= {f"the {len(m)} ranks of {ranks[m[0]]['host']}": m for m in machines if len(m) > 1}
        sets["one rank of each machine"] = [members[0] for members in machines]
    rates = {}
    for what, members in sets.items():
        everybody = len(members) == world.world_size
        group = None if everybody else dist.new_group(members)  # all ranks call it
        if world.rank in members and dist.is_initialized():
            rates[what] = _rate(world.device, len(members), group)
    return rates


def by_machine(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each machine."""
    machines: dict[tuple[str, int], list[int]] = {}
    for rank, seen in enumerate(ranks):
        machines.setdefault((seen["host"], seen["node"]), []).append(rank)
    return list(machines.values())


def _rate(device: torch.device, size: int, group: Any) -> float:
    """As nccl-tests' bus bandwidth: what each link carries, whatever the number of ranks."""
    nbytes = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    values = torch.zeros(nbytes // 4, device=device)
    began = 0.0
    for number in range(2 + _TIMES):
        if number == 2:  # the first ones connect the ranks
            _wait(device)
            began = time.perf_counter()
        dist.all_reduce(values, group=group)
    _wait(device)
    seconds = (time.perf_counter() - began) / _TIMES
    return nbytes / seconds * (2 * (size - 1) / size if size > 1 else 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lines(ranks: list[dict[str, Any]], rates: list[dict[str, float]]) -> list[str]:
    """A line per machine, one per rate (the lowest that a rank measured), and what is wrong or not tested."""
    text, troubles = [], []
    for members in by_machine(ranks):
        seen = ranks[members[0]]
        facts = [f"{what} {seen[what]}" for what in ("driver", "CUDA", "NCCL") if seen[what]]
        peers = [access for rank in members for access in ranks[rank]["peers"]]
        if peers:
            facts.append("peer access " + ("yes" if all(peers) else "some" if any(peers) else "no"))
        facts.append(f"/dev/shm {seen['shm'] >> 20:,} MiB free")
        facts.append("InfiniBand " + (", ".join(seen["infiniband"]) or "none"))
        text.append(f"{seen['host']}: {len(members)} x {seen['device']}; {'; '.join(facts)}")
        if len(members) > 1 and seen["shm"] < _LEAST_SHM and not all(peers or [False]):
            troubles.append(
                f"{seen['host']} has little room in /dev/shm, where NCCL's ranks meet: in a container give "
                "--shm-size 1g, in Kubernetes mount an emptyDir with medium: Memory there"
            )
    kind = "NCCL" if ranks[0]["NCCL"] else "gloo"
    if len(ranks) == 1 and rates[0]:
        text, rates = [*text, f"{kind}, all-reduce in a group of one rank: works"], []
    for what in dict.fromkeys(name for of_rank in rates for name in of_rank):
        slowest = min(of_rank[what] for of_rank in rates if what in of_rank)
        text.append(f"{kind}, all-reduce among {what}: {slowest / 1e9:.2f} GB/s per link")
    if kind != "NCCL":
        troubles.append("not tested: NCCL (the ranks are on CPUs)")
    elif len(ranks) == 1:
        troubles.append("not tested: NCCL between ranks (there is one)")
    return [*text, *troubles]
