"""The whole training: the same code alone, under torchrun or SLURM, in a container or a notebook.

python -m ddp_lib.train --data shapes                          one process
torchrun --nproc-per-node 2 -m ddp_lib.train --data shapes     two, by torch's launcher
ddp-launch train --nproc-per-node 2 --data shapes              two, by this package's
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddp_lib.cli import parse
from ddp_lib.config import PER_MACHINE, TrainConfig
from ddp_lib.data.batch import make_batch
from ddp_lib.data.dataset import Dataset, load_dataset
from ddp_lib.data.sampler import TrainSampler, batch_share
from ddp_lib.distributed.collectives import all_reduce_status
from ddp_lib.distributed.coordination import broadcast_result, compare
from ddp_lib.distributed.device import keep_freed_memory
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError, first_line
from ddp_lib.processes.exit_status import as_exit_status, may_pass_once, require_working_directory
from ddp_lib.processes.signals import Stopped, StopSignal
from ddp_lib.report.live_cell import open_view
from ddp_lib.run_dir import checkpoint_file
from ddp_lib.run_dir.log import RunLog
from ddp_lib.run_dir.resume import describe_model, open_run, write_results
from ddp_lib.training.build import blame_model, build_same_model
from ddp_lib.training.ddp import (
    check_replicas,
    compile_cure,
    copy_state,
    gradient_sync,
    share_buffers,
    warm_up,
    weights_sha256,
    wrap,
)
from ddp_lib.training.evaluate import Evaluation, evaluate
from ddp_lib.training.metrics import EpochMetrics
from ddp_lib.training.optim import autocast, make_optimizer, micro_batches, pick_precision, set_learning_rate
from ddp_lib.training.progress import Progress


def fit(
    config: TrainConfig, world: World, stop: StopSignal | None = None, data: Dataset | None = None
) -> dict[str, Any]:
    """Trains as `config` says, resuming if its run folder allows it; returns summary.json's content.

    data: used instead of loading config.data. UserError if the configuration cannot run or a loss is not
    finite. Stopped, a SystemExit, after a checkpoint, if `stop` has seen signal n on any rank.
    """
    stop = stop or StopSignal()
    share = batch_share(config.global_batch_size, world.world_size, world.rank, config.accumulate)
    data = load_same_data(config, world, data)
    precision, why = broadcast_result(
        world, "precision", lambda: pick_precision(config.precision, world.device), config.join_timeout_s
    )
    sampler = TrainSampler(
        len(data.train), config.global_batch_size, world.rank, world.world_size, config.seed
    )
    total_steps = config.epochs * len(sampler)
    model, source = build_same_model(config, precision, world, data)
    model_is = describe_model(model.state_dict(), source)
    with open_run(config, world, total_steps, data.digest, model_is, precision) as run:
        if run.finished is not None:
            world.say(f"{run.named} is finished; more --epochs would go on from there")
            return run.finished
        if precision != run.precision:
            precision, why = run.precision, "as the run began"
        world.say(f"precision {precision} ({why})")
        if config.global_batch_size % world.world_size:
            larger = config.global_batch_size % world.world_size
            world.say(
                f"{world.world_size} ranks do not divide the global batch of {config.global_batch_size}: "
                f"{share} images on the first {larger}, {share - 1} on the others; gradients are weighted"
            )
        data = data.to_device(world.device)
        with blame_model(config.model, "cannot do a training step"):
            net, optimizer = make_replica(config, world, model, data, share, precision, run.resumed)
        dtype = next(model.parameters()).dtype
        step = int(run.resumed["step"]) if run.resumed else 0
        saved_s = time.monotonic()

        def state() -> dict[str, Any]:
            return {
                "model": copy_state(model),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "epoch": step // len(sampler),
                "train_loss": train_loss,  # of the last epoch that has ended
                "images_per_s": images_per_s,
                "config": asdict(config),
                "source": source,
                "precision": precision,
                "versions": world.versions,
            }

        def save() -> None:
            """One rank per disk writes a checkpoint; the others wait for it at the next all-reduce."""
            nonlocal saved_s
            share_buffers(model, world)
            began_s = time.perf_counter()
            if run.checkpoint.save(state, step):
                log.write(event="checkpoint", step=step, seconds=time.perf_counter() - began_s)
            saved_s = time.monotonic()

        def stop_or_save(signal: int, due: bool) -> None:
            """Acts on the metrics' flags: equal on all ranks, so all act at the same step."""
            if signal or due:
                signal = max(signal, metrics.flush()[0])
                save()
            if signal:
                log.end(step, f"signal {signal}")
                run.checkpoint.sync_logs()
                if world.is_main:
                    progress.say(
                        f"stopped by signal {signal} at step {step} of {total_steps}; "
                        "the same command goes on from here"
                    )
                raise Stopped(128 + signal)

        def test() -> Evaluation:
            """Tests and reports the epoch of `metrics`, which has ended."""
            evaluation = evaluate(model, data, world)
            metrics.report(step, train_loss, images_per_s, evaluation)
            run.checkpoint.sync_logs()
            return evaluation

        log = RunLog(run.folder, world.rank, config.export)
        view = open_view(run.folder) if world.is_main else None
        progress = Progress(world, config.epochs, len(sampler), view)
        first_step = step
        may_exit = blame_model(config.model, "ended the training; the last checkpoint stands", ())
        with log, closing(progress), may_pass_once(lambda: step > first_step), may_exit:
            stop.deferred = True  # from here on, a signal takes effect after the current step
            log.start(step=step, precision=precision, torch=torch.__version__, **world.describe())
            resumed, ended = run.resumed or {}, step // len(sampler) - 1
            train_loss: Any = resumed.get("train_loss")
            images_per_s: Any = resumed.get("images_per_s")
            evaluation = None
            between = train_loss is not None and step % len(sampler) == 0
            if between and world.max(world.is_main and not log.has_epoch(ended)):
                # It was killed after that epoch's checkpoint and before its test.
                metrics = EpochMetrics(ended, config.global_batch_size, world, log, progress)
                evaluation = test()
            for epoch in range(step // len(sampler), config.epochs):
                model.train()
                sampler.set_epoch(epoch, start_step=step % len(sampler))
                augment = (config.seed, epoch) if config.augment else None
                metrics = EpochMetrics(epoch, config.global_batch_size, world, log, progress)
                for indices in sampler:
                    began_s = time.perf_counter()
                    lr = set_learning_rate(optimizer, config, step, total_steps)
                    # For dropout: depends only on the step, so resuming needs no state.
                    torch.manual_seed(((config.seed * 1_000_003 + step) * 1_000_003 + world.rank) % 2**63)
                    x, y = make_batch(data.train, indices, data, world.device, dtype, augment)
                    data_s = time.perf_counter() - began_s
                    loss = torch.zeros((), dtype=torch.float64, device=world.device)
                    for number, (xs, ys) in enumerate(micro_batches(x, y, config.accumulate), 1):
                        last = number == config.accumulate
                        with gradient_sync(net, on=last):
                            with autocast(precision, world.device):
                                logits = net(xs).to(dtype)
                            part = F.cross_entropy(logits, ys, label_smoothing=config.label_smoothing)
                            loss += part.detach() * (len(ys) / len(y))
                            if last:  # one small all-reduce that hides behind backward
                                due = time.monotonic() - saved_s > config.checkpoint_every_s
                                status = all_reduce_status(loss, stop.requested, due, world)
                            # DDP averages the gradients over the ranks here: each image counts alike.
                            (part * (len(ys) * world.world_size / config.global_batch_size)).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    signal_and_due = metrics.record(step, len(indices), lr, data_s, loss, status)
                    step += 1
                    stop_or_save(*signal_and_due)
                stop_or_save(*metrics.flush())
                train_loss, images_per_s = metrics.totals()
                check_replicas(model, world, partial(log.digest, step))
                save()
                evaluation = test()
            # None if the run was killed between its last checkpoint and its results.
            evaluation = evaluation or evaluate(model, data, world)
            summary = {
                "test_accuracy": evaluation.accuracy,
                "test_correct": evaluation.correct,
                "test_images": evaluation.images,
                "test_loss": evaluation.loss,
                "train_loss": train_loss,
                "images_per_s": images_per_s,
                # What using the model takes besides its weights: README, "Use the model".
                "classes": list(data.classes),
                "mean": list(data.mean),
                "std": list(data.std),
                "epochs": config.epochs,
                "steps": step,
                "world_size": world.world_size,
                "backend": world.backend,
                "precision": precision,
                "weights_sha256": weights_sha256(model, world, buffers=True),
                "versions": world.versions,
            }
            if world.is_main:
                write_results(run.folder, copy_state(model), summary)
                progress.say(f"{evaluation}; model in {run.named}/cifar_net.pth")
            log.end(step, "finished")
            run.checkpoint.sync_logs()
            return summary


def load_same_data(config: TrainConfig, world: World, data: Dataset | None) -> Dataset:
    """`data`, or what config names. UserError, on every rank, if ranks differ in flags or data."""
    equal = {f"--{n.replace('_', '-')}": v for n, v in asdict(config).items() if n not in PER_MACHINE}
    compare(world, "flags", equal, "give every machine the same", config.join_timeout_s)
    if data is None:
        data = load_own_data(config, partial(world.say, every_node=True))
    images = {"the number of training images": len(data.train), "the digest of the data": data.digest[:16]}
    compare(world, "data", images, "copy the same data to every machine", config.data_timeout_s)
    return data


def load_own_data(config: TrainConfig, log: Callable[[str], None]) -> Dataset:
    """The data set that `config` names, as this machine has it."""
    return load_dataset(
        config.data, config.data_dir, config.data_timeout_s, log, image_size=config.image_size
    )


def make_replica(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    data: Dataset,
    share: int,
    precision: str,
    resumed: dict[str, Any] | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`model` wrapped in DDP, and its optimizer, from the checkpoint if any."""
    torch.backends.cudnn.deterministic = True
    if config.init_from and not resumed:
        checkpoint_file.load_weights(config.init_from, model)
    if config.compile:
        model.compile()
    optimizer = make_optimizer(config, model)
    net = wrap(model, world)
    dtype = next(model.parameters()).dtype
    x, _ = make_batch(data.train, torch.arange(share), data, world.device, dtype)
    try:
        with autocast(precision, world.device):
            warm_up(net, x)
    except RuntimeError as error:
        cure = compile_cure(error) if config.compile else None
        if cure is None:
            raise
        raise UserError(
            f"--compile True: the model cannot be compiled here ({first_line(error)}): {cure}"
        ) from error
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
    return net, optimizer


def run(config: TrainConfig) -> int:
    """Trains as a rank in this process; returns the exit status.

    0: done; 2: UserError, printed in one line; 128 + n: stopped by signal n, after a checkpoint.
    """
    with (
        as_exit_status() as outcome,
        StopSignal() as stop,
        World.join(
            backend=config.backend, join_timeout_s=config.join_timeout_s, timeout_s=config.timeout_s
        ) as world,
        outcome.reported_first(world.store_group.published_error, world.store_group.silent_ranks),
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        fit(config, world, stop)
    return outcome.status


def main(argv: list[str] | None = None) -> int:
    """Runs a rank that torchrun, SLURM or a user has started; `argv`: its flags."""
    with as_exit_status() as outcome:
        require_working_directory()
        outcome.status = run(parse(TrainConfig, argv, "ddp_lib.train"))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
