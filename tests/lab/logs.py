"""Logs of a run that tests write, as if its ranks wrote them."""

import math
import os
import random
import threading
import time
from contextlib import ExitStack

from ddp_lib.run_dir.log import RunLog

STEP_S = 0.05


def step(number, **changes):
    noise = random.Random(number * 1000 + changes.pop("rank", 0)).uniform(-0.01, 0.01)
    line = dict(epoch=0, step=number, samples=10, loss=2 - number / 100 + noise, lr=0.1)
    line |= dict(data_s=0.001, compute_s=STEP_S, step_s=STEP_S + 0.001, time=100 + number * STEP_S)
    return line | changes


def write(folder, ranks=3, steps=60, change=lambda rank, number: {}, since_s=0.0):
    """A run in which each step of each rank is what `change` makes of it; written `since_s` seconds ago."""
    for rank in range(ranks):
        with RunLog(folder, rank) as log:
            log.start(step=0, world_size=ranks, time=99.0)
            for number in range(steps):
                log.write(**step(number, rank=rank) | change(rank, number))
        os.utime(folder / f"rank{rank}.jsonl", (time.time() - since_s,) * 2)
    return folder


def grow(folder, ranks: int, slow: int, over: threading.Event):
    """A run that goes on until `over`. The batches of rank `slow` take 30 ms longer; the others wait."""
    with ExitStack() as stack:
        logs = [stack.enter_context(RunLog(folder, rank)) for rank in range(ranks)]
        for log in logs:
            log.start(step=0, world_size=ranks)
        number = 0
        while not over.wait(0.03 + STEP_S):
            for rank, log in enumerate(logs):
                late_s = 0.03 * (rank == slow)
                times = dict(data_s=0.001 + late_s, compute_s=STEP_S + 0.03 - late_s, time=time.time())
                loss = 0.5 + 2 * math.exp(-number / 60) + random.uniform(-0.1, 0.1)
                log.write(**step(number, loss=loss, step_s=0.031 + STEP_S, **times))
            number += 1


def finish(folder, ranks=2, why="finished"):
    for rank in range(ranks):
        with RunLog(folder, rank) as log:
            log.end(60, why)
