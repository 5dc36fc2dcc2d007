"""What this machine can offer a rank: threads, a backend, a device."""

import os

import torch

from ddp_lib.errors import UserError


def thread_budget(local_world_size: int) -> int:
    """Threads a rank: this machine's usable cores shared among its ranks."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // local_world_size)


def choose_backend(asked: str, local_world_size: int, gpus: int) -> tuple[str, str]:
    """The backend this machine can offer, and why. UserError for nccl without a GPU a local rank."""
    have = f"{gpus} GPU(s) for {local_world_size} local rank(s)"
    if asked == "gloo":
        return "gloo", "asked for"
    if asked == "nccl" and gpus < local_world_size:
        raise UserError(
            f"--backend nccl needs a GPU a local rank, and there are {have}: use --backend gloo"
        )
    if asked == "nccl":
        return "nccl", "asked for"
    if asked != "auto":
        raise UserError(f"--backend {asked!r} is unknown: use auto, gloo or nccl")
    return ("nccl" if gpus >= local_world_size else "gloo"), have


def pick_device(backend: str, local_rank: int) -> torch.device:
    """The GPU of this local rank under nccl; alone the first GPU, if any; else the CPU."""
    if backend == "nccl" or (backend == "none" and torch.cuda.is_available()):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
