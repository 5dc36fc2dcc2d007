"""The built-in data set: ten classes of coloured shapes and textures, made from a seed.

Every machine makes the same bytes. Random bits come from Philox, whose stream numpy guarantees not to
change. Everything else is integer arithmetic, or single additions, multiplications, divisions and
square roots, whose rounding IEEE 754 defines. There is no sine, no exponential, and no floating-point
sum whose order a library may choose.
"""

import math
from collections.abc import Callable

import numpy as np

VERSION = 1
CLASSES = (
    "circle", "square", "triangle", "cross", "ring", "star",
    "horizontal stripes", "vertical stripes", "checkerboard", "dots",
)  # fmt: skip
_FIRST_TEXTURE = CLASSES.index("horizontal stripes")
TRAIN_IMAGES, TRAIN_SEED = 10_000, 1
TEST_IMAGES, TEST_SEED = 2_000, 2

SIDE = 32  # pixels square
_SHAPE_RADIUS = (70, 120)  # minimum and maximum, in tenths of a pixel; so are the next two
_TEXTURE_RADIUS = (90, 150)
_PERIOD = (40, 70)  # of a texture
_CONTRAST = 120  # minimum difference between the shape's and the background's colour, over R, G and B
_CELLS = 4  # the background is a grid of this many cells per side, blended smoothly
_WAVE = 60  # about how much the background may differ from its mean colour
_CLUTTER = 3  # small rectangles behind the shape
_NOISE = (10, 60)  # in 128ths of the range of values
_DRAWS = 80  # random numbers reserved for an image's layout and colours
_CHUNK = 500  # images made at a time, to limit memory
# Normals of a pentagram's five lines: cosines and sines of 90 degrees plus multiples of 72.
_STAR = ((0.0, 1.0), (0.9510565, 0.309017), (-0.9510565, 0.309017), (0.5877853, -0.809017),
         (-0.5877853, -0.809017))  # fmt: skip

Draw = Callable[..., np.ndarray]  # see _make_chunk


