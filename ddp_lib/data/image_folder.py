"""Your own images: a folder that holds train/<class>/* and test/<class>/*."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddp_lib.data.cache import SIDE, RawDataset
from ddp_lib.distributed.device import usable_cores
from ddp_lib.errors import UserError

SUFFIXES = tuple(f".{kind}" for kind in (
    "bmp", "gif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp",
))  # fmt: skip


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder, by split, as (path, label); labels number the sorted class names."""

    root: Path
    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    fingerprint: str
    """Changes when a file is added, removed, renamed or changed."""

    @property
    def key(self) -> str:
        """The name of the folder's cache, different for each path."""
        path = self.root.resolve()
        return f"folder-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"

    def read(self, log: Callable[[str], None]) -> RawDataset:
        """Decodes every image. UserError, which names the file, if one cannot be decoded."""
        log(f"data: decoding {len(self.train) + len(self.test):,} images of {self.root}, once")
        arrays = []
        resized = 0
        for split in (self.train, self.test):
            with ThreadPoolExecutor(usable_cores()) as pool:
                try:
                    decoded = list(pool.map(_decode, (path for path, _ in split), chunksize=64))
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # or all other images would be decoded first
                    raise
            arrays.append(np.stack([pixels for pixels, _ in decoded]))
            arrays.append(np.array([label for _, label in split], dtype=np.int64))
            resized += sum(was_resized for _, was_resized in decoded)
        if resized:
            log(f"data: {resized:,} of them resized to {SIDE} x {SIDE}")
        return RawDataset(self.classes, *arrays)


def find_images(root: Path) -> ImageFolder:
    """Lists root/train/<class>/* and root/test/<class>/* without opening an image.

    UserError if a folder is missing, a class is empty, there are fewer than two classes, or train/
    and test/ have different ones.
    """
    if not root.is_dir():
        raise UserError(
            f"--data {str(root)!r} is not a folder here: give cifar10, shapes, or a folder that holds "
            "train/<class>/* and test/<class>/* images"
        )
    names: dict[str, list[str]] = {}
    files: dict[str, list[tuple[Path, int]]] = {}
    listing = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape"))
    for split in ("train", "test"):
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{root} has no folder {split}/: it needs train/<class>/* and test/<class>/*")
        try:
            names[split] = sorted(
                e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")
            )
            files[split] = []
            for label, name in enumerate(names[split]):
                images = _list_images(folder / name)
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
    in_one_split = sorted(set(names["train"]) ^ set(names["test"]))
    if in_one_split:
        differences = [
            f"{name!r} only in {'train' if name in names['train'] else 'test'}" for name in in_one_split
        ]
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"the classes in {root}/train and {root}/test differ: "
            f"{', '.join(differences[:5])}{more}; "
            "give both the same folders"
        )
    if len(names["train"]) < 2:
        raise UserError(f"{root}/train holds {len(names['train'])} class folders: a classifier needs two")
    return ImageFolder(root, tuple(names["train"]), files["train"], files["test"], listing.hexdigest())


def _list_images(folder: Path) -> list[os.DirEntry[str]]:
    """The image files in a folder, sorted by name: every machine numbers the images in the same way."""
    return sorted(
        (
            entry
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in SUFFIXES
        ),
        key=lambda entry: entry.name,
    )


def _decode(path: Path) -> tuple[np.ndarray, bool]:
    """The image, upright, as uint8 (32, 32, 3), and whether it had to be resized."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            resized = image.size != (SIDE, SIDE)
            image.draft("RGB", (4 * SIDE, 4 * SIDE))  # decodes a large JPEG at lower size: faster
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
            rgb = upright.convert("RGB")
            if resized:
                rgb = rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(rgb), resized
    except Exception as error:  # Pillow raises many types of exceptions for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {path} cannot be read ({reason}): replace or remove it") from None
