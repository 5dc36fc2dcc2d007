"""Trainings of seconds, for tests of the loop on several real ranks."""

import os
import signal

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


def train(
    settings: TrainConfig, die_at: int = -1, lose_optimizer: bool = False, behind: int = 0
) -> dict:
    """One rank's training; it kills itself in the middle of step `die_at`. behind: how many
    steps late the host reads the losses, which is 1 on a GPU."""
    from ddp_lib import World, fit
    from ddp_lib.train import Trainer
    from ddp_lib.training.metrics import Steps

    Steps.behind = behind

    real_step, real_restore = Trainer.forward_backward, Trainer.restore

    def step(self, x, y):
        result = real_step(self, x, y)
        if self.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def restore(self, state):
        if lose_optimizer and state is not None:
            state = dict(state)
            state["optimizer"] = dict(state["optimizer"], state={})
        real_restore(self, state)

    Trainer.forward_backward, Trainer.restore = step, restore
    with World.join() as world:
        summary = fit(settings, world)
        assert world.rank == int(os.environ.get("RANK", "0"))
    return summary
