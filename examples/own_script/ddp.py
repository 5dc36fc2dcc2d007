"""single.py on several machines, in plain PyTorch. Each line that is new or changed has `# DDP` on it.

ddp-launch run ddp.py --data FOLDER                                         one rank per GPU
ddp-launch run --nnodes 2 --rdzv-endpoint HOST:29500 ddp.py --data FOLDER   on each of 2 machines

torchrun starts it too (torchrun --nproc-per-node 2 ddp.py ...), but not python alone. After a crash it starts
from the beginning; ddp_with_pieces.py resumes. best.pth is written on rank 0's machine. FOLDER holds
train/<class>/* and test/<class>/*: the same images at the same path on every machine.
"""

import argparse
import gc  # DDP
import os  # DDP
from datetime import timedelta  # DDP
from pathlib import Path

import torch
import torch.distributed as dist  # DDP
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel  # DDP
from torch.utils.data import DataLoader, DistributedSampler, Subset  # DDP
from torchvision import datasets, transforms


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for best.pth")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")  # DDP
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-amp", action="store_true", help="compute in float32 only")
    parser.add_argument("--timeout-s", type=float, default=600, help="of each collective")  # DDP
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


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, DataLoader]:
    rank, world_size = dist.get_rank(), dist.get_world_size()  # DDP
    if args.batch_size % world_size:  # DDP
        raise SystemExit(f"--batch-size {args.batch_size} is not divisible by {world_size} ranks")  # DDP
    batch_size = args.batch_size // world_size  # DDP
    train_data, test_data = load_data(args)
    # DDP: with other images on a machine, ranks would wait for each other, or learn wrong labels.
    seen = [None] * world_size  # DDP
    dist.all_gather_object(seen, (len(train_data), train_data.classes, len(test_data)))  # DDP
    if any(other != seen[0] for other in seen):  # DDP
        raise SystemExit(f"the machines' images in {args.data} differ: {seen}")  # DDP
    loading = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    loading["persistent_workers"] = args.workers > 0  # else each epoch forks new ones
    sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)  # DDP: shuffles, then shares out
    train_loader = DataLoader(train_data, batch_size, sampler=sampler, drop_last=True, **loading)  # DDP
    # DDP: a DistributedSampler would count some test images twice, to give each rank the same number.
    test_part = Subset(test_data, range(rank, len(test_data), world_size))  # DDP
    return train_loader, DataLoader(test_part, batch_size, **loading)  # DDP


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2))


def make_model(classes: int) -> nn.Module:
    return nn.Sequential(
        *(block(3, 32), block(32, 64), block(64, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, classes)),
    )


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, device: torch.device) -> tuple[int, int]:
    """The numbers of right answers and of images, exact over all ranks."""  # DDP
    for buffer in model.buffers():  # DDP: BatchNorm's running statistics differ; rank 0's go to all
        dist.broadcast(buffer, 0)  # DDP
    model.eval()
    right = count = 0
    for x, y in loader:
        right += (model(x.to(device)).argmax(dim=1) == y.to(device)).sum().item()
        count += len(y)
    return int(sum_over_ranks(right, device)), int(sum_over_ranks(count, device))  # DDP


def sum_over_ranks(number: float, device: torch.device) -> float:  # DDP
    total = torch.tensor(number, dtype=torch.float64, device=device)  # DDP
    dist.all_reduce(total)  # DDP
    return total.item()  # DDP


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)  # DDP: the same initial weights on every rank
    if torch.cuda.is_available():  # DDP: each rank has its own GPU
        # DDP: a rank that is shown a single GPU, its own, counts it as number 0
        number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()  # DDP
        device = torch.device("cuda", number)  # DDP
        torch.cuda.set_device(device)  # DDP
    else:  # DDP
        device = torch.device("cpu")  # DDP
    # DDP: all ranks meet here; gloo then sends tensors of the CPU, NCCL those of GPUs.
    dist.init_process_group(timeout=timedelta(seconds=args.timeout_s))  # DDP
    rank, world_size = dist.get_rank(), dist.get_world_size()  # DDP
    train_loader, test_loader = make_loaders(args, device)
    if not len(train_loader):
        raise SystemExit(f"{args.data} has fewer training images than --batch-size {args.batch_size}")
    model = make_model(len(train_loader.dataset.classes)).to(device)
    # DDP: train through net; save and validate model, whose parameters' names have no `module.` in front.
    net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)  # DDP
    torch.manual_seed(args.seed * 1000 + 1 + rank)  # DDP: other crops and another dropout on each rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_loader))
    # Half precision: float16 needs its losses scaled up; a CPU's bfloat16 does not.
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16 and not args.no_amp)
    args.out.mkdir(parents=True, exist_ok=True)
    best = -1

    for epoch in range(args.epochs):
        train_loader.sampler.set_epoch(epoch)  # DDP: another order in each epoch
        net.train()  # DDP
        loss_sum = 0.0
        for x, y in train_loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, half, enabled=not args.no_amp):
                loss = F.cross_entropy(net(x), y)  # DDP
            scaler.scale(loss).backward()  # DDP averages the gradients over all ranks here
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            loss_sum += loss.item()
        right, count = validate(model, test_loader, device)
        loss_mean = sum_over_ranks(loss_sum, device) / world_size / len(train_loader)  # DDP
        if rank == 0:  # DDP
            print(f"epoch {epoch + 1}: loss {loss_mean:.4f}, {right} of {count} right", flush=True)  # DDP
        if right > best:  # DDP: the same on every rank
            best = right
            if rank == 0:  # DDP
                torch.save(model.state_dict(), args.out / "best.pth")
    # DDP: the wrapper must be gone before the group is, or gloo's threads may abort the process at its end.
    del net  # DDP
    gc.collect()  # DDP
    dist.destroy_process_group()  # DDP


if __name__ == "__main__":
    main()
