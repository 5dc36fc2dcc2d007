"""Decoded data sets on disk: made by one process of a machine, memory-mapped by all of them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddp_lib.errors import UserError

SIDE = 32  # height and width of every image, in pixels
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
META = "meta.json"

Meta = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """A data set in memory. images: uint8 (N, 32, 32, 3); labels: int64 (N,)."""

    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_or_make(
    cache: Path,
    made_from: str,
    make: Callable[[], Raw],
    timeout_s: float,
    log: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], Meta]:
    """The four ARRAYS as memory-mapped tensors, and classes, mean, std and digest by name.

    `made_from` tells whether the folder `cache` still holds what is wanted; if it does not, is not
    there or not whole, one process calls `make` and the others wait for it up to `timeout_s`.
    UserError where the disk refuses or the wait is too long.
    """
    meta = read_meta(cache, made_from)
    try:
        if meta is None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(cache, timeout_s, log):
                meta = read_meta(cache, made_from)  # another may have made it in the meantime
                if meta is None:
                    _write(cache, made_from, make())
                    meta = read_meta(cache, made_from)
                    assert meta is not None
        # Mode "c", copy on write: torch warns of read-only arrays, and unwritten pages are shared.
        arrays = {name: np.load(cache / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
    except OSError as error:
        raise UserError(
            f"cannot keep the data set in {cache} ({error.strerror or error}): free or unlock the "
            "disk, or give another --data-dir"
        ) from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, meta


@contextmanager
def _one_at_a_time(cache: Path, timeout_s: float, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the cache's file lock, which the system frees even if its holder is killed."""
    import filelock

    lock = filelock.FileLock(cache.with_name(f"{cache.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log(f"data: waiting for the process that makes {cache}, up to {timeout_s:g} s")
            lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        raise UserError(
            f"another process has been making {cache} for more than {timeout_s:g} s: look at that "
            "one, or give a larger --data-timeout-s"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_meta(cache: Path, made_from: str) -> Meta | None:
    """What is noted in a cache that is whole and was made from what is wanted now; else None."""
    try:
        meta: Meta = json.loads((cache / META).read_text(encoding="utf-8"))
        return meta if (meta["made_from"], meta["bytes"]) == (made_from, _sizes(cache)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS}


def _write(cache: Path, made_from: str, raw: Raw) -> None:
    """Writes the cache under a temporary name, then renames it: nobody ever reads half of one."""
    for left_over in cache.parent.glob(f".{cache.name}.*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{cache.name}.", dir=cache.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would hide it from another user's job
        digest = hashlib.sha256(json.dumps(raw.classes).encode())
        for name in ARRAYS:
            array = np.ascontiguousarray(getattr(raw, name))
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.data)
            with open(folder / f"{name}.npy", "wb") as file:
                # What np.save does, except that its error for a full disk does not say so.
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, header)
                file.write(array.data)
                file.flush()
                os.fsync(file.fileno())
        mean, std = mean_and_std(raw.train_images)
        meta = {
            "classes": raw.classes,
            "mean": mean,
            "std": std,
            "digest": digest.hexdigest(),
            "made_from": made_from,
            "bytes": _sizes(folder),
        }
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        shutil.rmtree(cache, ignore_errors=True)  # damaged, or made from what has changed since
        os.replace(folder, cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each channel of uint8 images (N, H, W, 3), on a scale of 0..1, from exact integer sums."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for first in range(0, len(images), 2000):  # in pieces: bincount makes int64 copies
        for channel in range(3):
            pixels = images[first : first + 2000, :, :, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    # One flat colour must not divide by zero: no less than a step of 8 bits.
    return mean.tolist(), np.maximum(np.sqrt(variance), 1 / 255).tolist()
