"""Batches: normalised, augmented, and the same on any number of ranks."""

import math

import numpy as np
import pytest
import torch

from ddp_lib.data import batch, shapes
from ddp_lib.data.batch import draw_crops_and_flips, make_batch, random_below
from ddp_lib.data.cache import mean_and_std
from ddp_lib.data.dataset import Dataset, Split


@pytest.fixture(scope="module")
def some() -> Dataset:
    images, labels = map(torch.from_numpy, shapes.make_shapes(200, 0))
    split = Split(images, labels)
    mean, std = mean_and_std(images.numpy())
    return Dataset("some", shapes.CLASSES, split, split, (*mean,), (*std,), "")  # type: ignore[arg-type]


def test_batch_is_normalised_and_channels_last(some: Dataset) -> None:
    indices = torch.tensor([5, 3, 199, 3])
    x, y = make_batch(some.train, indices, some)
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, some.train.labels[indices])
    expected = some.train.images[indices].permute(0, 3, 1, 2).double() / 255
    expected = (expected - torch.tensor(some.mean).view(3, 1, 1)) / torch.tensor(some.std).view(3, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)
    double, _ = make_batch(some.train, indices, some, dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-6)

    whole, _ = make_batch(some.train, torch.arange(200), some, dtype=torch.float64)
    assert whole.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(whole.std(dim=(0, 2, 3)), torch.ones(3).double(), rtol=0, atol=1e-3)


def test_augmented_batch_equals_one_image_at_a_time(some: Dataset) -> None:
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    x, _ = make_batch(some.train, indices, some, augment=(11, 4))
    drawn = draw_crops_and_flips(2, 11, 4, indices).tolist()
    seen = set()
    for row, (index, draw) in enumerate(zip(indices.tolist(), drawn, strict=True)):
        top, left, flip = draw % 5, draw // 5 % 5, draw // 25
        seen.add((top, left, flip))
        padded = np.pad(some.train.images[index], ((2, 2), (2, 2), (0, 0)), mode="reflect")
        crop = padded[top : top + 32, left : left + 32]
        crop = crop[:, ::-1] if flip else crop
        alone = Split(torch.from_numpy(crop.copy())[None], torch.zeros(1, dtype=torch.int64))
        expected, _ = make_batch(alone, torch.tensor([0]), some)
        assert torch.equal(x[row], expected[0])
    assert len(seen) > 45
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_does_not_depend_on_rank_or_batch(some: Dataset) -> None:
    indices = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    whole, _ = make_batch(some.train, indices, some, augment=(3, 7))
    for world_size in (2, 3, 7):
        for rank in range(world_size):
            part, _ = make_batch(some.train, indices[rank::world_size], some, augment=(3, 7))
            assert torch.equal(part, whole[rank::world_size])
    torch.manual_seed(99)  # no generator has a say
    assert torch.equal(make_batch(some.train, indices, some, augment=(3, 7))[0], whole)
    for other in ((3, 8), (4, 7)):
        assert not torch.equal(make_batch(some.train, indices, some, augment=other)[0], whole)


def chi_squared(counts: np.ndarray) -> float:
    """Standard deviations by which the counts' chi-squared lies off that of a uniform draw."""
    expected = counts.sum() / counts.size
    value, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(value - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("limit", [2, 9, 50])
def test_augmentation_is_uniform_and_independent(limit: int) -> None:
    indices = torch.arange(50_000)
    draws = {
        (seed, epoch): random_below(limit, seed, epoch, indices).numpy()
        for seed in (0, 1, 2**31 - 1)
        for epoch in (0, 1, 2, 1000)
    }
    for draw in draws.values():
        assert draw.min() >= 0 and draw.max() < limit
        assert chi_squared(np.bincount(draw, minlength=limit)) < 5
    first = draws[0, 0]
    pairs = [(first[:-1], first[1:])] + [(first, draw) for key, draw in draws.items() if key != (0, 0)]
    for a, b in pairs:  # one image and the next, one epoch or seed and another
        assert chi_squared(np.bincount(a * limit + b, minlength=limit**2)) < 5
    # One image over many epochs.
    own = [int(random_below(limit, 0, epoch, torch.tensor([17]))) for epoch in range(4000)]
    assert chi_squared(np.bincount(own, minlength=limit)) < 5


def test_each_image_is_flipped_in_every_other_epoch() -> None:
    indices = torch.arange(10_000)
    flips = [draw_crops_and_flips(2, seed, epoch, indices) // 25 for seed in (0, 1) for epoch in range(3)]
    for first, second, third in (flips[:3], flips[3:]):
        assert torch.equal(first + second, torch.ones_like(first)) and torch.equal(first, third)
        assert 4800 < int(first.sum()) < 5200
    assert 4800 < int((flips[0] == flips[3]).sum()) < 5200


def test_padding_mirrors_the_image() -> None:
    images = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8)
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    crops = batch.crop_and_flip(images, torch.arange(50))
    for draw in range(50):
        top, left = draw % 5, draw // 5 % 5
        crop = padded[draw, top : top + 32, left : left + 32]
        assert np.array_equal(crops[draw], crop[:, ::-1] if draw >= 25 else crop)


@pytest.mark.gpu
def test_batch_on_a_gpu_equals_the_cpus(some: Dataset) -> None:
    indices = torch.arange(0, 200, 3)
    on_gpu = Split(some.train.images.cuda(), some.train.labels.cuda())
    expected, labels = make_batch(some.train, indices, some, augment=(0, 1))
    for split in (some.train, on_gpu):
        x, y = make_batch(split, indices, some, device="cuda", augment=(0, 1))
        assert x.is_cuda and y.is_cuda and torch.equal(y.cpu(), labels)
        torch.testing.assert_close(x.cpu(), expected)
