"""Plausible wrong answers to the exercises of 04_training_run."""

import math
from dataclasses import replace

import torch

from ddp_lib.distributed.coordination import broadcast_result


def wrong_1_a(images, global_batch):
    return math.ceil(images / global_batch)  # counts the incomplete batch, which is dropped


def wrong_1_b(images, global_batch):
    return images / global_batch


def wrong_2_a(config):
    return replace(config, epochs=1)  # epochs counts all of them


def wrong_2_b(config):
    return replace(config, epochs=config.epochs + 1, resume="never")  # starts over


def wrong_3_a(table):
    return int(table[table["start"] == 0]["step"].max()) + 1  # the step in which it died


def wrong_3_b(table):
    return int(table[table["start"] == 1]["step"].max())


def wrong_4_a(world, wants_to_stop):
    return world.sum(torch.tensor([int(wants_to_stop)])).item() == world.world_size  # all want to


def wrong_4_b(world, wants_to_stop):
    return broadcast_result(world, "stop", lambda: wants_to_stop, 10.0)  # rank 0's wish


def wrong_5_a(state):
    return {name.replace("module", ""): value for name, value in state.items()}  # leaves the dot


def wrong_5_b(state):
    return {name[len("module.") :]: value for name, value in state.items()}  # also where there is none
