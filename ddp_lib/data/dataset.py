"""Data sets as uint8 tensors, shared by a machine's ranks."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddp_lib.data import shapes
from ddp_lib.data.cache import ARRAYS, RawDataset, cache_lock, find_cache, write_cache
from ddp_lib.data.cifar10 import cifar10
from ddp_lib.data.image_folder import find_images
from ddp_lib.errors import TransientError, UserError


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, S, S, 3), memory-mapped, S pixels square; labels: int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Two splits, and what training needs to know about them.

    `classes[label]` is a label's name. `mean` and `std` are per channel (red, green, blue) over the training
    images, on a scale of 0..1. `digest` is a SHA-256 of everything: if it is equal, the data is equal.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str

    def to_device(self, device: torch.device) -> "Dataset":
        """A copy whose tensors are on `device` if that is a GPU with room for them; else this data set. On a
        GPU, make_batch makes the batches there. The images must fit into a quarter of its free memory."""
        splits = (self.train, self.test)
        nbytes = sum(split.images.nbytes for split in splits)
        if device.type != "cuda" or 4 * nbytes > torch.cuda.mem_get_info(device)[0]:
            return self
        train, test = (Split(split.images.to(device), split.labels.to(device)) for split in splits)
        return replace(self, train=train, test=test)


def load_dataset(
    source: str,
    data_dir: str | Path = "data",
    timeout_s: float = 600.0,
    log: Callable[[str], None] = print,
    download_timeout_s: float = 30.0,
    image_size: int = 32,
) -> Dataset:
    """The data set `shapes`, `cifar10`, or a folder that holds train/<class>/* and test/<class>/* (or val/).

    The first process on a machine writes the arrays to `<data_dir>/cache`. The others, those of other jobs
    included, wait for it, up to `timeout_s` seconds. Then all map the same files, so that the images are in
    memory once per machine, however many ranks there are. Needs no process group. image_size: pixels square
    to which the images of a folder are resized; the other two have 32.

    UserError if the source is missing or unusable, the download fails, the disk is full or cannot be written,
    or the wait times out.
    """
    data_dir = Path(data_dir).expanduser()
    cache_name, made_from, make = _resolve_source(source, data_dir, image_size, download_timeout_s, log)
    cache = data_dir / "cache" / cache_name
    try:
        meta = find_cache(cache, made_from)
        if meta is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache_lock(cache, timeout_s, log):
                # Another process may have made it meanwhile.
                meta = find_cache(cache, made_from) or write_cache(cache, made_from, make())
        # "c" is copy on write: all processes share the pages, and torch does not warn of a read-only array.
        arrays = [torch.from_numpy(np.load(cache / f"{name}.npy", mmap_mode="c")) for name in ARRAYS]
    except OSError as error:
        kind = TransientError if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
        raise kind(
            f"cannot keep the data set in {cache} ({error.strerror or error}): free or unlock the disk, or "
            "give another --data-dir"
        ) from None
    mean, std = tuple(meta["mean"]), tuple(meta["std"])
    train, test = Split(*arrays[:2]), Split(*arrays[2:])
    return Dataset(source, tuple(meta["classes"]), train, test, mean, std, meta["digest"])


def digest_of(source: str, data_dir: str | Path = "data", image_size: int = 32) -> str:
    """The first 12 digits of the digest of a data set that `load_dataset` has cached on this machine.

    If it is not cached yet: the version for "shapes", which is the same everywhere, and "not ready" for
    everything else. UserError if the folder is missing or unusable.
    """
    data_dir = Path(data_dir).expanduser()
    cache_name, made_from, _ = _resolve_source(source, data_dir, image_size, 0, lambda text: None)
    meta = find_cache(data_dir / "cache" / cache_name, made_from)
    if meta is None:
        return made_from if source == "shapes" else "not ready"
    return str(meta["digest"])[:12]


def _resolve_source(
    source: str, data_dir: Path, image_size: int, download_timeout_s: float, log: Callable[[str], None]
) -> tuple[str, str, Callable[[], RawDataset]]:
    """The name of the source's cache, what the cache must have been made from, and how to make it."""
    if source in ("shapes", "cifar10") and image_size != 32:
        raise UserError(
            f"--image-size {image_size}: the images of --data {source} have 32 pixels; leave the flag out, "
            "or name a folder of images"
        )
    if source == "shapes":
        return "shapes", f"shapes version {shapes.VERSION}", _make_shapes
    if source == "cifar10":
        return "cifar10", "cifar10", partial(cifar10, data_dir, download_timeout_s, log)
    return find_images(Path(source).expanduser(), image_size, log)


def _make_shapes() -> RawDataset:
    train = shapes.make_shapes(shapes.TRAIN_IMAGES, shapes.TRAIN_SEED)
    test = shapes.make_shapes(shapes.TEST_IMAGES, shapes.TEST_SEED)
    return RawDataset(shapes.CLASSES, *train, *test)
