"""What is the same for all contenders: images, model, optimizer, batch, and how they report.

torchrun starts each contender on two ranks with one thread each. The contender trains `--steps` steps on
images that torchvision's transforms augment one at a time, as introductions show it. With `--fast` it does
what a person who knows PyTorch would add: bf16 autocast, the layout channels_last, and images that stay
tensors from the start. Rank 0 prints one JSON line: when each step ended, in seconds. With `--epochs` it
trains whole epochs on `--data` instead, and reports the seconds spent training and the accuracy after each
epoch.
"""

import argparse
import json
import os
import random
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision import transforms
from torchvision.transforms.functional import normalize

from ddp_lib import SimpleModel, TrainConfig
from ddp_lib.data.dataset import Split, load_dataset

GLOBAL_BATCH = TrainConfig().global_batch_size
PADDING = 2  # as `fit` has it
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


class TensorDataset(Dataset):
    """The same images, padded once, cropped and flipped as uint8 tensors; float and normalised as a batch."""

    def __init__(self, split: Split, padding: int) -> None:
        self.images = F.pad(split.images.permute(0, 3, 1, 2), (padding,) * 4)
        self.labels, self.choices = split.labels.tolist(), 2 * padding + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left, flip = (random.randrange(n) for n in (self.choices, self.choices, 2))
        image = self.images[index, :, top : top + 32, left : left + 32]
        return image.flip(2) if flip else image, self.labels[index]


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
        parser.add_argument("--fast", action="store_true")
        self.options = parser.parse_args()
        self.config = TrainConfig()
        torch.manual_seed(self.options.seed)
        random.seed(self.options.seed)
        self.data = load_dataset(self.options.data, self.options.data_dir, log=lambda line: None)
        self.ended: list[float] = []

    def model(self) -> torch.nn.Module:
        model = SimpleModel(len(self.data.classes))
        return model.to(memory_format=torch.channels_last) if self.options.fast else model

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.fast)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            nesterov=True,
        )

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def train_set(self) -> Dataset:
        if self.options.fast:
            return TensorDataset(self.data.train, PADDING)
        return PictureDataset(
            self.data.train,
            transforms.Compose(
                [
                    transforms.RandomCrop(32, padding=PADDING),
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
            collate_fn=self.normalised if self.options.fast else None,
        )

    def normalised(self, samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of a TensorDataset's samples, float32 in the layout channels_last, and its labels."""
        images, labels = default_collate(samples)
        images = images.to(memory_format=torch.channels_last).float().div_(255)
        return normalize(images, self.data.mean, self.data.std, inplace=True), labels

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
