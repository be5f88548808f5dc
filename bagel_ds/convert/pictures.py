"""A picture as a row gives it (a path, bytes, or both) -> the bytes of an image file that training can use.

Guarantees: the bytes are the source's own, so nothing loses quality. Only a picture that EXIF turns is encoded again,
upright, because training ignores EXIF: JPEG as JPEG of quality 95 without color subsampling, all others as PNG. Every
picture is decoded once; one that training would refuse raises `BadRow` with its path.
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from PIL import Image

from bagel_ds.data.formats.source import image_bytes
from bagel_ds.data.samples.images import BadImage, decode_rgb, ignored_orientation, image_size
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.errors import shown
from bagel_ds.regular_files import file_fault

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = b"\xff\xd8"
_LARGEST = 2**30  # bytes of a file


def picture(value: Any, name: str, folder: Path) -> bytes:
    """The picture that the column `name` holds; relative paths begin in `folder`. Raises `BadRow`."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None and value.get("path") else image_bytes(value, name)
    if value is None or value == "":
        raise BadRow(f"{name} is empty, expected a picture")
    if isinstance(value, bytes):
        return _upright(value)
    if isinstance(value, str) and value.startswith("data:"):
        return _upright(_inline(value, name))
    if not isinstance(value, (str, Path)):
        raise BadRow(f"{name} is {shown(value)}, expected the path of a picture or its bytes")
    path = _path(value, folder) if isinstance(value, str) else value
    if fault := file_fault(path):
        raise BadRow(f"{path}: {fault}{_hint(str(value))}")
    image_size(path)  # refuses what is no picture before it is read
    if path.stat().st_size > _LARGEST:
        raise BadRow(f"{path}: the file is larger than {_LARGEST >> 30} GiB")
    try:
        return _upright(path.read_bytes())
    except BadImage as bad:
        raise BadRow(f"{path}: {bad}") from bad


def suffix(content: bytes) -> str:
    """The usual ending of the file's name, by its content."""
    with Image.open(io.BytesIO(content)) as image:
        word = (image.format or "img").lower()
    return {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(word, word)


def _path(value: str, folder: Path) -> Path:
    name = value.removeprefix("file://")
    if "://" in name:
        raise BadRow(f"{shown(value)} is a URL; download the picture and give its path")
    return Path(name).expanduser() if name.startswith("~/") else folder / name


def _hint(value: str) -> str:
    return "; backslashes do not separate folders here, write /" if "\\" in value else ""


def _inline(value: str, name: str) -> bytes:
    head, comma, content = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadRow(f"{name} is a data URL without base64")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"{name} is a data URL that isn't valid base64 ({error})") from error


def _upright(content: bytes) -> bytes:
    image = decode_rgb(content)
    turn = _TURNS.get(ignored_orientation(content))
    if turn is None:
        return content
    buffer = io.BytesIO()
    if content.startswith(_JPEG):
        image.transpose(turn).save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.transpose(turn).save(buffer, "PNG")
    return buffer.getvalue()
