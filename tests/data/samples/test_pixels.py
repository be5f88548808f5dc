"""Resized pixels are those of Pillow 13.0, with which the original's outputs were recorded, to the last bit.

Computed here a second time, from the definition: two passes of a bicubic filter (Keys, a = -1/2) widened by the factor
of shrinking, weights as whole numbers of 2^-22, each pass rounded to 8 bits. Because of that rounding it matters which
pass goes first. Pillow 13.0 filters the height first when it removes more than twice as many rows as columns, so that
portraits of more than 1 : 2 are affected; 11.0 to 12.3 always filter the width first. Needs no recordings.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bagel_ds.data.samples.images import ImageTransform, resize_to_uint8

_ONE = 22  # bits of a weight of 1
HEIGHT_FIRST, WIDTH_FIRST = (0, 1), (1, 0)  # axes of [height, width, channels]


def keys(distance: np.ndarray) -> np.ndarray:
    """The bicubic filter with a = -1/2, which is 0 from a distance of 2."""
    x = np.abs(distance)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def one_pass(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    if pixels.shape[axis] == size:
        return pixels
    source = np.moveaxis(pixels, axis, 0).astype(np.int64)
    scale = len(source) / size
    widened = max(scale, 1.0)
    rows = []
    for index in range(size):
        centre = (index + 0.5) * scale
        first = max(int(centre - 2 * widened + 0.5), 0)
        last = min(int(centre + 2 * widened + 0.5), len(source))
        weights = keys((np.arange(first, last) + 0.5 - centre) / widened)
        scaled = weights / weights.sum() * 2**_ONE
        whole = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
        total = np.tensordot(whole, source[first:last], axes=1) + 2 ** (_ONE - 1)
        rows.append(np.clip(total >> _ONE, 0, 255))
    return np.moveaxis(np.stack(rows), 0, axis).astype(np.uint8)


def resized(pixels: np.ndarray, size: tuple[int, int], order: tuple[int, int]) -> np.ndarray:
    """`size` is (width, height); `order` names the axes of the two passes."""
    for axis in order:
        pixels = one_pass(pixels, size[1 - axis], axis)
    return pixels


def order_of(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Which pass Pillow 13.0 makes first, of sizes as (width, height)."""
    columns, rows = source[0] - size[0], source[1] - size[1]
    return HEIGHT_FIRST if rows > 0 and rows > 2 * columns else WIDTH_FIRST


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


SIZES = [  # (width, height) before and after; below, at and above the border between the two orders
    ((60, 120), (40, 81), WIDTH_FIRST),
    ((60, 120), (40, 80), WIDTH_FIRST),
    ((60, 120), (40, 79), HEIGHT_FIRST),
    ((97, 64), (90, 51), WIDTH_FIRST),
    ((97, 64), (90, 49), HEIGHT_FIRST),
    ((50, 90), (80, 60), HEIGHT_FIRST),
    ((50, 90), (80, 91), WIDTH_FIRST),
    ((50, 40), (80, 70), WIDTH_FIRST),
    ((120, 50), (60, 20), WIDTH_FIRST),
]


@pytest.mark.parametrize(("source", "size", "order"), SIZES)
def test_the_installed_pillow_makes_the_pixels_that_were_recorded(
    source: tuple[int, int], size: tuple[int, int], order: tuple[int, int]
) -> None:
    pixels = noise(*source)
    found = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    assert order_of(source, size) == order
    assert np.array_equal(found, resized(pixels, size, order))
    assert not np.array_equal(found, resized(pixels, size, order[::-1])), "else the order would not be seen"


@pytest.mark.parametrize(
    ("source", "order"),
    [((90, 300), HEIGHT_FIRST), ((100, 190), WIDTH_FIRST), ((300, 90), WIDTH_FIRST), ((30, 20), WIDTH_FIRST)],
)
def test_images_are_resized_to_the_pixels_that_were_recorded(source: tuple[int, int], order: tuple[int, int]) -> None:
    transform, pixels = ImageTransform(16, 160, 32), noise(*source)
    size = transform.size(*source)
    assert size != source and order_of(source, size) == order
    found = resize_to_uint8(Image.fromarray(pixels), transform)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), resized(pixels, size, order))
