"""train.py of this folder for several machines: the course's 09_your_own_script gets there step by step.

python train_ddp.py --data FOLDER                                                  one process
torchrun --nproc-per-node 2 train_ddp.py --data FOLDER                             two, by torch's launcher
ddp-launch run --nnodes 2 --rdzv-endpoint HOST:29500 train_ddp.py --data FOLDER    on each of 2 machines

FOLDER holds train/<class>/* and test/<class>/*. The same command again resumes after the last whole epoch.
"""

import argparse
import gc
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from tqdm import tqdm


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=24, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes per rank that read images")
    return parser.parse_args(argv)


def join():
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group()
    else:  # started by python alone: a group of one
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return device


class Pictures(Dataset):
    def __init__(self, folder, flip):
        files = sorted(folder.glob("*/*"))  # the same order on every machine
        self.classes = sorted({file.parent.name for file in files})
        self.items = [(file, self.classes.index(file.parent.name)) for file in files]
        self.flip = flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        image = Image.open(path).convert("RGB").resize((32, 32))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        if self.flip and torch.rand(1) < 0.5:
            x = x.flip(2)
        return x, label


def make_loaders(args):
    train_data = Pictures(args.data / "train", flip=True)
    test_data = Pictures(args.data / "test", flip=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.batch_size % ranks:
        raise SystemExit(f"--batch-size {args.batch_size} is not divisible by {ranks} ranks")
    loading = {"batch_size": args.batch_size // ranks, "num_workers": args.workers}
    loading |= {"persistent_workers": args.workers > 0, "pin_memory": torch.cuda.is_available()}
    sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
    test_part = Subset(test_data, range(rank, len(test_data), ranks))  # each image on one rank
    train_loader = DataLoader(train_data, sampler=sampler, drop_last=True, **loading)
    return train_loader, DataLoader(test_part, **loading)


@torch.no_grad()
def count_right(model, loader, device):
    model.eval()
    right = torch.zeros(1, dtype=torch.int64, device=device)
    for x, y in loader:
        right += (model(x.to(device)).argmax(1) == y.to(device)).sum()
    dist.all_reduce(right)
    return right.item()


def save(state, path):
    if dist.get_rank() == 0:
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # all or nothing


def load(path):
    here = dist.get_rank() == 0 and path.exists()
    state = [torch.load(path, map_location="cpu", weights_only=True) if here else None]
    dist.broadcast_object_list(state, 0)  # the same for all, or None for all
    return state[0]


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def main(argv=None):
    args = parse(argv)
    device = join()
    train_loader, test_loader = make_loaders(args)
    torch.manual_seed(args.seed)  # the same first weights everywhere
    convolution = nn.Conv2d(3, 8, 5, stride=3)
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(800, 3))
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    args.out.mkdir(parents=True, exist_ok=True)
    first, best, images = 0, 0, len(test_loader.dataset.dataset)
    if state := load(args.out / "checkpoint.pt"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, best = state["epoch"], state["best"]
        say(f"resuming after epoch {first}")
    net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    for epoch in range(first, args.epochs):
        train_loader.sampler.set_epoch(epoch)  # another order in each epoch
        torch.manual_seed((args.seed * 1000 + epoch) * 1000 + dist.get_rank())  # other flips per rank
        net.train()
        loss_sum = torch.zeros(1, device=device)
        for x, y in tqdm(train_loader, disable=None if dist.get_rank() == 0 else True):
            x, y = x.to(device), y.to(device)
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach()
        dist.all_reduce(loss_sum)
        loss_mean = loss_sum.item() / dist.get_world_size() / len(train_loader)
        right = count_right(model, test_loader, device)
        say(f"epoch {epoch + 1}: loss {loss_mean:.4f}, {right} of {images} right")
        if right > best:
            best = right
            save(model.state_dict(), args.out / "best.pt")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "epoch": epoch + 1, "best": best}, args.out / "checkpoint.pt")
    say(f"done: {best} of {images} right")
    del net
    gc.collect()  # the wrapper must be gone before the group is
    dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