def make_shapes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images, uint8 (n, 32, 32, 3), and their labels, int64 (n,), which cycle through the classes. With the
    same seed, a smaller n gives the first n images of a larger one."""
    layout, noise = np.random.Philox(key=2 * seed), np.random.Philox(key=2 * seed + 1)
    images = np.empty((n, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(n) % len(CLASSES)
    for first in range(0, n, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, n))
        images[chunk] = _make_chunk(labels[chunk], layout, noise)
    return images, labels


def _make_chunk(labels: np.ndarray, layout: np.random.Philox, noise: np.random.Philox) -> np.ndarray:
    count = len(labels)
    columns = iter(layout.random_raw(count * _DRAWS).reshape(count, _DRAWS).T)

    def draw(low: int, high: int, *shape: int) -> np.ndarray:
        """The next uniform random numbers low..high of each image: int64 (count, *shape)."""
        words = np.stack([next(columns) for _ in range(math.prod(shape))], axis=-1).reshape(count, *shape)
        return low + ((words >> 33).astype(np.int64) * (high - low + 1) >> 31)

    base = draw(0, 255, 3)
    pixels = _background(base, draw)
    for _ in range(_CLUTTER):
        _rectangle(pixels, draw)
    coverage = _coverage(labels, draw)[..., None]  # quarters of a pixel
    colour = _contrasting_colour(base, draw)[:, None, None]
    pixels += (colour - pixels) * coverage // 4
    # The sum of two random bytes per value: noise from -255 to 255, most of it near 0; then scaled.
    words = noise.random_raw(count * SIDE * SIDE * 3 * 2 // 8)
    random_bytes = words.astype("<u8").view(np.uint8).reshape(count, SIDE, SIDE, 3, 2)
    amount = draw(*_NOISE)[:, None, None, None]
    pixels += (random_bytes.astype(np.int64).sum(axis=-1) - 255) * amount // 128
    return pixels.clip(0, 255).astype(np.uint8)


def _background(base: np.ndarray, draw: Draw) -> np.ndarray:
    """Images (N, 32, 32, 3) of the colour `base` (N, 3), varied by interpolating a random grid bilinearly."""
    amount = draw(0, _WAVE)
    points = draw(-64, 64, _CELLS + 1, _CELLS + 1) * amount[:, None, None]
    tint = draw(-64, 64, 3)
    size = SIDE // _CELLS  # of a cell, in pixels
    cell, weight = np.arange(SIDE) // size, 2 * (np.arange(SIDE) % size) + 1  # weight: of 2 * size
    rows = points[:, cell] * (2 * size - weight)[:, None] + points[:, cell + 1] * weight[:, None]
    field = rows[:, :, cell] * (2 * size - weight) + rows[:, :, cell + 1] * weight
    field //= 64 * (2 * size) ** 2
    return base[:, None, None] + field[..., None] * (64 + tint[:, None, None]) // 64


def _rectangle(pixels: np.ndarray, draw: Draw) -> None:
    """Paints a small upright rectangle of random colour and position into each image."""
    offset = np.arange(SIDE) - draw(0, 31, 2)[..., None]  # of each column and row from the rectangle's corner
    inside = (offset >= 0) & (offset < draw(2, 7, 2)[..., None])  # (N, 2, 32): columns, then rows
    where = inside[:, 1, :, None] & inside[:, 0, None, :]
    np.copyto(pixels, draw(0, 255, 3)[:, None, None], where=where[..., None])


def _contrasting_colour(base: np.ndarray, draw: Draw) -> np.ndarray:
    """A random colour (N, 3) for each base colour (N, 3), different enough to be seen on it."""
    colour = draw(0, 255, 3)
    close = np.abs(colour - base).sum(axis=-1, keepdims=True) < _CONTRAST
    return np.where(close, (colour + 128) % 256, colour)


def _coverage(labels: np.ndarray, draw: Draw) -> np.ndarray:
    """How much of each pixel the shape or texture covers, in quarters: int64 (N, 32, 32)."""
    x, y = draw(100, 220) / 10, draw(100, 220) / 10  # of the centre, in pixels
    radius = np.where(labels >= _FIRST_TEXTURE, draw(*_TEXTURE_RADIUS), draw(*_SHAPE_RADIUS)) / 10
    cycles, phase = radius / (draw(*_PERIOD) / 10), draw(0, 99) / 100
    # The direction is an integer vector (a, b) divided by its length. Stripes are only tilted a
    # little, so that horizontal stripes stay horizontal.
    stripes = (labels == _FIRST_TEXTURE) | (labels == _FIRST_TEXTURE + 1)
    a = np.where(stripes, draw(80, 100), draw(-100, 100))
    b = np.where(stripes, draw(-25, 25), 2 * draw(-50, 49) + 1)
    length = np.sqrt((a * a + b * b).astype(np.float64))
    layout = np.stack([x, y, radius, a / length, b / length, cycles, phase]).astype(np.float32)

    # Two by two points per pixel, so that edges are smooth.
    points = (np.arange(2 * SIDE, dtype=np.float32) + 0.5) / 2
    coverage = np.zeros((len(labels), SIDE, SIDE), dtype=np.int64)
    for label in range(len(CLASSES)):
        selected = labels == label
        x, y, radius, cos, sin, cycles, phase = layout[:, selected, None, None]
        across, down = (points - x) / radius, (points[:, None] - y) / radius
        u, v = across * cos + down * sin, down * cos - across * sin
        inside = _inside(CLASSES[label], u, v, u * cycles + phase, v * cycles + phase)
        coverage[selected] = inside.reshape(-1, SIDE, 2, SIDE, 2).sum(axis=(2, 4))
    return coverage


def _inside(name: str, u: np.ndarray, v: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Whether points are inside the shape, or on the texture's pattern, which fills a disc. (u, v) is a
    point's position in units of the radius; (p, q) is the same in periods of the texture."""
    p, q = p - np.floor(p), q - np.floor(q)
    squared = u * u + v * v
    smaller, larger = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    match name:
        case "circle":
            return squared < 0.8
        case "square":
            return larger < 0.8
        case "triangle":
            return (v > -0.5) & (v + np.float32(1.7320508) * np.abs(u) < 1)
        case "cross":
            return (smaller < 0.28) & (larger < 0.95)
        case "ring":
            return (squared > 0.35) & (squared < 1)
        case "star":  # points on the inner side of at least four of the five lines
            return np.sum([u * np.float32(x) + v * np.float32(y) < 0.33 for x, y in _STAR], axis=0) >= 4
        case "horizontal stripes":
            return (squared < 1) & (q < 0.5)
        case "vertical stripes":
            return (squared < 1) & (p < 0.5)
        case "checkerboard":
            return (squared < 1) & ((p < 0.5) == (q < 0.5))
        case _:  # dots
            return (squared < 1) & ((p - 0.5) * (p - 0.5) + (q - 0.5) * (q - 0.5) < 0.1)
