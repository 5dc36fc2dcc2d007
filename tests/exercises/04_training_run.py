"""Plausible wrong answers to the exercises of 04_training_run."""

import math

import torch


def wrong_1_a(images, global_batch):
    return math.ceil(images / global_batch)  # counts the incomplete batch, which is dropped


def wrong_1_b(images, global_batch):
    return images / global_batch


def wrong_2_a(world, correct, images):
    return world.sum(torch.tensor([correct / images])).item() / world.world_size  # mean of means


def wrong_2_b(world, correct, images):
    return world.sum(torch.tensor([correct])).item() / images


def wrong_3_a(table):
    return int(table[table["start"] == 0]["step"].max()) + 1  # the step in which it died


def wrong_3_b(table):
    return int(table[table["start"] == 1]["step"].max())


def wrong_4_a(world, wants_to_stop):
    return world.sum(torch.tensor([int(wants_to_stop)])).item() == world.world_size  # all want to


def wrong_4_b(world, wants_to_stop):
    return world.from_main("stop", lambda: wants_to_stop, 10.0)  # rank 0's wish
