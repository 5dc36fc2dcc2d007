"""Plausible wrong answers to the exercises of 02_samplers."""

import torch
import torch.distributed as dist


def wrong_1_a(images, world_size):
    return images % world_size


def wrong_1_b(images, world_size):
    return world_size - images % world_size  # world_size where it divides


def wrong_2_a(n, epoch, rank, world_size):
    generator = torch.Generator().manual_seed(epoch + rank)  # every rank draws its own order
    return torch.randperm(n, generator=generator)[rank::world_size].tolist()


def wrong_2_b(n, epoch, rank, world_size):
    generator = torch.Generator().manual_seed(0)  # in every epoch
    return torch.randperm(n, generator=generator)[rank::world_size].tolist()


def wrong_3_a(loss, images):
    mean = torch.tensor([loss])
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()  # the mean of means


def wrong_3_b(loss, images):
    sums = torch.tensor([loss, images])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def wrong_4_a(sampler, steps_done):
    return torch.cat(list(sampler))[steps_done:]  # leaves out images, not steps


def wrong_4_b(sampler, steps_done):
    sampler.set_epoch(0, start_step=steps_done)  # another epoch's order
    return torch.cat(list(sampler))
