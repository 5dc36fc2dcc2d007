"""Plausible wrong answers to the exercises of 00_start_here."""

import torch
import torch.distributed as dist


def wrong_1_a(global_batch, world_size):
    return global_batch * world_size


def wrong_1_b(global_batch, world_size):
    return global_batch // 2


def wrong_2_a(value):
    dist.all_reduce(value)
    return value  # the sum


def wrong_2_b(value):
    dist.reduce(value, 0)  # rank 0 alone has the sum
    return value / dist.get_world_size()


def wrong_3_a(model):
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    return torch.equal(mine, first)  # always true on rank 0


def wrong_3_b(model):
    shapes = torch.tensor([p.numel() for p in model.parameters()])
    first = shapes.clone()
    dist.broadcast(first, 0)
    return torch.equal(shapes, first)
