"""Decoded data sets on disk: written by one process per machine, memory-mapped by all of them."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import Timeout

from ddp_lib.errors import TransientError
from ddp_lib.processes.file_lock import file_lock

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
META = "meta.json"
# A folder that nobody has written to for so long was left by a process that was killed.
_KILLED_S = 600.0


@dataclass(frozen=True)
class RawDataset:
    """A data set in memory. images: uint8 (N, S, S, 3); labels: int64 (N,)."""

    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def cache_lock(cache: Path, timeout_s: float, log: Callable[[str], None]) -> AbstractContextManager[object]:
    """Holds the cache's file lock, which the system releases even if the process is killed. UserError if
    another process holds it for more than `timeout_s` seconds."""
    path = cache.with_name(f"{cache.name}.lock")
    try:
        return file_lock(path)
    except Timeout:
        log(f"data: waiting for the process that makes {cache}, up to {timeout_s:g} s")
    try:
        return file_lock(path, timeout_s)
    except Timeout:
        raise TransientError(
            f"another process has been making {cache} for more than {timeout_s:g} s: check that process, or "
            "give a larger --data-timeout-s"
        ) from None


def _read_meta(cache: Path, made_from: str) -> dict[str, Any] | None:
    """The cache's metadata; None if it is missing or damaged, or the cache was not made from `made_from`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta: dict[str, Any] = json.loads((cache / META).read_text(encoding="utf-8"))
        seal = _seal(meta)  # caches of version 1.0 have none
        return meta if (meta["made_from"], meta.get("sha256", seal)) == (made_from, seal) else None
    return None


def find_cache(cache: Path, made_from: str) -> dict[str, Any] | None:
    """The metadata of a whole cache that was made from `made_from`, or None. The arrays are read for it only
    if something has touched or copied their files."""
    meta = _read_meta(cache, made_from)
    if meta is None:
        return None
    try:
        stamps = _stamps(cache)
        if meta.get("files") == stamps:
            return meta
        arrays = {name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        if _digest(meta["classes"], arrays) != meta["digest"]:
            return None
    except Exception:  # a damaged header fails in many ways
        return None
    with suppress(OSError):  # a folder that cannot be written is read whole each time
        _write_meta(cache, meta | {"files": stamps})
    return meta


def _stamps(cache: Path) -> dict[str, list[int]]:
    """Size and times of each array's file. Nobody can set the time of the last change of its inode."""
    statuses = {name: (cache / f"{name}.npy").stat() for name in ARRAYS}
    return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in statuses.items()}


def _seal(meta: dict[str, Any]) -> str:
    """Of everything in the metadata but the seal itself."""
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    temporary = folder / f"{META}.{os.getpid()}"
    temporary.write_text(json.dumps(meta | {"sha256": _seal(meta)}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / META)


def _digest(classes: Sequence[str], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def write_cache(cache: Path, made_from: str, raw: RawDataset) -> dict[str, Any]:
    """Writes the cache under a temporary name, then renames it, so that nobody reads half a cache. Returns
    the metadata."""
    prefix = f".{cache.name}."
    for unfinished in cache.parent.glob(f"{prefix}*"):
        with suppress(OSError):  # where there are no locks, another process may be at work on it
            if time.time() - unfinished.stat().st_mtime > _KILLED_S:
                shutil.rmtree(unfinished, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=cache.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # mkdtemp's 0700 would hide it from another user's job
        arrays = {name: np.ascontiguousarray(getattr(raw, name)) for name in ARRAYS}
        for name, array in arrays.items():
            with open(folder / f"{name}.npy", "wb") as file:
                # np.save would do the same, but its error for a full disk does not say so.
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
            "digest": _digest(raw.classes, arrays),
            "made_from": made_from,
            "files": _stamps(folder),
        }
        _write_meta(folder, meta)
        if meanwhile := find_cache(cache, made_from):
            return meanwhile
        shutil.rmtree(cache, ignore_errors=True)  # damaged, or made from a source that has changed
        os.replace(folder, cache)
    return meta


def mean_and_std(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, 3), on a scale of 0..1. Computed from
    exact integer counts, so they are the same on every machine."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for first in range(0, len(images), 2000):  # in pieces: bincount makes int64 copies
        for channel in range(3):
            pixels = images[first : first + 2000, :, :, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    values = np.arange(256) / 255
    frequency = counts / counts.sum(axis=1, keepdims=True)
    mean = frequency @ values
    variance = (frequency * (values - mean[:, None]) ** 2).sum(axis=1)
    # Images of a single colour must not lead to a division by zero: the least std is one 8-bit step.
    return mean.tolist(), np.maximum(np.sqrt(variance), 1 / 255).tolist()
