"""Plausible wrong answers to the exercises of 08_scaling."""

import torch
import torch.distributed as dist


def wrong_1_a(nbytes, ranks):
    return 2 * (ranks - 1) * nbytes  # whole tensors instead of chunks


def wrong_1_b(nbytes, ranks):
    return (ranks - 1) * nbytes / ranks  # one half of the all-reduce


def wrong_2_a(tensor):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    arriving = torch.empty_like(tensor)
    sending = dist.isend(tensor, (rank - 1) % ranks)  # to the left
    dist.recv(arriving, (rank + 1) % ranks)
    sending.wait()
    return arriving


def wrong_2_b(tensor):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.isend(tensor, (rank + 1) % ranks).wait()
    return tensor  # what arrived is never received


def wrong_3_a(state, bucket):
    halves = bucket.buffer().to(torch.float16)  # a sum, not a mean
    future = dist.all_reduce(halves, async_op=True).get_future()
    return future.then(lambda f: f.value()[0].to(torch.float32))


def wrong_3_b(state, bucket):
    mean = (bucket.buffer() / dist.get_world_size()).to(torch.float16).to(torch.float32)
    future = dist.all_reduce(mean, async_op=True).get_future()  # rounded, but sent whole
    return future.then(lambda f: f.value()[0])
