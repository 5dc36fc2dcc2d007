"""Data sets as uint8 tensors, shared by a machine's ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ddp_lib.data import shapes
from ddp_lib.data.cache import Raw, load_or_make, read_meta
from ddp_lib.data.cifar10 import cifar10
from ddp_lib.data.image_folder import find_images


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, 32, 32, 3), memory-mapped; labels: int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Two splits, and what training needs to know of them.

    `classes[label]` is a label's name. `mean` and `std` are those of red, green and blue in the
    training images, on a scale of 0..1. `digest` is a SHA-256 of everything: two machines where it
    is equal hold equal data.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str

    def to_device(self, device: torch.device) -> "Dataset":
        """The same; on a GPU with room for the images they are in its memory, and batches are made there."""
        if device.type != "cuda":
            return self
        parts = (self.train, self.test)
        if 4 * sum(part.images.nbytes for part in parts) > torch.cuda.mem_get_info(device)[0]:
            return self
        train, test = (Split(part.images.to(device), part.labels.to(device)) for part in parts)
        return replace(self, train=train, test=test)


def load_dataset(
    source: str,
    data_dir: str | Path = "data",
    timeout_s: float = 600.0,
    log: Callable[[str], None] = print,
    download_timeout_s: float = 30.0,
) -> Dataset:
    """The data set `shapes`, `cifar10`, or of a folder with train/<class>/* and test/<class>/*.

    The first process of a machine to come makes the arrays in `<data_dir>/cache`; others, also
    those of other jobs, wait for it up to `timeout_s`. Then all map the same files, so that the
    images lie in memory once however many ranks there are. Needs no process group.

    UserError for a source that is missing or unusable, a failed download, a disk that refuses, or a
    wait that takes too long.
    """
    data_dir = Path(data_dir).expanduser()
    key, made_from, make = _find(source, data_dir, download_timeout_s, log)
    arrays, meta = load_or_make(data_dir / "cache" / key, made_from, make, timeout_s, log)
    return Dataset(
        name=source,
        classes=tuple(meta["classes"]),
        train=Split(arrays["train_images"], arrays["train_labels"]),
        test=Split(arrays["test_images"], arrays["test_labels"]),
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        digest=meta["digest"],
    )


def digest_of(source: str, data_dir: str | Path = "data") -> str:
    """The first letters of the data set's digest, as far as it is ready here: see `load_dataset`.

    "shapes", which is the same everywhere, has its version, and what is not decoded yet "not ready".
    UserError for a folder that is missing or unusable.
    """
    data_dir = Path(data_dir).expanduser()
    key, made_from, _ = _find(source, data_dir, 0, print)
    meta = read_meta(data_dir / "cache" / key, made_from)
    if meta is not None:
        return str(meta["digest"])[:12]
    return made_from if source == "shapes" else "not ready"


def _find(
    source: str, data_dir: Path, download_timeout_s: float, log: Callable[[str], None]
) -> tuple[str, str, Callable[[], Raw]]:
    """Name of its cache, what that must have been made from, and how to make it."""
    if source == "shapes":
        return "shapes", f"shapes version {shapes.VERSION}", _make_shapes
    if source == "cifar10":
        return "cifar10", "cifar10", partial(cifar10, data_dir, download_timeout_s, log)
    folder = find_images(Path(source).expanduser())
    return folder.key, folder.fingerprint, partial(folder.read, log)


def _make_shapes() -> Raw:
    return Raw(
        shapes.CLASSES,
        *shapes.make_shapes(shapes.TRAIN_IMAGES, shapes.TRAIN_SEED),
        *shapes.make_shapes(shapes.TEST_IMAGES, shapes.TEST_SEED),
    )
