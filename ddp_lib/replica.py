"""One rank's copy of the model: wrapped in DDP, and kept equal to the others'."""

import hashlib
import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lib.errors import UserError
from ddp_lib.transfer import broadcast_bytes, gather_bytes
from ddp_lib.world import World

# torch 2.15 renames it; 2.11 knows the old name only.
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    name: False for name in ("forward_sync_buffers", "broadcast_buffers") if name in _PARAMETERS
}
if len(_NO_BUFFER_SYNC) == 2:
    del _NO_BUFFER_SYNC["broadcast_buffers"]


def wrap(model: nn.Module, world: World) -> nn.Module:
    """`model` in DistributedDataParallel; in a world of one, the model itself.

    Buffers (BatchNorm's running statistics) are not broadcast at every step: training does not read
    them, and `evaluate` and the checkpoints take rank 0's.
    """
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_NO_BUFFER_SYNC,
    )


def warm_buckets(net: nn.Module, x: torch.Tensor) -> None:
    """A throw-away forward and backward, before the state is loaded.

    DDP rebuilds its buckets after the first backward, in the order in which gradients came. On 3 and
    more ranks another place in a bucket sums in another order: without this, a resumed run's second
    step would not have the bits of the unbroken run's.
    """
    if isinstance(net, DistributedDataParallel):
        net.train()
        net(x).sum().backward()
        net.zero_grad(set_to_none=True)


class StepFlags:
    """What every rank must know of every other at each step: a loss that is not finite, a signal, and
    whether rank 0 finds that it is time for a checkpoint.

    Sent while backward runs, so it costs next to nothing.
    """

    def __init__(self, loss: float, signal: int, save: bool, world: World) -> None:
        bad_rank = 0 if math.isfinite(loss) else world.rank + 1
        save = save and world.is_main
        self._flags = torch.tensor([bad_rank, signal, save], device=world.device)
        self._work = None
        if world.world_size > 1:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True)

    def heed(self, epoch: int, step: int) -> tuple[int, bool]:
        """The highest signal number any rank has had (0: none), and whether to save a checkpoint:
        the same on every rank.

        UserError, on every rank, where any rank's loss is not finite.
        """
        if self._work is not None:
            self._work.wait()
        bad_rank, signal, save = self._flags.tolist()
        if bad_rank:
            raise UserError(
                f"the loss of rank {bad_rank - 1} is not finite at step {step} (epoch {epoch + 1}): "
                "lower --lr, or look for bad values in the data; the last checkpoint stands"
            )
        return int(signal), bool(save)


def share_buffers(model: nn.Module, world: World) -> None:
    """Gives every rank rank 0's buffers (BatchNorm's running statistics)."""
    if world.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state on the CPU, in plain memory order."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }


def weights_sha256(model: nn.Module, world: World) -> list[str]:
    """Digest of each rank's parameters, in rank order: all equal while the replicas agree."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).numpy().tobytes())
    digests = broadcast_bytes(world, b"".join(gather_bytes(world, digest.digest())))
    size = digest.digest_size
    return [digests[at : at + size].hex() for at in range(0, len(digests), size)]
