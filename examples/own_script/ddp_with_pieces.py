"""ddp.py with this package's pieces: it goes on after a kill with the same bits, logs each rank's loss, and
measures exactly.

ddp-launch run ddp_with_pieces.py --data FOLDER --run-dir runs/mine   one rank per GPU of this machine
ddp-launch plot runs/mine

Start the same command again after a kill: it resumes in the middle of the epoch. python alone runs it on one
device. Each piece works without the others.
"""

import argparse
import hashlib
import math
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from ddp_lib import (
    Checkpoint,
    Metrics,
    RunLog,
    SeededDataset,
    StopSignal,
    TrainSampler,
    UserError,
    World,
    check_replicas,
    eval_batches,
    share_buffers,
    warm_up,
    wrap,
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/mine"), help="checkpoint, logs, best.pth")
    parser.add_argument("--resume", choices=["auto", "never", "must"], default="auto")
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, help="steps between checkpoints; take minutes"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-amp", action="store_true", help="compute in float32 only")
    return parser.parse_args(argv)


def load_data(args: argparse.Namespace) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    """The training images, augmented at random, and the test images."""
    numbers = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    augment = [transforms.RandomResizedCrop(args.image_size, (0.5, 1.0)), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(args.image_size), transforms.CenterCrop(args.image_size)]
    return (
        datasets.ImageFolder(str(args.data / "train"), transforms.Compose(augment + numbers)),
        datasets.ImageFolder(str(args.data / "test"), transforms.Compose(centre + numbers)),
    )


def leave_signals_to_the_rank(worker: int) -> None:
    """torchrun and SLURM send a stop signal to all processes of a rank. Those that read images must live
    until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def make_loaders(
    args: argparse.Namespace, world: World, train_data: Dataset, test_data: Dataset
) -> tuple[DataLoader, DataLoader]:
    loading = {"num_workers": args.workers, "pin_memory": world.device.type == "cuda"}
    loading["persistent_workers"] = args.workers > 0  # else each epoch forks new ones
    loading["worker_init_fn"] = leave_signals_to_the_rank
    ranks = world.rank, world.world_size
    sampler = TrainSampler(len(train_data), args.batch_size, *ranks, args.seed, with_epoch=True)
    train_loader = DataLoader(SeededDataset(train_data, args.seed), batch_sampler=sampler, **loading)
    # Batches of a fixed size: the bits of the results do not depend on the number of ranks.
    test_batches = [batch.tolist() for batch in eval_batches(len(test_data), 32, *ranks)]
    return train_loader, DataLoader(test_data, batch_sampler=test_batches, **loading)


def digest(folder: Path) -> str:
    """Changes with the names and sizes of the files: a run does not go on with other files."""
    files = [(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*.*")]
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2))


def make_model(classes: int) -> nn.Module:
    return nn.Sequential(
        *(block(3, 32), block(32, 64), block(64, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, classes)),
    )


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, world: World) -> float:
    """The accuracy, exact over all ranks; it does not depend on their number."""
    share_buffers(model, world)  # BatchNorm's running statistics differ; rank 0's go to all
    model.eval()
    metrics = Metrics(world, "accuracy")
    for x, y in loader:
        right = model(x.to(world.device)).argmax(dim=1) == y.to(world.device)
        metrics.add("accuracy", right.sum(), len(y))
    return metrics.means()["accuracy"]


def train(args: argparse.Namespace, data: tuple, world: World, stop: StopSignal) -> None:
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    torch.backends.cudnn.deterministic = True  # the same bits on a GPU after a restart
    train_loader, test_loader = make_loaders(args, world, *data)
    sampler = train_loader.batch_sampler

    model = make_model(len(data[0].classes)).to(world.device)
    net = wrap(model, world)
    half = torch.float16 if world.device.type == "cuda" else torch.bfloat16
    # Before the first step, so that after a restart DDP adds the gradients up in the same order.
    with torch.autocast(world.device.type, half, enabled=not args.no_amp):
        warm_up(net, next(model.parameters()).new_zeros(2, 3, args.image_size, args.image_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(sampler))
    scaler = torch.amp.GradScaler(world.device.type, enabled=half is torch.float16 and not args.no_amp)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    epoch, step, best = 0, 0, -1.0
    flags = {
        name: getattr(args, name) for name in ("batch_size", "image_size", "epochs", "lr", "seed", "no_amp")
    }

    def same_flags(state: dict) -> None:
        if state["flags"] != flags:
            raise UserError(
                f"{args.run_dir} was begun with {state['flags']}: give the same, or --resume never"
            )

    def save() -> None:
        share_buffers(model, world)  # BatchNorm's are rank 0's
        states = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.save({**states, "epoch": epoch, "step": step, "best": best, "flags": flags}, step)

    with (
        Checkpoint(args.run_dir, world, digest(args.data), resume=args.resume) as checkpoint,
        RunLog(args.run_dir, world.rank) as log,
    ):
        if state := checkpoint.load(same_flags):
            for name, part in parts.items():
                if state[name]:  # a scaler's is empty on a CPU
                    part.load_state_dict(state[name])
            epoch, step, best = state["epoch"], state["step"], state["best"]
            world.say(f"resuming at step {step}")
        log.start(step=step, **world.describe())
        stop.deferred = True  # from here on, a signal takes effect after the current step
        while epoch < args.epochs:
            sampler.set_epoch(epoch, start_step=step - epoch * len(sampler))
            net.train()
            log.start_timer()
            for x, y in train_loader:
                # For dropout. It depends only on the step, so a resumed run draws the same; the large factor
                # gives each step and rank a seed of its own.
                torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + world.rank) % 2**63)
                lr = schedule.get_last_lr()[0]
                x, y = x.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)
                with torch.autocast(world.device.type, half, enabled=not args.no_amp):
                    loss = F.cross_entropy(net(x), y)
                # Each image counts alike, also if some ranks have one more than others.
                scaler.scale(loss * (len(y) * world.world_size / args.batch_size)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
                # On a GPU, item() and max() wait for the step. If a step takes only some milliseconds, call
                # them less often.
                log.step(epoch, step, samples=len(y), loss=loss.item(), lr=lr)
                if not math.isfinite(loss.item()):  # before anything is saved
                    raise UserError(f"the loss is {loss.item()} at step {step}: the last checkpoint stands")
                step += 1
                stopped = world.max(stop.requested)  # all ranks stop at the same step
                if stopped or step % args.checkpoint_every == 0:
                    save()
                if stopped:
                    log.end(step, f"signal {stopped}")
                    checkpoint.sync_logs()
                    raise SystemExit(128 + stopped)
            check_replicas(model, world)
            accuracy = validate(model, test_loader, world)
            if world.is_main:
                log.epoch(epoch, step, test_accuracy=accuracy)
            world.say(f"epoch {epoch + 1}: test accuracy {accuracy:.2%}")
            if accuracy > best and checkpoint.is_writer:  # on each machine: rank 0 may move
                torch.save(model.state_dict(), args.run_dir / "best.tmp")
                (args.run_dir / "best.tmp").replace(args.run_dir / "best.pth")
            best = max(best, accuracy)
            epoch += 1
            save()
            checkpoint.sync_logs()
        log.end(step, "finished")
        checkpoint.sync_logs()
        world.say(f"done: best accuracy {best:.2%}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data = load_data(args)  # before the ranks meet: they wait for each other only --timeout-s long
    with StopSignal() as stop, World.join() as world:
        train(args, data, world, stop)


if __name__ == "__main__":
    main()
