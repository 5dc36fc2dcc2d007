"""Which backend the ranks use, and which device each: a function of what all of them see."""

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ddp_lib.distributed.coordination import require_equal
from ddp_lib.distributed.environment import RankEnv
from ddp_lib.errors import UserError, first_line


@dataclass(frozen=True)
class Seen:
    """What a rank asks for, and what it sees before the ranks have met.

    machine: equal for all ranks of a machine. gpus: an identity, such as the UUID, of each GPU that torch
    offers this rank, in torch's order. trouble: why there is none, if there is none.
    """

    host: str
    machine: str
    asked: str
    local_rank: int
    local_world_size: int
    gpus: Sequence[str] = ()
    trouble: str = ""


@dataclass(frozen=True)
class Place:
    """A rank's device, the group's backend and why, and the rank's number on its machine."""

    device: str
    backend: str
    why: str
    local_rank: int
    local_world_size: int


def look(rank_env: RankEnv, asked: str, environ: Mapping[str, str]) -> Seen:
    """What this rank sees. Starts CUDA if there are GPUs, and if gloo is not asked for: ranks then compute on
    the CPU."""
    host = socket.gethostname()
    boot = ""  # two machines may have one name
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    machine = f"{host} {boot}"
    gpus, trouble = [], ""
    if asked != "gloo":
        try:
            for number in range(torch.cuda.device_count()):
                gpus.append(
                    str(getattr(torch.cuda.get_device_properties(number), "uuid", f"{machine} {number}"))
                )
            trouble = "" if gpus else why_no_gpu(environ)
        except RuntimeError as error:  # the driver is older than torch, or does not work
            gpus, trouble = [], first_line(error)
    local = rank_env.local_rank, rank_env.local_world_size
    return Seen(host, machine, asked, *local, gpus, trouble)


def why_no_gpu(environ: Mapping[str, str]) -> str:
    """Why torch sees none here."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if name in environ:
            return f"{name}={environ[name]!r}"
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built without CUDA"
    loaded = Path("/proc/driver/nvidia/version").exists()
    return "torch cannot use the NVIDIA driver" if loaded else "no NVIDIA driver is loaded"


def first_device() -> torch.device:
    """That of a single rank."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def require_device(what: str, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """UserError if a tensor of `what` is not on `device`, this rank's."""
    for tensor in tensors:
        if tensor.device != device:
            raise UserError(
                f"{what} is on {tensor.device}, but this rank computes on {device}: move it there first, "
                "with .to(world.device)"
            )


def place(ranks: Sequence[Seen]) -> list[Place]:
    """The place of each rank; ranks: what each sees, in rank order.

    Each takes the first GPU that it sees and no other has taken, in the order of the local ranks: cuda:N for
    local rank N if all see all GPUs, cuda:0 if each is shown one of its own. With nccl, ranks of a machine
    that have the same local rank, as without LOCAL_RANK, are numbered again. A single rank has no group, and
    takes a GPU if there is one. gloo keeps all ranks on the CPU.

    UserError if ranks ask for different backends, if nccl is asked for and a rank has no GPU of its own, or
    if `auto` would move ranks that have a GPU to the CPU because others have none. On one machine with fewer
    GPUs than ranks, as in the course, `auto` is gloo and the CPU.
    """
    asked = ranks[0].asked
    if asked not in ("auto", "gloo", "nccl"):
        raise UserError(f"--backend {asked!r} is unknown: use auto, gloo or nccl")
    require_equal("--backend", [(seen.host, seen.asked) for seen in ranks], "give every machine the same")
    claimed = [(seen.local_rank, seen.local_world_size) for seen in ranks]
    numbered = _number_again(ranks)
    gpus = _divide_gpus(ranks, numbered)
    without = [rank for rank, gpu in enumerate(gpus) if gpu is None]
    lacks = without[0] if without else 0
    have = f"{len(ranks[lacks].gpus)} GPU(s) for {numbered[lacks][1]} local rank(s)"
    one_machine = len({seen.machine for seen in ranks}) == 1
    shared = one_machine and all(seen.gpus for seen in ranks)
    if without and (asked == "nccl" or (asked == "auto" and any(s.gpus for s in ranks) and not shared)):
        raise UserError(_refusal(ranks, without, have))
    if not without and asked != "gloo":
        backend = "none" if len(ranks) == 1 else "nccl"
        own = "each rank is shown a GPU of its own" if len(ranks[0].gpus) < numbered[0][1] else have
        why = "asked for" if asked == "nccl" else own
        return [Place(f"cuda:{gpu}", backend, why, *n) for gpu, n in zip(gpus, numbered, strict=True)]
    backend = "none" if len(ranks) == 1 else "gloo"
    if not ranks[lacks].gpus:
        have = f"0 GPU(s) for {claimed[lacks][1]} local rank(s)"
    why = f"rank {lacks} on {ranks[lacks].host}: {'asked for' if asked == 'gloo' else have}"
    return [Place("cpu", backend, why, *local) for local in claimed]


def _number_again(ranks: Sequence[Seen]) -> list[tuple[int, int]]:
    """Each rank's local rank and number of local ranks, in rank order where two of a machine claim one."""
    machines: dict[str, list[int]] = {}
    for rank, seen in enumerate(ranks):
        machines.setdefault(seen.machine, []).append(rank)
    numbers = [(seen.local_rank, seen.local_world_size) for seen in ranks]
    for here in machines.values():
        if len({ranks[rank].local_rank for rank in here}) < len(here):
            for local_rank, rank in enumerate(here):
                numbers[rank] = (local_rank, len(here))
    return numbers


def _divide_gpus(ranks: Sequence[Seen], numbered: list[tuple[int, int]]) -> list[int | None]:
    """The number, as its rank counts, of each rank's GPU; None if there is none left for it."""
    taken: set[str] = set()
    own: list[int | None] = [None] * len(ranks)
    for rank in sorted(range(len(ranks)), key=lambda rank: numbered[rank]):
        free = (number for number, gpu in enumerate(ranks[rank].gpus) if gpu not in taken)
        own[rank] = next(free, None)
        if (number := own[rank]) is not None:
            taken.add(ranks[rank].gpus[number])
    return own


def _refusal(ranks: Sequence[Seen], without: list[int], have: str) -> str:
    lacks = ranks[without[0]]
    others = [f"rank {r} on {seen.host}" for r, seen in enumerate(ranks) if r not in without]
    return (
        f"--backend {lacks.asked}: rank {without[0]} on {lacks.host} has no GPU of its own (it sees {have}"
        f"{f'; {lacks.trouble}' if lacks.trouble else ''})"
        f"{f', but {others[0]} has one' if others else ''}: make one GPU work there for each rank, start "
        "fewer ranks, or give --backend gloo on every machine, to compute on the CPU"
    )
