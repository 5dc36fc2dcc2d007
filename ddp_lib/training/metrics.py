"""Loss and times of each step of an epoch: logged, and summed over the ranks.

On a GPU, Python only queues a step's work. Reading its loss at once would leave the GPU idle until the next
step is queued, so on a GPU a step is read and logged one step later.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from ddp_lib.distributed.collectives import Status
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import RunLog
from ddp_lib.training.evaluate import Evaluation
from ddp_lib.training.progress import Progress

# The displayed speed is the mean over this many steps, since the host may read several at once.
_SHOWN_STEPS = 10


class Metrics:
    """Exact means over the samples of all ranks, whatever number of samples each rank has.

    metrics = Metrics(world, "loss", "accuracy")
    metrics.add("loss", loss.detach() * len(x), len(x))   # for each batch
    metrics.means()                                       # {"loss": ..., "accuracy": ...}, on every rank

    Sums and counts are added up over the ranks, never means. A rank may add nothing.
    """

    def __init__(self, world: World, *names: str) -> None:
        self.world, self.names = world, names
        self.reset()

    def reset(self) -> None:
        """Starts again from zero."""
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.world.device)

    def add(self, name: str, total: torch.Tensor | float, count: int) -> None:
        """total: the sum over `count` samples of this rank. Python does not
        wait for a GPU's tensor."""
        row = self._sums[self.names.index(name)]
        row[0] += total
        row[1] += count

    def means(self) -> dict[str, float]:
        """Each name's mean, NaN if no rank has added to it. Starts again from zero. All ranks call it."""
        totals = self.world.sum(self._sums).tolist()
        self.reset()
        return {
            name: total / count if count else math.nan
            for name, (total, count) in zip(self.names, totals, strict=True)
        }


@dataclass(frozen=True)
class _Step:
    """A step whose work is queued; `loss` and `flags` are being copied to the host."""

    number: int
    samples: int
    lr: float
    data_s: float
    loss: torch.Tensor
    flags: torch.Tensor
    arrived: torch.cuda.Event | None


@dataclass
class EpochMetrics:
    """The steps of an epoch, which starts when this object is created."""

    lag: ClassVar[int] = 0  # steps left queued on a CPU; on a GPU 1

    epoch: int
    global_batch_size: int
    world: World
    log: RunLog
    progress: Progress
    loss_sum: float = 0.0  # over this rank's images
    samples: int = 0
    _began_s: float = field(default_factory=time.perf_counter)
    _read_s: float = field(default_factory=time.perf_counter)  # when the last step was read
    _queued: list[_Step] = field(default_factory=list)
    _recent_s: deque[float] = field(default_factory=partial(deque, maxlen=_SHOWN_STEPS))

    def record(
        self, step: int, samples: int, lr: float, data_s: float, loss: torch.Tensor, status: Status
    ) -> tuple[int, bool]:
        """Records step number `step`, counted through all epochs, after its backward.

        samples: of this rank. data_s: seconds that its batch took. loss: this rank's mean, on the device.
        Returns what `flush` does; on a GPU, for the previous step.
        """
        if status.work is not None:
            status.work.wait()  # on a GPU this only queues the wait
        arrived = torch.cuda.Event() if loss.is_cuda else None
        loss, flags = (value.to("cpu", non_blocking=True) for value in (loss, status.flags))
        if arrived is not None:
            arrived.record()
        self._queued.append(_Step(step, samples, lr, data_s, loss, flags, arrived))
        return self.flush(keep=self.lag if arrived is None else 1)

    def flush(self, keep: int = 0) -> tuple[int, bool]:
        """Waits for the queued steps, except the last `keep`, and logs them.

        Returns the highest signal that any rank received (0: none) and whether a checkpoint is due, the same
        on every rank. UserError, on every rank, if any rank's loss is not finite.
        """
        signal, save = 0, False
        while len(self._queued) > keep:
            step = self._queued.pop(0)
            if step.arrived is not None:
                step.arrived.synchronize()
            loss = step.loss.item()
            bad_rank, step_signal, step_save = step.flags.tolist()
            self._log(step, loss)  # also a loss that is not finite, so that the log shows it
            if bad_rank:
                raise UserError(
                    f"the loss of rank {bad_rank - 1} is not finite at step {step.number} (epoch "
                    f"{self.epoch + 1}): lower --lr, or look for bad values in the data; the last "
                    "checkpoint stands"
                )
            signal, save = max(signal, step_signal), save or bool(step_save)
            self.loss_sum += loss * step.samples
            self.samples += step.samples
        return signal, save

    def totals(self) -> tuple[float, float]:
        """The epoch's mean loss over the images of all ranks, and images/s, on every rank."""
        seconds = time.perf_counter() - self._began_s
        sums = torch.tensor([self.loss_sum, self.samples], dtype=torch.float64)
        loss_sum, samples = self.world.sum(sums.to(self.world.device)).tolist()
        return loss_sum / samples, samples / seconds

    def report(self, step: int, train_loss: float, images_per_s: float, evaluation: Evaluation) -> None:
        """Rank 0 logs and shows the results of the epoch, which ended before step number `step`."""
        if self.world.rank == 0:
            self.log.epoch(
                self.epoch,
                step,
                test_accuracy=evaluation.accuracy,
                test_correct=evaluation.correct,
                test_images=evaluation.images,
                train_loss=train_loss,
                images_per_s=images_per_s,
            )
            results = f"train loss {train_loss:.4f}, {evaluation}, {images_per_s:,.0f} images/s"
            self.progress.epoch_done(self.epoch, results)

    def _log(self, step: _Step, loss: float) -> None:
        now = time.perf_counter()
        step_s, self._read_s = now - self._read_s, now
        self.log.step(
            self.epoch,
            step.number,
            samples=step.samples,
            loss=loss,
            lr=step.lr,
            data_s=step.data_s,
            step_s=step_s,
        )
        self._recent_s.append(step_s)
        speed = self.global_batch_size * len(self._recent_s) / sum(self._recent_s)
        self.progress.step(self.epoch, step.number, loss, speed)
