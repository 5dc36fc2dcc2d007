"""Your own images: a folder that holds train/<class>/* and test/<class>/*."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np

from ddp_lib.data.cache import RawDataset
from ddp_lib.distributed.device import usable_cores
from ddp_lib.errors import UserError

SUFFIXES = ".bmp .gif .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()


def find_images(
    root: Path, side: int, log: Callable[[str], None]
) -> tuple[str, str, Callable[[], RawDataset]]:
    """Lists root/train/<class>/* and root/test/<class>/* without opening an image.

    Returns the name of the folder's cache, different for each path; a fingerprint, which changes when a file
    is added, removed, renamed or changed; and a function that decodes the images, to `side` pixels square.

    UserError if a folder is missing, a class is empty, there are fewer than two classes, or train/ and test/
    have different ones.
    """
    if not root.is_dir():
        raise UserError(
            f"--data {str(root)!r} is not a folder here: give cifar10, shapes, or a folder that holds "
            "train/<class>/* and test/<class>/* images"
        )
    names: dict[str, list[str]] = {}
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    path = root.resolve()
    listing = hashlib.sha256(str(path).encode(errors="surrogateescape"))
    for split in files:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{root} has no folder {split}/: it needs train/<class>/* and test/<class>/*")
        try:
            names[split] = [entry.name for entry in _visible(folder) if entry.is_dir()]
            for label, name in enumerate(names[split]):
                images = [e for e in _visible(folder / name) if Path(e.name).suffix.lower() in SUFFIXES]
                if not images:
                    raise UserError(
                        f"class folder {folder / name} holds no images ({', '.join(SUFFIXES)}): "
                        "fill or remove it"
                    )
                for entry in images:
                    status = entry.stat()
                    line = f"{split}/{name}/{entry.name} {status.st_size} {status.st_mtime_ns}\n"
                    listing.update(line.encode(errors="surrogateescape"))
                    files[split].append((Path(entry.path), label))
        except OSError as error:
            raise UserError(f"cannot read {error.filename} ({error.strerror}): repair or remove it") from None
    differences = [
        f"{name!r} only in {'train' if name in names['train'] else 'test'}"
        for name in sorted(set(names["train"]) ^ set(names["test"]))
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"the classes in {root}/train and {root}/test differ: {', '.join(differences[:5])}{more}; "
            "give both the same folders"
        )
    if len(names["train"]) < 2:
        raise UserError(f"{root}/train holds {len(names['train'])} class folders: a classifier needs two")
    key = f"folder-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    key += f"-{side}" if side != 32 else ""  # caches of 32 pixels are older than other sizes
    return key, listing.hexdigest(), partial(_decode_all, root, side, tuple(names["train"]), files, log)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What is not hidden in a folder, sorted by name: every machine numbers it in the same way."""
    return sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=attrgetter("name"))


def _decode_all(
    root: Path,
    side: int,
    classes: tuple[str, ...],
    files: dict[str, list[tuple[Path, int]]],
    log: Callable[[str], None],
) -> RawDataset:
    """files: (path, label) by split. UserError, which names the file, if an image cannot be decoded."""
    log(f"data: decoding {sum(map(len, files.values())):,} images of {root}, once")
    arrays: list[np.ndarray] = []
    resized = 0
    pool = ThreadPoolExecutor(usable_cores())
    try:
        for paths, labels in (zip(*split, strict=True) for split in files.values()):
            images, was_resized = zip(*pool.map(partial(_decode, side=side), paths), strict=True)
            arrays += [np.stack(images), np.array(labels, dtype=np.int64)]
            resized += sum(was_resized)
    finally:
        pool.shutdown(cancel_futures=True)  # or after an error all other images would be decoded first
    if resized:
        log(f"data: {resized:,} of them resized to {side} x {side}")
    return RawDataset(classes, *arrays)


def _decode(path: Path, side: int) -> tuple[np.ndarray, bool]:
    """The image, upright, as uint8 (side, side, 3), and whether it had to be resized."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            resized = image.size != (side, side)
            image.draft("RGB", (4 * side, 4 * side))  # decodes a large JPEG at lower size: faster
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
            rgb = upright.convert("RGB")
            if resized:
                rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
            return np.asarray(rgb), resized
    except Exception as error:  # Pillow raises many types of exceptions for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason}): replace or remove it") from None
