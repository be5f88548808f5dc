"""Decoding and resizing: what is accepted, what is refused and with which reason."""

from __future__ import annotations

import gc
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bagel_ds.data.samples.images import BadImage, ImageTransform, decode_rgb, image_size, resize_to_uint8
from tests.small_data import picture


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    parts = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")):
        parts += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return parts


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    decoded = decode_rgb(_saved(Image.new(mode, (3, 2), 0), "PNG"))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() == 255


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert np.asarray(decode_rgb(_saved(image, "PNG", transparency=1))).min() == 255


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGB", "WEBP")]
)
def test_every_common_mode_gives_rgb_of_the_same_size(mode: str, kind: str) -> None:
    content = _saved(Image.new(mode, (17, 9)), kind)
    assert image_size(content) == (17, 9)
    assert (decode_rgb(content).mode, decode_rgb(content).size) == ("RGB", (17, 9))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    content = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_rgb(content))[0, 0].tolist() == [250, 0, 0]


def test_a_file_cut_off_in_its_pixels_still_decodes() -> None:
    content = picture(64, 64, kind="JPEG")
    assert decode_rgb(content[: len(content) // 2]).size == (64, 64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"no image at all", "unknown format"),
        (_png_header(40_000, 40_000), "DecompressionBombError"),
        (_png_header(15_000, 14_000), "15000 x 14000 pixels, more than 200,000,000"),
        (_saved(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "PNG"), "more than 8 bits"),
    ],
)
def test_what_cannot_be_used_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        image_size(content)
    with pytest.raises(BadImage, match=reason):
        decode_rgb(content)


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(BadImage, match="more than 8 bits"):
            image_size(path)
        gc.collect()


def test_a_missing_file_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="no such file"):
        image_size(tmp_path / "absent.png")


def test_a_body_that_cannot_be_decoded_has_a_reason_though_its_header_is_fine() -> None:
    content = picture(64, 64, kind="JPEG")
    content = content[: content.index(b"\xff\xc0") + 20] + b"\xff\xd9" * 100  # ends before the first scan
    assert image_size(content) == (64, 64)
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode_rgb(content)


@given(
    width=st.integers(1, 30_000),
    height=st.integers(1, 30_000),
    stride=st.sampled_from([14, 16]),
    limits=st.sampled_from([(1024, 512), (518, 224), (980, 378), (512, 512)]),
    img_num=st.integers(1, 9),
)
def test_sizes_are_positive_multiples_of_the_stride(
    width: int, height: int, stride: int, limits: tuple[int, int], img_num: int
) -> None:
    new_width, new_height = ImageTransform(stride, *limits).size(width, height, img_num)
    assert new_width > 0 and new_width % stride == 0
    assert new_height > 0 and new_height % stride == 0
    assert max(new_width, new_height) <= limits[0] + stride / 2


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (100, 60)])
def test_resized_pixels_are_uint8_of_the_planned_size(size: tuple[int, int]) -> None:
    transform = ImageTransform(16, 96, 32)
    pixels = resize_to_uint8(decode_rgb(picture(*size)), transform)
    width, height = transform.size(*size)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, height, width)
    assert pixels.permute(1, 2, 0).is_contiguous()


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = decode_rgb(picture(64, 48))
    pixels = resize_to_uint8(image, ImageTransform(16, 64, 32))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
