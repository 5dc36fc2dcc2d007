"""Your own images: a folder that holds train/<class>/* and test/<class>/*."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from unicodedata import normalize

import numpy as np

from ddp_lib.data.cache import RawDataset
from ddp_lib.distributed.device import usable_cores
from ddp_lib.errors import UserError

SUFFIXES = ".bmp .gif .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
# What other programs put beside the images; hidden files are passed over too.
NO_DATA = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}
TEST_FOLDERS = ("test", "val", "valid", "validation")
_MOST_NAMED = 20


def find_images(
    root: Path, side: int, log: Callable[[str], None]
) -> tuple[str, str, Callable[[], RawDataset]]:
    """Lists root/train/<class>/* and root/test/<class>/* (or val/) without opening an image.

    Returns the name of the folder's cache, different for each path; a fingerprint, which changes when a file
    is added, removed, renamed or changed; and a function that decodes the images, to `side` pixels square.
    Logs a line that counts what is no image, if anything.

    UserError if a folder is missing, a class is empty, a link is broken, there are fewer than two classes, or
    train/ and test/ have different ones.
    """
    if not root.is_dir():
        raise UserError(
            f"--data {str(root)!r} is not a folder here: give cifar10, shapes, or a folder that holds "
            "train/<class>/* and test/<class>/* images"
        )
    names: dict[str, list[str]] = {}
    files: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    passed_over: Counter[str] = Counter()
    broken: dict[str, str] = {}
    path = root.resolve()
    listing = hashlib.sha256(str(path).encode(errors="surrogateescape"))
    try:
        folders = {"train": root / "train", "test": _test_folder(root)}
        for split, folder in folders.items():
            if not folder.is_dir():
                raise UserError(
                    f"{root} has no folder {split}/: it needs train/<class>/* and test/<class>/* "
                    "(or val/<class>/*)"
                )
            entries = _visible(folder)
            names[split] = [entry.name for entry in entries if entry.is_dir()]
            beside = (f"{_kind(e)} beside the class folders" for e in entries if not e.is_dir())
            passed_over.update(beside)
            for label, name in enumerate(names[split]):
                for entry in _images_in(folder / name, broken, passed_over):
                    status, link = entry.stat(), entry.stat(follow_symlinks=False)
                    # The time of the last change of the inode, which nobody can set, also changes when a file
                    # is renamed, or rewritten and given its old time.
                    times = f"{status.st_mtime_ns} {status.st_ctime_ns} {link.st_ctime_ns}"
                    line = f"{folder.name}/{name}/{entry.name} {status.st_size} {times}\n"
                    listing.update(line.encode(errors="surrogateescape"))
                    files[split].append((Path(entry.path), label))
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}): repair or remove it") from None
    if broken:
        raise _unreadable(broken)
    alone = sorted(set(names["train"]) ^ set(names["test"]))
    # One name in two Unicode forms, as macOS and Linux write it, looks equal.
    two_forms = len({normalize("NFC", name) for name in alone}) < len(alone)
    differences = [
        f"{ascii(name) if two_forms else repr(name)} only in {'train' if name in names['train'] else 'test'}"
        for name in alone
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"the classes in {root}/train and {folders['test']} differ: {', '.join(differences[:5])}{more}; "
            "give both the same folders"
        )
    if len(names["train"]) < 2:
        held = f"only the class folder {names['train'][0]!r}" if names["train"] else "no class folder"
        raise UserError(f"{root}/train holds {held}: a classifier needs two or more")
    if folders["test"].name != "test":
        log(f"data: {root} has no classes in test/: testing on {folders['test'].name}/")
    if passed_over:
        log(f"data: passed over in {root}: {_in_words(passed_over)}")
    key = f"folder-{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    key += f"-{side}" if side != 32 else ""  # caches of 32 pixels are older than other sizes
    return (
        key,
        listing.hexdigest(),
        partial(_decode_all, root, side, tuple(map(_text, names["train"])), files, log),
    )


def _text(name: str) -> str:
    """The name in UTF-8, the same on machines with other locales."""
    return os.fsencode(name).decode(errors="surrogateescape")


def _images_in(folder: Path, broken: dict[str, str], passed_over: Counter[str]) -> list[os.DirEntry[str]]:
    """A class folder's images. Adds links that are broken, and counts what else is there. UserError if it
    holds no images."""
    images, others = [], Counter[str]()
    entries = _visible(folder)
    for entry in entries:
        is_named = Path(entry.name).suffix.lower() in SUFFIXES
        kind = _kind(entry)
        if is_named and entry.is_file():  # a pipe would never end
            images.append(entry)
        elif is_named and kind == "broken link":
            broken[entry.path] = kind
        else:
            others[kind] += 1
    if others.total() == len(entries):
        held = f", but {_in_words(others)}" if others else ""
        raise UserError(
            f"class folder {folder} holds no images ({', '.join(SUFFIXES)}){held}: fill or remove it"
        )
    passed_over.update(others)
    return images


def _test_folder(root: Path) -> Path:
    """The first of TEST_FOLDERS with class folders: a test/ without labels is no use."""
    for name in TEST_FOLDERS:
        if (root / name).is_dir() and any(entry.is_dir() for entry in _visible(root / name)):
            return root / name
    return root / "test"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What may be data in a folder, sorted by name: every machine numbers it in the same way."""
    entries = (e for e in os.scandir(folder) if not e.name.startswith(".") and e.name not in NO_DATA)
    return sorted(entries, key=attrgetter("name"))


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        return "folder"
    if entry.is_file():
        return f"{Path(entry.name).suffix.lower()} file".strip()
    return "broken link" if entry.is_symlink() else "pipe or device"


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {kind}" for kind, count in sorted(counts.items()))


def _unreadable(broken: dict[str, str]) -> UserError:
    """broken: the reason for each image."""
    if len(broken) == 1:
        [(path, reason)] = broken.items()
        return UserError(f"image {path} cannot be read ({reason}): replace or remove it")
    named = ", ".join(f"{path} ({reason})" for path, reason in list(broken.items())[:_MOST_NAMED])
    more = f" and {len(broken) - _MOST_NAMED:,} more" if len(broken) > _MOST_NAMED else ""
    return UserError(f"{len(broken):,} images cannot be read: {named}{more}: replace or remove them")


def _decode_all(
    root: Path,
    side: int,
    classes: tuple[str, ...],
    files: dict[str, list[tuple[Path, int]]],
    log: Callable[[str], None],
) -> RawDataset:
    """files: (path, label) by split. UserError, which names the files, if images cannot be decoded."""
    log(f"data: decoding {sum(map(len, files.values())):,} images of {root}, once")
    arrays: list[np.ndarray] = []
    broken: dict[str, str] = {}
    resized = 0
    with warnings.catch_warnings(action="ignore"):  # of Pillow: of odd images that it can read
        pool = ThreadPoolExecutor(usable_cores())
        try:
            for paths, labels in (zip(*split, strict=True) for split in files.values()):
                images = []
                for path, image in zip(paths, pool.map(partial(_decode, side=side), paths), strict=True):
                    if isinstance(image, str):
                        broken[str(path)] = image
                    else:
                        images.append(image[0])
                        resized += image[1]
                if not broken:
                    arrays += [np.stack(images), np.array(labels, dtype=np.int64)]
        finally:
            pool.shutdown(cancel_futures=True)  # or after a signal all other images would be decoded first
    if broken:
        raise _unreadable(broken)
    if resized:
        log(f"data: {resized:,} of them resized to {side} x {side}")
    return RawDataset(classes, *arrays)


def _decode(path: Path, side: int) -> tuple[np.ndarray, bool] | str:
    """The image, upright, as uint8 (side, side, 3), and whether it had to be resized; or why it cannot be
    read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            resized = image.size != (side, side)
            image.draft("RGB", (4 * side, 4 * side))  # decodes a large JPEG at lower size: faster
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode[0] in "IF":
                upright = Image.fromarray(_as_bytes(np.asarray(upright), image.format))
            rgb = upright.convert("RGB")
            if resized:
                rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
            return np.asarray(rgb), resized
    except Exception as error:  # Pillow raises many types of exceptions for a broken file
        reason = str(error).replace(repr(str(path)), "")  # it is named anyway
        return " ".join(reason.split()) or type(error).__name__


def _as_bytes(grey: np.ndarray, file_format: str | None) -> np.ndarray:
    """Grey pixels of more than 8 bits as uint8, which Pillow's convert() would clip at 255. ValueError if it
    is not known which value is white."""
    low, high = grey.min(), grey.max()
    if grey.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}: save them as 0 to 1")
        return (grey * 255).round().astype(np.uint8)
    if grey.dtype.itemsize > 2 and file_format == "TIFF":
        raise ValueError(f"32-bit pixels from {low} to {high}: save them with 8 or 16 bits")
    return (grey // 256).clip(0, 255).astype(np.uint8)
