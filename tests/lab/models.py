"""Models that tests name with --model tests.lab.models:NAME."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


class Mortal(nn.Sequential):
    """Kills its process in the middle of the training step that DIE_IN_STEP names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # fit seeds torch in each step, with a number made from the step's (and from --seed, here 0).
        step = torch.initial_seed() // 1_000_003
        if self.training and os.environ.get("DIE_IN_STEP") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Plain(Mortal):
    """No BatchNorm and no dropout: the same function on any number of ranks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 5, stride=3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(800, 16),
            nn.Tanh(),
            nn.Linear(16, num_classes),
        )


class Linear(nn.Sequential):
    """The least to compile."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, num_classes))


class Lively(Mortal):
    """BatchNorm's buffers and dropout's generator: all that a checkpoint must not lose.

    Its parameters lie in several DDP buckets' worth of order-sensitive sums on 4 ranks.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 5, stride=3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1200, 24),
            nn.BatchNorm1d(24),
            nn.Dropout(0.3),
            nn.Linear(24, num_classes),
        )


class Explodes(Plain):
    """Its loss is not finite from the third training step of rank 1 on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            # The first call is the throw-away pass that builds DDP's buckets.
            if self.calls > 3 and dist.is_initialized() and dist.get_rank() == 1:
                return super().forward(x) * float("nan")
        return super().forward(x)


def needs_an_argument(classes: int) -> nn.Module:
    return Plain(classes)


def not_a_model(num_classes: int) -> str:
    return f"{num_classes} classes"


class SlowStep(Plain):
    """Its third training step lasts 6 s on each rank, which leaves the file SLOW_STEP.<rank> at its start."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.initial_seed() // 1_000_003 == 2:
            Path(f"{os.environ['SLOW_STEP']}.{os.environ['RANK']}").touch()
            time.sleep(6)
        return super().forward(x)


class Gated(Lively):
    """Waits once, in the training step that the environment names, until the gate is open: the
    moment at which a test lets something happen.

    GATE: a folder. GATE_STEP_<world size>: number of the step since this process started. Each rank
    leaves the file `reached<world size>.<rank>` and waits for `open<world size>`, or for a signal.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and "GATE" in os.environ:
            # The first call is the throw-away pass that builds DDP's buckets.
            self.calls = (
                getattr(self, "calls", -1 if dist.is_initialized() and dist.get_world_size() > 1 else 0) + 1
            )
            size = os.environ["WORLD_SIZE"]
            if self.calls - 1 == int(os.environ.get(f"GATE_STEP_{size}", "-2")):
                self.wait(Path(os.environ["GATE"]), size)
        return super().forward(x)

    def wait(self, gate: Path, size: str) -> None:
        reached = gate / f"reached{size}.{os.environ['RANK']}"
        if reached.exists():
            return
        reached.touch()
        stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        deadline = time.monotonic() + 300
        while not (gate / f"open{size}").exists() and not getattr(stop, "requested", 0):
            if time.monotonic() > deadline:
                raise TimeoutError("nobody opened the gate")
            time.sleep(0.02)
