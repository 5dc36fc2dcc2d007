"""The built-in images: the same everywhere, and hard enough."""

import hashlib

import numpy as np

from ddp_lib.data import shapes


def test_shapes_are_the_same_bytes_everywhere() -> None:
    images, labels = shapes.make_shapes(30, shapes.TRAIN_SEED)
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    # Whoever changes the images on purpose also raises shapes.VERSION, or old caches stay in use.
    assert digest == "47014651435d589d4e6a90d6f8cde347346b1b4cbc4637d369b41514a79be6d7"
    assert shapes.VERSION == 1


def test_fewer_shapes_are_the_first_of_more() -> None:
    few, _ = shapes.make_shapes(30, 5)
    more, labels = shapes.make_shapes(530, 5)  # over a chunk's border
    assert (more[:30] == few).all()
    assert np.bincount(labels).tolist() == [53] * 10
    assert len(np.unique(more.reshape(530, -1), axis=0)) == 530
    assert not (shapes.make_shapes(30, 6)[0] == few).all(axis=(1, 2, 3)).any()


def test_shapes_are_beyond_a_linear_classifier() -> None:
    (x, labels), (x_test, labels_test) = shapes.make_shapes(2000, 1), shapes.make_shapes(500, 2)
    x, x_test = (images.reshape(len(images), -1) / 255 - 0.5 for images in (x, x_test))
    # Ridge regression on the pixels, in closed form (in its dual, the smaller system).
    weights = x.T @ np.linalg.solve(x @ x.T + 100 * np.eye(2000), np.eye(10)[labels])
    assert ((x_test @ weights).argmax(axis=1) == labels_test).mean() < 0.6
