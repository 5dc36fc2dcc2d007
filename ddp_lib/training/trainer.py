"""Trainer: one rank's part of a training run, step by step."""

import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ddp_lib.config import TrainConfig
from ddp_lib.data.batch import make_batch
from ddp_lib.data.dataset import Dataset
from ddp_lib.data.sampler import TrainSampler
from ddp_lib.distributed.handshake import versions
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError, first_line
from ddp_lib.model import build_model
from ddp_lib.processes.signals import StopSignal
from ddp_lib.run_dir import checkpoint
from ddp_lib.run_dir.log import RunLog
from ddp_lib.run_dir.resume import Run, write_results
from ddp_lib.training.ddp import copy_state, share_buffers, warm_up, weights_sha256, wrap
from ddp_lib.training.evaluate import Evaluation, evaluate
from ddp_lib.training.metrics import Step, StepResult, Steps
from ddp_lib.training.optim import (
    autocast,
    learning_rate,
    make_optimizer,
    pick_precision,
    set_learning_rate,
)
from ddp_lib.training.progress import Console


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
        self.config, self.world, self.sampler = config, world, sampler
        self.data = data.to_device(world.device)
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
        if config.compile:
            self.model.compile()
        self.optimizer = make_optimizer(config, self.model)
        self.net = wrap(self.model, world)
        self.console = Console(world, config.epochs, len(sampler))
        self.log = RunLog(run.folder, world.rank)
        per_epoch, batch = len(sampler), config.global_batch_size
        self.steps = Steps(self.log, self.console, world, per_epoch, batch)
        self.saved_s = time.monotonic()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from `state` (a checkpoint), or starts afresh."""
        weights = copy_state(self.model) if state is None else state["model"]
        share = self.config.share(self.world.world_size)
        x, _ = self.batch(torch.arange(share))
        try:
            with autocast(self.precision, self.world.device):
                warm_up(self.net, x)
        except RuntimeError as error:
            if not self.config.compile:
                raise
            raise UserError(
                f"--compile True: the model cannot be compiled here ({first_line(error)}): install "
                "a C++ compiler, or leave the flag out"
            ) from error
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
        self.steps.begin_epoch()
        began = time.perf_counter()
        for indices in self.sampler:
            lr = learning_rate(config, self.step, self.total_steps)
            set_learning_rate(self.optimizer, lr)
            # Dropout's generator, if any: a function of the step, so resuming needs no state.
            torch.manual_seed((config.seed * 1_000_003 + self.step) * 1_000_003 + world.rank)
            x, y = self.batch(indices, augment)
            data_s = time.perf_counter() - self.steps.settled_s
            result = self.forward_backward(x, y)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            step = Step(epoch, self.step, len(indices), lr, data_s, result)
            self.step += 1
            self.heed(*self.steps.add(step))
        self.heed(*self.steps.settle())
        seconds = time.perf_counter() - began
        totals = torch.tensor([self.steps.loss_sum, self.steps.samples], dtype=torch.float64)
        loss_sum, samples = world.sum(totals.to(world.device)).tolist()
        return loss_sum / samples, samples / seconds

    def heed(self, signal: int, save: bool) -> None:
        """Saves, or leaves, on the same step on every rank, and never with a loss that is not finite."""
        if signal or save:
            signal = max(signal, self.steps.settle()[0])
        if signal:
            self.leave_early(signal)
        if save:
            self.save()

    def forward_backward(self, x: torch.Tensor, y: torch.Tensor) -> StepResult:
        """Gradients of this rank's share, averaged over the ranks; its loss is that share's mean."""
        parts, losses = self.config.accumulate, []
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
                losses.append(part_loss.detach())
                if last:
                    due = time.monotonic() - self.saved_s > self.config.checkpoint_every_s
                    loss = torch.stack(losses).mean(dtype=torch.float64)
                    result = StepResult(loss, self.stop.requested, due, self.world)
                (part_loss / parts).backward()
        return result

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
