"""Images as the network sees them: decoded to RGB, resized by the original's rule, kept as uint8.

Guarantees: sizes and pixels equal the original's (its rounding quirks included), with Pillow 13.0 or newer: older ones
filter the width first also in tall images, which changes single pixels by up to 25 of 255 levels. Normalizing is left
to the device (`model.batch.normalize_pixels`). Anything damaged, or too large to be meant, raises `BadImage` with the
reason; nothing here is fatal to a run. `image_size` reads headers only.
"""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, PngImagePlugin
from torch import Tensor

from bagel_ds.data.samples.sample import BadRow
from bagel_ds.git_lfs import pointer_fault

# As the original: a cut-off file gives the part that is there, and a PNG may carry up to 1 GiB of text.
ImageFile.LOAD_TRUNCATED_IMAGES = True
PngImagePlugin.MAX_TEXT_CHUNK = 1024 * 2**20
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # where Pillow warns; here it is the end

# Pillow's conversion to RGB clips these at 255 (an almost white picture), so they are refused rather than trained on.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class BadImage(BadRow):
    """The image cannot be used; the message says why."""


@dataclass(frozen=True)
class ImageTransform:
    """The original's `image_transform_args`: sides are multiples of `image_stride`, all limits in pixels."""

    image_stride: int
    max_image_size: int
    min_image_size: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """(width, height) after the resize; `img_num` images share `max_pixels` (vlm only).

        Quirks kept on purpose: rounding twice with python's banker's rounding, and the pixel limit applied to each
        side rather than as its square root, which over-shrinks.
        """
        scale = max(min(self.max_image_size / max(width, height), 1.0), self.min_image_size / min(width, height))
        width, height = self._scaled(width, height, scale)
        if width * height > self.max_pixels / img_num:
            width, height = self._scaled(width, height, self.max_pixels / img_num / (width * height))
        if max(width, height) > self.max_image_size:
            width, height = self._scaled(width, height, self.max_image_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        return self._divisible(round(width * scale)), self._divisible(round(height * scale))

    def _divisible(self, side: int) -> int:
        return max(self.image_stride, round(side / self.image_stride) * self.image_stride)


def check_regular(path: Path) -> None:
    """Raises `BadImage` where `path` is no regular file: opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BadImage(f"the file cannot be read ({_words(error)})") from error
    if not stat.S_ISREG(mode):
        raise BadImage("not a regular file")


def image_size(source: bytes | Path) -> tuple[int, int]:
    """(width, height) from the header alone. Raises `BadImage`."""
    with _opened(source) as image:
        return image.size


def decode_rgb(source: bytes | Path) -> Image.Image:
    """The first frame as RGB; anything with an alpha channel or a transparent colour is laid on white."""
    with _opened(source) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return to_rgb(image)
        except Exception as error:  # what Pillow's decoders raise on damaged files is an open set
            raise BadImage(f"the image cannot be decoded ({_words(error)})") from error


def resize_to_uint8(image: Image.Image, transform: ImageTransform, img_num: int = 1) -> Tensor:
    """RGB image -> uint8 [3, height, width] of `transform.size`, bicubic; a view of [height, width, 3] in memory."""
    size = transform.size(*image.size, img_num)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _opened(source: bytes | Path) -> Image.Image:
    if isinstance(source, bytes) and not source:
        raise BadImage("the image has zero bytes")
    if isinstance(source, Path):
        check_regular(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except Exception as error:
        raise BadImage(pointer_fault(source) or f"not a readable image ({_words(error)})") from error
    refusal = _refusal(image)
    if refusal:
        image.close()
        raise BadImage(refusal)
    return image


@cache
def _formats() -> list[str]:
    """What Pillow can decode by itself: EPS starts another program, the others are headers without a decoder."""
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")]


def _refusal(image: Image.Image) -> str:
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}"
    if min(width, height) < 1:
        return f"the image has {width} x {height} pixels"
    if image.mode in _DEEP_MODES:
        return f"the image has more than 8 bits per pixel (Pillow mode {image.mode}); convert it to 8 bits"
    return ""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; anything with an alpha channel or a transparent color is composited on white."""
    if image.mode in ("RGBA", "LA", "PA") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    # Pillow names the in-memory buffer by its address, which would make equal reasons differ
    return "unknown format" if type(error).__name__ == "UnidentifiedImageError" else f"{type(error).__name__}: {error}"
