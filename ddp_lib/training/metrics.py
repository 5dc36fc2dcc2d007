"""What each step gave: read when the device has done it, told to all ranks, logged.

On a GPU a step's work is only queued when Python goes on. Reading its loss at once would leave the GPU
idle until the next step is queued, so there the host reads one step behind.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import RunLog
from ddp_lib.training.progress import Console


class StepResult:
    """A rank's loss, and what every rank must know of every other: a loss that is not finite, a
    signal, and whether rank 0 finds that it is time for a checkpoint.

    Made before backward, so that its all-reduce hides behind backward's.
    """

    def __init__(self, loss: torch.Tensor, signal: int, save: bool, world: World) -> None:
        self._loss = loss
        flags = torch.tensor([world.rank + 1, signal, save and world.is_main])
        self._flags = flags.to(world.device, non_blocking=True)
        self._flags[0] *= ~torch.isfinite(loss)  # 0: finite, else this rank's number, from 1
        self._work = None
        if world.world_size > 1:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True)

    def fetch(self) -> None:
        """After backward. On a GPU it queues copies to the host, elsewhere it waits for the ranks."""
        if self._work is not None:
            self._work.wait()
        self._loss = self._loss.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if self._flags.is_cuda else None
        self._flags = self._flags.to("cpu", non_blocking=True)
        if self._there is not None:
            self._there.record()

    def read(self) -> tuple[float, int, int, bool]:
        """Own loss; the same on every rank: which has a bad loss (from 1; 0: none), signal, save."""
        if self._there is not None:
            self._there.synchronize()
        bad_rank, signal, save = self._flags.tolist()
        return self._loss.item(), bad_rank, signal, bool(save)


@dataclass(frozen=True)
class Step:
    """A step whose work is queued. number counts through all epochs; data_s: seconds for its batch."""

    epoch: int
    number: int
    samples: int
    lr: float
    data_s: float
    result: StepResult


# The speed that is shown is the mean of so many steps: the host may read several at once.
_SHOWN_STEPS = 10


class Steps:
    """The steps of an epoch: the last `behind` may still be under way, all others are logged."""

    behind = 0

    def __init__(
        self, log: RunLog, console: Console, world: World, per_epoch: int, global_batch_size: int
    ) -> None:
        self.log, self.console = log, console
        self.per_epoch, self.global_batch_size = per_epoch, global_batch_size
        if world.device.type == "cuda":
            self.behind = 1
        self.under_way: list[Step] = []
        self.recent_s: deque[float] = deque(maxlen=_SHOWN_STEPS)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.loss_sum = 0.0  # of this rank's images
        self.samples = 0
        self.settled_s = time.perf_counter()

    def add(self, step: Step) -> tuple[int, bool]:
        """Takes a step whose work is queued; what `settle` returns, of those before it on a GPU."""
        step.result.fetch()
        self.under_way.append(step)
        return self.settle(self.behind)

    def settle(self, behind: int = 0) -> tuple[int, bool]:
        """Waits for the steps under way, but for the last `behind`, and logs them.

        Returns the highest signal any rank has had (0: none), and whether to save a checkpoint: the
        same on every rank. UserError, on every rank, where any rank's loss is not finite.
        """
        signal, save = 0, False
        while len(self.under_way) > behind:
            step = self.under_way.pop(0)
            loss, bad_rank, its_signal, its_save = step.result.read()
            if bad_rank:
                raise UserError(
                    f"the loss of rank {bad_rank - 1} is not finite at step {step.number} (epoch "
                    f"{step.epoch + 1}): lower --lr, or look for bad values in the data; the last "
                    "checkpoint stands"
                )
            signal, save = max(signal, its_signal), save or its_save
            self._write(step, loss)
            self.loss_sum += loss * step.samples
            self.samples += step.samples
        return signal, save

    def _write(self, step: Step, loss: float) -> None:
        now = time.perf_counter()
        step_s, self.settled_s = now - self.settled_s, now
        self.log.write(
            epoch=step.epoch,
            step=step.number,
            samples=step.samples,
            loss=loss,
            lr=step.lr,
            data_s=step.data_s,
            compute_s=step_s - step.data_s,
            step_s=step_s,
            time=time.time(),
        )
        self.recent_s.append(step_s)
        speed = self.global_batch_size * len(self.recent_s) / sum(self.recent_s)
        self.console.step(step.epoch, step.number % self.per_epoch, loss, speed)
