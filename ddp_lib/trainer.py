"""Trainer: one rank's part of a training run, step by step."""

import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ddp_lib import checkpoint
from ddp_lib.config import TrainConfig
from ddp_lib.console import Console
from ddp_lib.data import Dataset, make_batch
from ddp_lib.evaluation import Evaluation, evaluate
from ddp_lib.meeting import versions
from ddp_lib.model import build_model
from ddp_lib.optim import (
    autocast,
    learning_rate,
    make_optimizer,
    pick_precision,
    set_learning_rate,
)
from ddp_lib.replica import (
    StepFlags,
    copy_state,
    share_buffers,
    warm_buckets,
    weights_sha256,
    wrap,
)
from ddp_lib.runfolder import Run, write_results
from ddp_lib.runlog import RunLog
from ddp_lib.sampler import TrainSampler
from ddp_lib.stop import StopSignal
from ddp_lib.world import World


class Trainer:
    """One rank's model, optimizer and place in the run, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        data: Dataset,
        sampler: TrainSampler,
        run: Run,
        stop: StopSignal,
    ) -> None:
        self.config, self.world, self.data, self.sampler = config, world, data, sampler
        self.job, self.folder, self.stop = run, run.folder, stop
        self.step = 0
        self.total_steps = config.epochs * len(sampler)
        self.precision, why = pick_precision(config.precision, world.device)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        world.say(f"precision {self.precision} ({why})")
        torch.backends.cudnn.deterministic = True
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = build_model(config.model, len(data.classes))
        if config.init_from:
            checkpoint.load_weights(config.init_from, self.model)
        self.model.to(world.device, self.dtype).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(config, self.model)
        self.net = wrap(self.model, world)
        self.console = Console(world, config.epochs, len(sampler))
        self.log = RunLog(run.folder, world.rank)
        self.saved_s = time.monotonic()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from `state` (a checkpoint), or starts afresh."""
        weights = copy_state(self.model) if state is None else state["model"]
        share = self.config.share(self.world.world_size)
        x, _ = self.batch(torch.arange(share))
        warm_buckets(self.net, x)
        self.model.load_state_dict(weights)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])

    def save(self) -> None:
        """On every disk one rank writes a checkpoint; the others meet it at the next all-reduce."""
        share_buffers(self.model, self.world)
        if self.job.keeps:
            began = time.perf_counter()
            state = {
                "model": copy_state(self.model),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch": self.step // len(self.sampler),
                "config": self.config.as_dict(),
                "versions": versions(),
                "began": self.job.began,
            }
            checkpoint.save(self.folder, checkpoint.to_bytes(state))
            self.log.write(event="checkpoint", step=self.step, seconds=time.perf_counter() - began)
        self.saved_s = time.monotonic()

    def run(self) -> dict[str, Any]:
        """The epochs that are left, then the results; returns the summary."""
        self.log.start(
            step=self.step,
            precision=self.precision,
            torch=str(torch.__version__),
            time=time.time(),
            **self.world.describe(),
        )
        try:
            train_loss = images_per_s = None
            result = None
            for epoch in range(self.step // len(self.sampler), self.config.epochs):
                train_loss, images_per_s = self.train_epoch(epoch)
                self.save()
                result = evaluate(self.model, self.data, self.world)
                self.report(epoch, train_loss, images_per_s, result)
                self.job.copies.send()
            # None: killed after the last checkpoint and before the results were written.
            result = result or evaluate(self.model, self.data, self.world)
            summary = self.finish(result, train_loss, images_per_s)
            self.log.write(event="end", step=self.step, why="finished", time=time.time())
            self.job.copies.send()
            return summary
        finally:
            self.console.close()
            self.log.close()

    def batch(
        self, indices: torch.Tensor, augment: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return make_batch(
            self.data.train, indices, self.data, self.world.device, self.dtype, augment
        )

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Trains what is left of `epoch`; returns its mean loss and images/s, over all ranks."""
        config, world = self.config, self.world
        self.model.train()
        self.sampler.set_epoch(epoch, start_step=self.step - epoch * len(self.sampler))
        augment = (config.seed, epoch) if config.augment else None
        loss_sum = samples = 0.0
        epoch_began = step_began = time.perf_counter()
        for indices in self.sampler:
            lr = learning_rate(config, self.step, self.total_steps)
            set_learning_rate(self.optimizer, lr)
            # Dropout's generator, if any: a function of the step, so resuming needs no state.
            torch.manual_seed((config.seed * 1_000_003 + self.step) * 1_000_003 + world.rank)
            x, y = self.batch(indices, augment)
            got_data = time.perf_counter()
            loss, flags = self.forward_backward(x, y)
            signal, save = flags.heed(epoch, self.step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            done = time.perf_counter()
            self.log.write(
                epoch=epoch,
                step=self.step,
                samples=len(indices),
                loss=loss,
                lr=lr,
                data_s=got_data - step_began,
                compute_s=done - got_data,
                step_s=done - step_began,
                time=time.time(),
            )
            speed = config.global_batch_size / (done - step_began)
            self.console.step(epoch, self.step - epoch * len(self.sampler), loss, speed)
            step_began = done
            self.step += 1
            loss_sum, samples = loss_sum + loss * len(indices), samples + len(indices)
            if signal:
                self.leave_early(signal)
            if save:
                self.save()
        seconds = time.perf_counter() - epoch_began
        totals = torch.tensor([loss_sum, samples], dtype=torch.float64, device=world.device)
        loss_sum, samples = world.sum(totals).tolist()
        return loss_sum / samples, samples / seconds

    def forward_backward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, StepFlags]:
        """Gradients of this rank's share, averaged over the ranks; returns the share's mean loss."""
        parts, loss = self.config.accumulate, 0.0
        for number in range(parts):
            last = number == parts - 1
            # Gradients add up here and are sent once: no_sync must hold forward and backward.
            net = self.net
            held = net if isinstance(net, DistributedDataParallel) and not last else None
            with held.no_sync() if held else nullcontext():
                with autocast(self.precision, self.world.device):
                    logits = net(x.chunk(parts)[number]).to(self.dtype)
                part_loss = F.cross_entropy(
                    logits, y.chunk(parts)[number], label_smoothing=self.config.label_smoothing
                )
                loss += part_loss.item() / parts
                if last:
                    due = time.monotonic() - self.saved_s > self.config.checkpoint_every_s
                    flags = StepFlags(loss, self.stop.requested, due, self.world)
                (part_loss / parts).backward()
        return loss, flags

    def leave_early(self, signal: int) -> None:
        """All ranks stop at the same step; SystemExit(128 + signal)."""
        self.save()
        self.log.write(event="end", step=self.step, why=f"signal {signal}", time=time.time())
        self.job.copies.send()
        self.console.main_line(
            f"stopped by signal {signal} at step {self.step} of {self.total_steps}; "
            "the same command goes on from here"
        )
        raise SystemExit(128 + signal)

    def report(
        self, epoch: int, train_loss: float, images_per_s: float, result: Evaluation
    ) -> None:
        if self.world.is_main:
            self.log.write(
                event="epoch",
                epoch=epoch,
                step=self.step,
                test_accuracy=result.accuracy,
                test_correct=result.correct,
                test_images=result.images,
                train_loss=train_loss,
                images_per_s=images_per_s,
                time=time.time(),
            )
            self.console.line(
                f"epoch {epoch + 1}/{self.config.epochs} done: train loss {train_loss:.4f}, "
                f"test accuracy {result.accuracy:.2%} ({result.correct} of {result.images}), "
                f"{images_per_s:,.0f} images/s"
            )

    def finish(
        self, result: Evaluation, train_loss: float | None, images_per_s: float | None
    ) -> dict[str, Any]:
        """Writes cifar_net.pth and summary.json on rank 0; returns the summary on every rank."""
        summary = {
            "test_accuracy": result.accuracy,
            "test_correct": result.correct,
            "test_images": result.images,
            "test_loss": result.loss,
            "train_loss": train_loss,
            "images_per_s": images_per_s,
            "epochs": self.config.epochs,
            "steps": self.step,
            "world_size": self.world.world_size,
            "backend": self.world.backend,
            "precision": self.precision,
            "weights_sha256": weights_sha256(self.model, self.world),
            "versions": versions(),
        }
        if self.world.is_main:
            write_results(self.folder, copy_state(self.model), summary)
            self.console.line(
                f"test accuracy {result.accuracy:.2%} ({result.correct} of {result.images}); "
                f"model in {self.folder}/cifar_net.pth"
            )
        return summary
