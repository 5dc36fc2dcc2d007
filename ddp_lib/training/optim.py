"""Optimizer, learning rate and precision, which the loop sets up at the start and per step."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from ddp_lib.config import TrainConfig


def set_learning_rate(optimizer: Optimizer, config: TrainConfig, step: int, total_steps: int) -> float:
    """Sets and returns the learning rate of step number `step`.

    One cycle: a linear rise to config.lr, then half a cosine down to zero. It depends only on the step, so a
    resumed run needs no scheduler state. The idea is Smith & Topin's "super-convergence" (2017).
    """
    rise = max(1, round(config.warmup * total_steps))
    if step < rise:
        lr = config.lr * (step + 1) / rise
    else:
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """SGD with Nesterov's momentum; weight decay on matrices and kernels only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=True,  # one pass over a parameter, its gradient and its momentum
    )


def pick_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """fp32, bf16 or fp64, and why; `auto` is bf16 autocast if the processor computes in bf16."""
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ("bf16", "the processor has it") if fast else ("fp32", "this processor has no bf16")


def micro_batches(x: torch.Tensor, y: torch.Tensor, parts: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """A batch and its labels cut into `parts` pieces, whose sizes differ by one at most."""
    return zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
