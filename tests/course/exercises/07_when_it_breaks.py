"""Plausible wrong answers to the exercises of 07_when_it_breaks."""

import re

import torch
import torch.distributed as dist


def wrong_1_a(messages):
    return re.findall(r"OpType=(\w+)", messages[0])  # believes what rank 0 says of rank 1


def wrong_1_b(messages):
    return [re.findall(r"OpType=(\w+)", message)[1] for message in messages]


def wrong_2_a(rank, loss):
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()  # on every rank


def wrong_2_b(rank, loss):
    dist.all_reduce(loss)
    return loss.item() if rank == 0 else None  # the sum


def wrong_3_a(own_batches):
    most = torch.tensor([own_batches])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def wrong_3_b(own_batches):
    fewest = torch.tensor([own_batches])
    dist.reduce(fewest, 0, dist.ReduceOp.MIN)  # the answer is on rank 0 only
    return int(fewest)


def wrong_4_a(model, images):
    model.requires_grad_(False)  # nothing is left to train


def wrong_4_b(model, images):
    model(images).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None or parameter.dim() == 1:  # the biases too
            parameter.requires_grad_(False)
