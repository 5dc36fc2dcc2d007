"""Plausible wrong answers to the exercises of 01_process_groups."""

import torch
import torch.distributed as dist


def wrong_1_a(node_rank, local_rank, local_world_size):
    return node_rank + local_rank * local_world_size


def wrong_1_b(node_rank, local_rank, local_world_size):
    return (node_rank + 1) * local_world_size + local_rank


def wrong_2_a(seconds):
    dist.all_reduce(seconds)
    return seconds  # the sum


def wrong_2_b(seconds):
    dist.all_reduce(seconds)
    return seconds / dist.get_world_size()  # the mean


def wrong_3_a(tensor, rank):
    received = torch.empty_like(tensor)
    dist.send(tensor, dst=rank ^ 1)  # all send, nobody receives
    dist.recv(received, src=rank ^ 1)
    return received


def wrong_3_b(tensor, rank):
    received = torch.empty_like(tensor)
    sending = dist.isend(tensor, dst=(rank + 1) % 4)  # passes on in a ring instead
    dist.recv(received, src=(rank - 1) % 4)
    sending.wait()
    return received


def wrong_4_a(tensor, rank):
    dist.all_reduce(tensor)
    return tensor / 4  # over both machines


def wrong_4_b(tensor, rank):
    machines = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dist.all_reduce(tensor, group=machines[rank // 2])
    return tensor  # the sum
