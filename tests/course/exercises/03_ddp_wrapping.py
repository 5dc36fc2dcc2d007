"""Plausible wrong answers to the exercises of 03_ddp_wrapping."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F


def wrong_1_a(samples, all_samples, ranks):
    return samples / all_samples  # forgets that DDP divides by the ranks


def wrong_1_b(samples, all_samples, ranks):
    return all_samples / (samples * ranks)  # upside down


def wrong_2_a(parameters):
    for parameter in parameters:  # one all-reduce, of the last parameter only
        average = parameter.grad
    dist.all_reduce(average)
    average /= dist.get_world_size()


def wrong_2_b(parameters):
    bucket = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(bucket)
    bucket /= dist.get_world_size()  # and never copied back


def wrong_3_a(ddp, x_parts, y_parts):
    with ddp.no_sync():  # the last part is not sent either
        for x, y in zip(x_parts, y_parts, strict=True):
            (F.mse_loss(ddp(x), y) / len(x_parts)).backward()


def wrong_3_b(ddp, x_parts, y_parts):
    for number, (x, y) in enumerate(zip(x_parts, y_parts, strict=True)):
        last = number == len(x_parts) - 1
        with contextlib.nullcontext() if last else ddp.no_sync():
            F.mse_loss(ddp(x), y).backward()  # a sum over the parts, not a mean
