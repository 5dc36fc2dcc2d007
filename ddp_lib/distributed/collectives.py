"""What ranks tell each other over the process group: bytes, and in each step whether to stop or to save."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ddp_lib.distributed.world import World


def broadcast_bytes(world: World, payload: bytes, source: int = 0) -> bytes:
    """Rank `source`'s `payload`, on every rank; the other ranks' argument is ignored."""
    if world.world_size == 1:
        return payload
    length = torch.tensor([len(payload)], device=world.device)
    dist.broadcast(length, source)
    data = torch.empty(int(length.item()), dtype=torch.uint8, device=world.device)
    if world.rank == source and payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, source)
    return data.cpu().numpy().tobytes()


def gather_bytes(world: World, payload: bytes) -> list[bytes]:
    """Every rank's `payload`, of any length, in rank order on rank 0; an empty list on the others."""
    if world.world_size == 1:
        return [payload]
    mine = torch.tensor([len(payload)], device=world.device)
    lengths = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(lengths, mine)
    sizes = [int(length.item()) for length in lengths]
    # All ranks' tensors must have the same size.
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=world.device)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    pieces = [torch.empty_like(padded) for _ in sizes] if world.is_main else None
    if len(padded):
        dist.gather(padded, pieces)
    return [piece[:size].cpu().numpy().tobytes() for piece, size in zip(pieces or [], sizes, strict=False)]


class Status(NamedTuple):
    """What the ranks tell each other in a step; valid once `work` is done.

    flags: int64 (3,) on the device: the highest rank, from 1, whose loss is not finite (0: none); the highest
    signal that asked a rank to stop (0: none); whether rank 0 wants a checkpoint (0 or 1).
    """

    flags: torch.Tensor
    work: dist.Work | None


def all_reduce_status(loss: torch.Tensor, signal: int, save: bool, world: World) -> Status:
    """Starts the all-reduce of a step's `Status`. Call it before backward: the two then overlap.

    loss: this rank's. signal: the number of the signal that this rank received, or 0.
    """
    flags = torch.tensor([world.rank + 1, signal, save and world.rank == 0])
    flags = flags.to(world.device, non_blocking=True)
    flags[0] *= ~torch.isfinite(loss)
    work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True) if world.world_size > 1 else None
    return Status(flags, work)
