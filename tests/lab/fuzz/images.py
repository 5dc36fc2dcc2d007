"""Folders of images, and files that are damaged."""

import io
import os
import socket
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from ddp_lib.data.dataset import Dataset, load_dataset
from tests.lab.fuzz.judge import answered

MODES = "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV I I;16 F".split()
FORMATS = "png jpeg bmp gif tiff webp ppm ico pcx".split()
ENDINGS = "png jpg bmp gif tif tiff webp ppm pgm pbm jpeg PNG JPG heic txt jfif".split()
NAMES = ["a", "b", "c", "B", "\xe9", "e\u0301", "\U0001f431", "a b", "a\nb", "\udcff", "x" * 200, ".hidden"]
NAMES += ["__MACOSX", "-", "\x1b[31m"]


def draw_image(rng: Random) -> bytes:
    """The bytes of an image file, whole or not."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    side = rng.choice([(1, 1), (1, 9), (8, 8), (32, 32), (40, 30)])
    buffer = io.BytesIO()
    mode, ending = (
        rng.choice(MODES),
        rng.choice(["png", "jpeg", "bmp", "gif", "tiff", "webp", "ppm", "ico", "pcx"]),
    )
    with suppress(Exception):  # not every format has every mode
        image = Image.fromarray(numbers.integers(0, 256, (*side, 3), dtype=np.uint8))
        if mode in ("I;16", "F", "I"):
            top = rng.choice([1, 255, 256, 65535, 70000])
            grey = numbers.random(side) * top
            image = Image.fromarray(grey.astype({"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]))
        else:
            image = image.convert(mode)
        more = {"exif": bytes(rng.randbytes(20))} if rng.random() < 0.1 else {}
        image.save(buffer, ending, **more)
    data = bytearray(buffer.getvalue())
    match rng.choice("whole whole whole cut flip noise empty text zeros".split()):
        case "cut":
            del data[rng.randint(0, len(data)) :]
        case "flip":
            for _ in range(rng.choice([1, 3, 30])):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "noise":
            data = bytearray(rng.randbytes(200))
        case "empty":
            data.clear()
        case "text":
            data = bytearray(b"<html>Not found</html>")
        case "zeros":
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    return bytes(data)


def fill(rng: Random, folder: Path, broken: float) -> None:
    """Some images, and what people and programs leave beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    Image.new("RGB", (8, 8), (rng.randrange(256), 9, 9)).save(whole, "png")
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        path = folder / f"{rng.choice(NAMES)}{rng.randrange(99)}.{rng.choice(ENDINGS)}"
        kind = rng.random()
        if path.exists() or path.is_symlink():
            continue
        if kind > broken:
            path.write_bytes(whole.getvalue())
        elif kind < 0.7 * broken:
            path.write_bytes(draw_image(rng))
        else:
            match rng.choice("folder fifo socket dangling loop device up".split()):
                case "folder":
                    path.mkdir()
                case "fifo":
                    os.mkfifo(path)
                case "socket":
                    with suppress(OSError), socket.socket(socket.AF_UNIX) as server:
                        server.bind(os.fsencode(path))
                case "dangling":
                    path.symlink_to("/no/such/image.png")
                case "loop":
                    path.symlink_to(path.name)
                case "device":
                    path.symlink_to("/dev/zero")
                case "up":
                    path.symlink_to("..")


def draw_tree(rng: Random, root: Path) -> None:
    """A folder of images, more or less."""
    broken = rng.choice([0.0, 0.0, 0.1, 0.5, 1.0])
    splits = ["train", rng.choice(["test", "val", "valid", "validation"])]
    if rng.random() < 0.15:
        splits = rng.choices(["train", "test", "val", "Train", "a", ".train"], k=rng.choice([0, 1, 2, 3]))
    classes = rng.sample(NAMES, rng.choice([0, 1, 2, 2, 2, 3, 5]))
    root.mkdir()
    for split in splits:
        (root / split).mkdir(exist_ok=True)
        if rng.random() < 0.1:
            fill(rng, root / split, 0.5)
        for name in classes:
            if rng.random() < 0.97:
                fill(rng, root / split / name, broken)
                for number in range(2):
                    Image.new("L", (8, 8), number).save(root / split / name / f"{number}.png")
        if rng.random() < 0.05:
            fill(rng, root / split / rng.choice(NAMES), broken)
    if rng.random() < 0.1:
        fill(rng, root, 1.0)


def tree_of(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def try_images(rng: Random, folder: Path) -> None:
    """A folder of images; then its cache, damaged."""
    root, data_dir = folder / rng.choice(["images", "é", "a\nb", "\udcff"]), folder / "data"
    draw_tree(rng, root)
    side = rng.choice([8, 32, 33])
    with answered(tree_of(root)):
        first = load_dataset(str(root), data_dir, log=lambda text: None, image_size=side)
        check_dataset(first, side)
        digest = first.digest
        for path in (data_dir / "cache").rglob("*.*"):
            if path.is_file() and path.suffix in (".npy", ".json") and rng.random() < 0.5:
                damage(rng, path)
        second = load_dataset(str(root), data_dir, log=lambda text: None, image_size=side)
        assert second.digest == digest
        check_dataset(second, side)


def check_dataset(data: Dataset, side: int) -> None:
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (side, side, 3)
    assert len(data.classes) > int(data.train.labels.max()) >= 0
    assert np.isfinite([*data.mean, *data.std]).all()


def damage(rng: Random, path: Path) -> None:
    """Changes a file as a disk or a person may."""
    data = bytearray(path.read_bytes())
    match rng.choice("cut flip zeros empty noise gone folder".split()):
        case "cut":
            del data[rng.randint(0, len(data)) :]
        case "flip" if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "zeros":
            data = bytearray(len(data))
        case "empty":
            data.clear()
        case "noise":
            data = bytearray(rng.randbytes(len(data)))
        case "gone":
            path.unlink()
            return
        case "folder":
            path.unlink()
            path.mkdir()
            return
    path.unlink()
    path.write_bytes(data)
