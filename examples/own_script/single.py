"""Trains a classifier of images on one device: the kind of script that most people have.

python single.py --data FOLDER      FOLDER holds train/<class>/* and test/<class>/*, images of any size

ddp.py is the same script for several machines; ddp_with_pieces.py adds restarts, logs and exact metrics.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for best.pth")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
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


def make_loaders(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, DataLoader]:
    train_data, test_data = load_data(args)
    loading = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    loading["persistent_workers"] = args.workers > 0  # else each epoch forks new ones
    train_loader = DataLoader(train_data, args.batch_size, shuffle=True, drop_last=True, **loading)
    return train_loader, DataLoader(test_data, args.batch_size, **loading)


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
    """The numbers of right answers and of images."""
    model.eval()
    right = count = 0
    for x, y in loader:
        right += (model(x.to(device)).argmax(dim=1) == y.to(device)).sum().item()
        count += len(y)
    return right, count


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, test_loader = make_loaders(args, device)
    if not len(train_loader):
        raise SystemExit(f"{args.data} has fewer training images than --batch-size {args.batch_size}")
    model = make_model(len(train_loader.dataset.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_loader))
    # Half precision: float16 needs its losses scaled up; a CPU's bfloat16 does not.
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16 and not args.no_amp)
    args.out.mkdir(parents=True, exist_ok=True)
    best = -1

    for epoch in range(args.epochs):
        model.train()
        loss_sum = 0.0
        for x, y in train_loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, half, enabled=not args.no_amp):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
            loss_sum += loss.item()
        right, count = validate(model, test_loader, device)
        loss_mean = loss_sum / len(train_loader)
        print(f"epoch {epoch + 1}: loss {loss_mean:.4f}, {right} of {count} right", flush=True)
        if right > best:
            best = right
            torch.save(model.state_dict(), args.out / "best.pth")


if __name__ == "__main__":
    main()
