"""What ranks tell each other: bytes over the process group, and words over the store.

Bytes travel as tensors, without pickle.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from ddp_lib.distributed.addresses import first_hit
from ddp_lib.errors import UserError

if TYPE_CHECKING:
    from ddp_lib.distributed.world import World


def broadcast_bytes(world: "World", payload: bytes, source: int = 0) -> bytes:
    """Rank `source`'s `payload`, on every rank; the others' argument is not looked at."""
    if world.world_size == 1:
        return payload
    length = torch.tensor([len(payload)], device=world.device)
    dist.broadcast(length, source)
    data = torch.empty(int(length.item()), dtype=torch.uint8, device=world.device)
    if world.rank == source and payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, source)
    return data.cpu().numpy().tobytes()


class Status(NamedTuple):
    """What the ranks tell each other in a step: on its way until `work` is done.

    flags: int64 (3,) on the device: the highest rank, from 1, with a loss that is not finite (0: none);
    the highest signal that asked a rank to stop (0: none); whether rank 0 wants a checkpoint (0 or 1).
    """

    flags: torch.Tensor
    work: dist.Work | None


def all_reduce_status(loss: torch.Tensor, signal: int, save: bool, world: "World") -> Status:
    """Starts the all-reduce of a step's `Status`. Called before backward, it hides behind backward's.

    loss: this rank's. signal: the number of a signal that this rank has had, or 0.
    """
    flags = torch.tensor([world.rank + 1, signal, save and world.rank == 0])
    flags = flags.to(world.device, non_blocking=True)
    flags[0] *= ~torch.isfinite(loss)
    work = None
    if world.world_size > 1:
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
    return Status(flags, work)


def gather_bytes(world: "World", payload: bytes) -> list[bytes]:
    """On rank 0 every rank's `payload`, in rank order and of any lengths; on the others nothing."""
    if world.world_size == 1:
        return [payload]
    mine = torch.tensor([len(payload)], device=world.device)
    lengths = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(lengths, mine)
    sizes = [int(length.item()) for length in lengths]
    # A collective wants tensors of one size.
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=world.device)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    pieces = [torch.empty_like(padded) for _ in sizes] if world.is_main else None
    if len(padded):
        dist.gather(padded, pieces)
    return [
        piece[:size].cpu().numpy().tobytes()
        for piece, size in zip(pieces or [], sizes, strict=False)
    ]


# How long the host of the store waits, before it leaves with an error, for the others to have read it.
LINGER_S = 3.0


def exchange(
    store: dist.Store,
    what: str,
    rank: int,
    world_size: int,
    value: str,
    deadline: float,
    limit_s: float,
    check: Callable[[int, str], None] = lambda rank, text: None,
) -> list[str]:
    """Every rank's value, in rank order; `check(rank, value)` is called as each arrives.

    Over the store and not a collective: it works before the group stands, and names who is missing.
    A UserError that another rank has told is raised here too.
    """
    store.set(f"{what}/{rank}", value)
    found: dict[int, str] = {}
    pause_s = 0.005
    while len(found) < world_size:
        raise_what_was_told(store)
        for other in range(world_size):
            if other not in found and store.check([f"{what}/{other}"]):
                found[other] = store.get(f"{what}/{other}").decode()
                check(other, found[other])
        if len(found) == world_size:
            break
        if time.monotonic() > deadline:
            missing = ", ".join(str(r) for r in range(world_size) if r not in found)
            raise UserError(
                f"rank(s) {missing} of {world_size} did not reach '{what.partition('/')[0]}' within "
                f"{limit_s:g} s: start them, look at their output, or lower WORLD_SIZE"
            )
        time.sleep(pause_s)
        pause_s = min(0.2, pause_s * 1.5)
    return [found[other] for other in range(world_size)]


def share(store: dist.Store, what: str, value: str | None, timeout_s: float) -> str:
    """The value that one rank gives (the others give None), on every rank."""
    if value is not None:
        store.set(what, value)
        return value

    def is_there() -> bool:
        raise_what_was_told(store)
        return bool(store.check([what]))

    if not first_hit(is_there, time.monotonic() + timeout_s):
        raise UserError(
            f"rank 0 did not give '{what.partition('/')[0]}' within {timeout_s:g} s: look at its output"
        )
    return store.get(what).decode()


class Told(UserError):
    """Another rank's UserError, heard over the store."""


def raise_what_was_told(store: dist.Store) -> None:
    if store.check(["told"]):
        raise Told(store.get("told").decode())


def tell_all(store: dist.Store, error: UserError, hosts: bool) -> None:
    """Before this rank leaves with `error`: all that wait at the store get to know it.

    hosts: the store ends with this process, which waits for the others that came.
    """
    try:
        store.compare_set("told", "", str(error))
        store.add("left", 1)
        if hosts:
            deadline = time.monotonic() + LINGER_S
            first_hit(lambda: store.add("left", 0) >= store.add("came", 0), deadline)
    except RuntimeError:
        return  # the store is gone already
