"""Images as the network sees them: decoded to RGB, resized by the original's rule, kept as uint8.

Guarantees: sizes and pixels equal the original's, including its rounding, with Pillow 13.0 or newer (older versions
filter the width first also in tall images, which changes single pixels by up to 25 of 255 levels). The device
normalizes (`model.batch.normalize_pixels`). An image that is damaged or too large raises `BadImage` with the reason and
the file's path. `image_size` reads only the header. Only regular files are opened.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile, PngImagePlugin
from torch import Tensor

from bagel_ds.data.samples.resize import bicubic
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.regular_files import file_fault

# As in the original: a file that is cut off gives the part that is there.
ImageFile.LOAD_TRUNCATED_IMAGES = True
# What a compressed text or color profile of a PNG may unpack to. Pillow leaves out what is larger and goes on, so this
# refuses no file that the original reads: it allows 1 GiB, but Pillow refuses more than 64 MiB of text anyway.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20
MAX_PIXELS = 200_000_000
MAX_SIDE = 1_000_000  # pixels; the resize needs 32 bytes for each pixel of a side
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # where Pillow warns

_ORIENTATION = 0x0112  # EXIF tag

# Pillow's conversion to RGB clips these at 255, which gives an almost white picture, so they are refused.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")

# What needs no copy in RGB: once loaded, such an image holds its pixels only. Others keep a decoder's memory.
_KEPT_FORMATS = ("JPEG", "PNG")


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

        As in the original: rounds twice with Python's banker's rounding, and applies the ratio of the pixel limit to
        each side rather than its square root, which shrinks more than needed.
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


def image_size(source: bytes | Path) -> tuple[int, int]:
    """(width, height) from the header only. Raises `BadImage`."""
    with _opened(source) as image:
        return image.size


def decode_rgb(source: bytes | Path) -> Image.Image:
    """The first frame as RGB, with anything transparent laid on white. Raises `BadImage`."""
    with _opened(source) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _loaded(image) if image.format in _KEPT_FORMATS and _is_plain(image) else to_rgb(image)
        except Exception as error:  # what Pillow's decoders raise on damaged files is an open set
            raise _bad(source, f"the image cannot be decoded ({_words(error)})") from error


def hidden_damage(source: bytes | Path) -> str:
    """What is wrong with an image that `decode_rgb` uses as far as it goes; empty where nothing is.

    Also compares the checksums of a PNG. Raises `BadImage` where the image cannot be used at all.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with _opened(source) as image:
            if image.format == "PNG":
                image.verify()
        decode_rgb(source)
        return ""
    except Exception as error:  # as above
        damage = str(error) if isinstance(error, BadImage) else str(_bad(source, _words(error)))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
    decode_rgb(source)
    return damage


def ignored_orientation(source: bytes | Path) -> int:
    """The EXIF orientation that decoding does not apply, 1 where there is none. Raises `BadImage`."""
    with _opened(source) as image:
        try:
            # Pillow itself turns TIFF files.
            return 1 if image.format == "TIFF" else int(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # damaged EXIF turns nothing
            return 1


def resize_to_uint8(image: Image.Image, transform: ImageTransform, img_num: int = 1) -> Tensor:
    """RGB image -> uint8 [3, height, width] of `transform.size`, bicubic; a view of [height, width, 3] in memory."""
    return bicubic(image, transform.size(*image.size, img_num)).permute(2, 0, 1)


def size_fault(width: int, height: int) -> str:
    """Why no image or video of this size (pixels) is used; empty where it is."""
    if width * height > MAX_PIXELS:
        return f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}"
    if max(width, height) > MAX_SIDE:
        return f"it has {width} x {height} pixels, more than {MAX_SIDE:,} on one side"
    if min(width, height) < 1:
        return f"it has {width} x {height} pixels"
    return ""


def _opened(source: bytes | Path) -> Image.Image:
    if isinstance(source, bytes) and not source:
        raise BadImage("the image has zero bytes")
    if isinstance(source, Path) and (fault := file_fault(source)):
        raise _bad(source, fault)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except Exception as error:
        raise _bad(source, pointer_fault(source) or f"not a readable image ({_words(error)})") from error
    if refusal := size_fault(*image.size) or _mode_fault(image.mode):
        image.close()
        raise _bad(source, refusal)
    return image


@cache
def _formats() -> list[str]:
    """What Pillow decodes by itself: EPS starts another program, FITS unpacks without a limit, the others only name
    a format."""
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "FITS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")]


def _mode_fault(mode: str) -> str:
    if mode in _DEEP_MODES:
        return f"the image has more than 8 bits per pixel (Pillow mode {mode}); convert it to 8 bits"
    return ""


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB; anything with an alpha channel or a transparent color is composited on white."""
    if image.mode in ("RGBA", "LA", "PA") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _is_plain(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.info.get("transparency") is None


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _bad(source: bytes | Path, reason: str) -> BadImage:
    return BadImage(reason if isinstance(source, bytes) else f"{source}: {reason}")


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    # Pillow names the in-memory buffer by its address, which would make equal reasons differ.
    return "unknown format" if type(error).__name__ == "UnidentifiedImageError" else f"{type(error).__name__}: {error}"
