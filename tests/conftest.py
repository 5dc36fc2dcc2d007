"""Fixtures that several test modules share."""

from pathlib import Path

import numpy as np
import pytest

CLASSES = ("ant", "bee", "cat")
TRAIN, TEST = 630, 131  # three global batches of 210, and a test set no number of ranks divides


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory) -> Path:
    """A small data set of someone's own: blobs of three colours in noise, as PNG files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(5)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for number in range(count):
            label = number % len(CLASSES)
            pixels = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
            top, left = random.integers(0, 20, 2)
            pixels[top : top + 12, left : left + 12, label] = 230
            target = folder / split / CLASSES[label]
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> str:
    """A --data-dir for all tests: the small data set is decoded once."""
    return str(tmp_path_factory.mktemp("data"))
