"""Batches made and augmented whole, from uint8 tensors."""

from functools import lru_cache
from typing import Any

import torch

from ddp_lib.data.cache import SIDE
from ddp_lib.data.dataset import Dataset, Split

# A random crop is taken after padding by so many pixels of black. Usual is 4; in a training as short
# as ten epochs 2 are better.
PADDING = 2
_POSITIONS = 2 * PADDING + 1


def make_batch(
    split: Split,
    indices: torch.Tensor,
    dataset: Dataset,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    augment: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples `indices` (int64, (B,)) of `split` as a batch on `device`.

    Returns x, `dtype` (B, 3, 32, 32) in channels_last layout, normalised with the data set's mean
    and std, and y, int64 (B,). `augment=(seed, epoch)` crops at random after padding by 2 and flips
    every second image, on average. A sample's crop and flip are a function of (seed, epoch, its
    index) alone: the same on any rank, in any batch and after a restart.
    """
    # Without non_blocking a copy to a GPU would wait until all that is queued there is done.
    indices = indices.to(split.images.device, non_blocking=True)
    pixels = split.images.index_select(0, indices)
    if augment is not None:
        pixels = crop_and_flip(pixels, random_below(2 * _POSITIONS**2, *augment, indices))
    # uint8 crosses to the device: a quarter of the bytes that floats would be.
    pixels = pixels.to(device, non_blocking=True)
    labels = split.labels.index_select(0, indices).to(device, non_blocking=True)
    scale, shift = _scale_and_shift(dataset.mean, dataset.std, dtype, torch.device(device))
    x = torch.addcmul(shift, pixels.flatten(1).to(dtype), scale)
    return x.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2), labels


@lru_cache(maxsize=8)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p / 255 - mean) / std as one scale and shift a channel, written out for a whole image of
    32 * 32 pixels, so that the processor sees long rows and not rows of three."""
    means, stds = torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)
    scale, shift = (1 / (255 * stds)).repeat(SIDE * SIDE), (-means / stds).repeat(SIDE * SIDE)
    return scale.to(device), shift.to(device)


def crop_and_flip(images: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Crops 32 x 32 of uint8 images (B, 32, 32, 3) padded with 2 pixels of black; flips some.

    `draw` (B,), 0..49, is top + 5 * (left + 5 * flip), with top and left 0..4.
    """
    count, wide = len(images), SIDE + 2 * PADDING
    top, left, flip = draw % _POSITIONS, draw // _POSITIONS % _POSITIONS, draw >= _POSITIONS**2
    padded = images.new_zeros(count, wide, wide, 3)
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = images
    # A crop is 32 pieces of 96 bytes, one from each of its rows: all are fetched by one call.
    row = torch.arange(SIDE, device=images.device)
    first_row = torch.arange(count, device=images.device) * wide + top
    starts = (first_row[:, None] + row) * wide + left[:, None]
    pieces = padded.flatten().unfold(0, SIDE * 3, 1).index_select(0, starts.flatten() * 3)
    crops = pieces.view(count, SIDE, SIDE, 3)
    return torch.where(flip[:, None, None, None], crops.flip(2), crops)


def random_below(limit: int, seed: int, epoch: int, indices: torch.Tensor) -> torch.Tensor:
    """A number 0..limit-1 for each index, uniform, fixed by (seed, epoch, index); int64 (B,)."""
    key = _mix(_mix(seed & 0xFFFFFFFF) ^ epoch)
    bits: torch.Tensor = _mix(indices ^ key)
    return bits * limit >> 32


def _mix(x: Any) -> Any:
    """Spreads 32 bits over 32 bits, one to one, for ints and int64 tensors alike.

    Xorshifts and multiplications as in Chris Wellons' hash-prospector. His multipliers stay below
    2**31, so that no product leaves int64 on any device.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)
