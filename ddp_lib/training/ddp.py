"""A rank's copy of the model: wrapped in DDP, and kept equal to the other ranks' copies."""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_lib.distributed.collectives import broadcast_bytes, gather_bytes
from ddp_lib.distributed.placement import require_device
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError, lost_a_peer

# torch 2.15 renames the parameter; 2.11 has only the old name.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def wrap(model: nn.Module, world: World) -> nn.Module:
    """`model` in DistributedDataParallel; for world size 1, the model itself.

    Buffers (BatchNorm's running statistics) are not broadcast at every step. Call `share_buffers` before you
    validate or save. A model that reads its buffers while it trains (spectral_norm, codebooks) needs
    DistributedDataParallel itself. UserError if it has parameters on another device than the rank's.
    """
    if world.world_size == 1:
        return model
    require_device("the model", model.parameters(), world.device)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_NO_BUFFER_SYNC,
    )


@contextmanager
def gradient_sync(net: nn.Module, on: bool) -> Iterator[None]:
    """Put it around forward and backward. With `on`, DDP averages the gradients over the ranks; else they
    add up on this rank. It must include the forward, which prepares the averaging. UserError if the step
    before did not use every parameter."""
    try:
        with nullcontext() if on or not isinstance(net, DistributedDataParallel) else net.no_sync():
            yield
    except RuntimeError as error:
        if "finished reduction in the prior iteration" not in str(error):
            raise
        raise UserError(
            "a step did not use all parameters of the model, but DDP waits for the gradient of each: use all "
            "in every forward, and multiply by 0 what is to be left out"
        ) from error


def warm_up(net: nn.Module, *inputs: Any, loss: Callable[[Any], torch.Tensor] = torch.sum) -> None:
    """A throw-away forward and backward, before the first step; compiles a compiled model. Leaves parameters
    and buffers as they were. Call it under the autocast of the training. loss: turns what `net(*inputs)`
    returns into one number. UserError if DDP would wait for ever for a parameter that the loss does not use.

    DDP rebuilds its buckets after the first backward, in the order in which gradients arrived. On 3 or more
    ranks, a gradient's position in its bucket changes the order of the sums. Without this, a resumed run's
    second step would differ in bits from an uninterrupted run's.
    """
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    loss(net(*inputs)).backward()
    if isinstance(net, DistributedDataParallel) and not (net.find_unused_parameters or net.static_graph):
        named = net.module.named_parameters()
        if unused := [name for name, p in named if p.requires_grad and p.grad is None]:
            raise UserError(
                f"{len(unused)} parameter(s) of the model get no gradient, the first is {unused[0]}, and DDP "
                "would wait for it: use it in forward, remove it, or set requires_grad to False"
            )
    net.zero_grad(set_to_none=True)
    net.load_state_dict(before)


def compile_cure(error: BaseException) -> str | None:
    """What to do if torch.compile itself raised `error` in `warm_up`; None for other errors, such as too
    little memory or a lost peer."""
    text = f"{type(error).__name__}: {error}"
    compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    if not compiler or "OutOfMemoryError" in text or lost_a_peer(text):
        return None
    if re.search(r"C(\+\+)? compile|Compiler: ", text):
        return "install a C++ compiler, or leave the flag out"
    if re.search("[Tt]riton", text):
        return "install the triton that fits this torch, or leave the flag out"
    return "leave the flag out"


def share_buffers(model: nn.Module, world: World) -> None:
    """Gives every rank rank 0's buffers (BatchNorm's running statistics)."""
    if world.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state on the CPU, in plain memory order."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def weights_sha256(model: nn.Module, world: World, buffers: bool = False) -> list[str]:
    """Digest of each rank's parameters, of any type, in rank order: all equal while the replicas agree.

    buffers: of them too; on the ranks they are equal only after `share_buffers`.
    """
    digest = hashlib.sha256()
    for tensor in [*model.parameters(), *(model.buffers() if buffers else ())]:
        plain = tensor.detach().cpu().contiguous().flatten()
        real = torch.view_as_real(plain).flatten() if plain.is_complex() else plain
        digest.update(real.view(torch.uint8).numpy().tobytes())
    digests = b" ".join(gather_bytes(world, digest.hexdigest().encode()))
    return broadcast_bytes(world, digests).decode().split()


def check_replicas(
    model: nn.Module, world: World, record: Callable[[str], None] = lambda sha256: None
) -> None:
    """UserError, on every rank, if the ranks' parameters are not equal in all bits. All ranks call it.

    record: called with the digest of this rank's parameters, before they are compared.
    """
    first, *others = digests = weights_sha256(model, world)
    record(digests[world.rank])
    if differ := [str(rank) for rank, digest in enumerate(others, 1) if digest != first]:
        raise UserError(
            f"the parameters of rank(s) {', '.join(differ)} differ from rank 0's: something other than DDP "
            "changed them, or the machines' processors round differently; the last checkpoint stands"
        )
