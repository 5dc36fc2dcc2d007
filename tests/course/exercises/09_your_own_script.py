"""Plausible wrong answers to the exercises of 09_your_own_script."""

import torch
import torch.distributed as dist


def wrong_1_a(ranks):
    return 32 * ranks


def wrong_1_b(ranks):
    return 32 / ranks if ranks < 8 else 8


def wrong_2_a(download):
    if dist.get_rank() == 0:
        download()  # the others do not wait


def wrong_2_b(download):
    dist.barrier()
    download()  # all of them, at the same time


def wrong_3_a(losses):
    mean = torch.tensor(sum(losses) / len(losses))
    dist.all_reduce(mean)
    return mean / dist.get_world_size()  # a mean of means


def wrong_3_b(losses):
    total = torch.tensor(sum(losses))
    dist.all_reduce(total)
    return total / (len(losses) * dist.get_world_size())  # as if all had as many
