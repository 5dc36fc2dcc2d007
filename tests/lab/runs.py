"""Trainings of seconds, for tests of the loop on several real ranks."""

import os

from ddp_lib import TrainConfig

TIMEOUT_S = 120


def config(folder, images, cache, **changes) -> TrainConfig:
    settings = {
        "data": str(images),
        "data_dir": cache,
        "run_dir": str(folder),
        "epochs": 2,
        "global_batch_size": 210,
        "lr": 0.05,
        "model": "tests.lab.models:Plain",
        "precision": "fp32",
        "checkpoint_every_s": 1e6,
    }
    return TrainConfig(**(settings | changes))


def train(settings: TrainConfig, die_at: int = -1, lag: int = 0) -> dict:
    """One rank's training; its model kills it in the middle of step `die_at`. lag: how many steps
    late the host reads the losses, which is 1 on a GPU."""
    from ddp_lib import World, fit
    from ddp_lib.training.metrics import EpochMetrics

    EpochMetrics.lag = lag
    os.environ["DIE_IN_STEP"] = str(die_at)
    with World.join() as world:
        summary = fit(settings, world)
        assert world.rank == int(os.environ.get("RANK", "0"))
    return summary
