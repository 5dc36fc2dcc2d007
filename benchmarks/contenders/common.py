"""What is the same for all contenders: images, model, optimizer, batch, and how they report.

torchrun starts each contender on two ranks with one thread each. The contender trains `--steps` steps on
images that torchvision's transforms augment one at a time, as introductions show it. Rank 0 prints one
JSON line: when each step ended, in seconds. With `--epochs` it trains whole epochs on `--data` instead,
and reports the seconds spent training and the accuracy after each epoch.
"""

import argparse
import json
import os
import tempfile
import time
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from ddp_lib import SimpleModel, TrainConfig
from ddp_lib.data.dataset import Split, load_dataset

GLOBAL_BATCH = 128
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class PictureDataset(Dataset):
    """Like torchvision.datasets.CIFAR10: images in memory, one PIL image and one label per index."""

    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        self.images, self.labels = split.images.numpy().copy(), split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Job:
    """The parsed command line, and the parts that are the same for every contender."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--steps", type=int, default=0)
        parser.add_argument("--epochs", type=int, default=0)
        parser.add_argument("--workers", type=int, default=0)
        parser.add_argument("--data", default="shapes")
        parser.add_argument("--data-dir", default=tempfile.gettempdir())
        parser.add_argument("--seed", type=int, default=0)
        self.options = parser.parse_args()
        self.config = TrainConfig()
        torch.manual_seed(self.options.seed)
        self.data = load_dataset(self.options.data, self.options.data_dir, log=lambda line: None)
        self.ended: list[float] = []

    def model(self) -> torch.nn.Module:
        return SimpleModel(len(self.data.classes))

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            nesterov=True,
        )

    def train_set(self) -> PictureDataset:
        return PictureDataset(
            self.data.train,
            transforms.Compose(
                [
                    transforms.RandomCrop(32, padding=4),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(self.data.mean, self.data.std),
                ]
            ),
        )

    def loader(self, sampler: Any = None, shuffle: bool = False) -> DataLoader:
        """This rank's batches; without a sampler, the framework divides them among the ranks."""
        return DataLoader(
            self.train_set(),
            batch_size=GLOBAL_BATCH // WORLD_SIZE,
            sampler=sampler,
            shuffle=shuffle,
            num_workers=self.options.workers,
            persistent_workers=self.options.workers > 0 and self.options.epochs > 1,
            drop_last=True,
        )

    def distributed_loader(self) -> tuple[DataLoader, DistributedSampler]:
        sampler: DistributedSampler = DistributedSampler(
            range(len(self.data.train)),  # type: ignore[arg-type]
            WORLD_SIZE,
            RANK,
            seed=self.options.seed,
            drop_last=True,
        )
        return self.loader(sampler), sampler

    def step_ended(self) -> bool:
        """Records the time; returns whether this was the last of the `--steps` steps."""
        self.ended.append(time.perf_counter())
        return len(self.ended) >= self.options.steps

    def report(self, **more: Any) -> None:
        if RANK == 0:
            print(json.dumps({"ended": self.ended, **more}), flush=True)
