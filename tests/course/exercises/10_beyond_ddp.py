"""Plausible wrong answers to the exercises of 10_beyond_ddp."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def wrong_1_a(parameters, limit):
    return 16 * parameters // limit  # rounded down


def wrong_1_b(parameters, limit):
    return -(-8 * parameters // limit)  # forgets Adam's two moments


def wrong_2_a(tensor):
    parts = list(tensor.chunk(dist.get_world_size()))
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts)
    return mine  # one part of the sum


def wrong_2_b(tensor):
    mine = tensor.chunk(dist.get_world_size())[dist.get_rank()].clone()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.cat(gathered)  # everybody's part, never summed


def wrong_3_a(x, weight, bias):
    y = F.linear(x, weight, bias)
    dist.all_reduce(y)
    return y  # the bias once a rank


def wrong_3_b(x, weight, bias):
    return F.linear(x, weight) + bias  # only this rank's columns
