"""Small data sets: blobs of three colours in noise, as PNG files."""

from pathlib import Path

import numpy as np

CLASSES = ("ant", "bee", "cat")


def write_images(folder: Path, train: int, test: int) -> Path:
    """`train` and `test` images of three classes, in the layout of a folder of images."""
    from PIL import Image

    random = np.random.default_rng(5)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            label = number % len(CLASSES)
            pixels = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
            top, left = random.integers(0, 20, 2)
            pixels[top : top + 12, left : left + 12, label] = 230
            target = folder / split / CLASSES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target / f"{number:04d}.png")
    return folder
