"""Plausible wrong answers to the exercises of 06_loss_plots."""

import torch

from ddp_lib.distributed.coordination import broadcast_result
from ddp_lib.training.ddp import weights_sha256


def wrong_1_a(attempts):
    return int(attempts["superseded"].sum())  # rows, not images


def wrong_1_b(attempts):
    return int(attempts[attempts["start"] == 0]["samples"].sum())  # all of the first start


def wrong_2_a(steps):
    return int(steps.groupby("rank")["compute_s"].median().idxmax())  # the rank that waits most


def wrong_2_b(steps):
    return int(steps.groupby("rank")["data_s"].sum().idxmax())  # two steps outweigh all others


def wrong_3_a(world, work_s):
    return int(world.sum(torch.tensor([work_s])).item() > 1)  # the sum says that one is slow


def wrong_3_b(world, work_s):
    return broadcast_result(world, "slow", lambda: 0 if work_s > 0.5 else 1, 10.0)  # rank 0's guess


def wrong_4_a(world, model):
    digests = weights_sha256(model, world)
    return [world.rank] if digests[world.rank] != digests[0] else []  # another answer on each rank


def wrong_4_b(world, model):
    digests = weights_sha256(model, world)
    return [] if len(set(digests)) == 1 else list(range(1, world.world_size))  # all but rank 0
