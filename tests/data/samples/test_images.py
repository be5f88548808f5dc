"""Decoding and resizing: what is accepted, what is refused and with which reason."""

from __future__ import annotations

import gc
import io
import os
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

from bagel_ds.data.samples import resize
from bagel_ds.data.samples.images import (
    MAX_SIDE,
    BadImage,
    ImageTransform,
    decode_rgb,
    hidden_damage,
    ignored_orientation,
    image_size,
    resize_to_uint8,
    to_rgb,
)
from tests.small_data import picture


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(b""))


def _with_chunk(png: bytes, chunk: bytes) -> bytes:
    """The PNG with a chunk behind its header, which ends at byte 33."""
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(mode: str) -> None:
    decoded = decode_rgb(_saved(Image.new(mode, (3, 2), 0), "PNG"))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() == 255


def test_a_transparent_palette_color_becomes_white() -> None:
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
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 0, 250))]
    content = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_rgb(content))[0, 0].tolist() == [250, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("as_file", [False, True])
def test_rgb_files_are_not_copied_and_can_be_used_when_the_file_is_closed(
    kind: str, as_file: bool, tmp_path: Path
) -> None:
    content = picture(70, 50, kind=kind)
    path = tmp_path / "picture"
    path.write_bytes(content)
    decoded = decode_rgb(path if as_file else content)
    path.unlink()
    assert decoded.format == kind, "the image that was opened, no copy"
    assert decoded.mode == "RGB" and getattr(decoded, "fp", None) is None
    with Image.open(io.BytesIO(content)) as image:
        expected = image.convert("RGB")
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    turned = decoded.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(expected)))
    assert (decoded.copy().size, decoded.resize((9, 8)).size, decoded.crop((0, 0, 3, 4)).size) == (
        (70, 50),
        (9, 8),
        (3, 4),
    )


@pytest.mark.parametrize("size", [(70, 50), (2500, 2000)])
def test_images_are_decoded_into_one_block_of_memory_which_the_resize_reads_in_place(size: tuple[int, int]) -> None:
    assert resize._in_place(decode_rgb(_saved(Image.new("RGB", size, (9, 8, 7)), "JPEG"))) is not None


def test_an_image_that_the_caller_holds_is_copied() -> None:
    """What it does with it afterwards changes nothing."""
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is not image and to_rgb(image).mode == "RGB"


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
        (_png_header(50_000_000, 1), "50000000 x 1 pixels, more than 1,000,000 on one side"),
        (_png_header(1, MAX_SIDE + 1), "1 x 1000001 pixels, more than 1,000,000 on one side"),
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


@pytest.mark.parametrize("size", [(MAX_SIDE, 200), (1, MAX_SIDE), (65_535, 3_000)])
def test_long_images_are_used_up_to_the_limit_of_a_side(size: tuple[int, int]) -> None:
    assert image_size(_png_header(*size)) == size


@pytest.mark.parametrize(("size", "kept"), [(64 * 2**20, True), (64 * 2**20 + 1, False), (1100 * 2**20, False)])
def test_a_text_that_unpacks_to_more_than_64_mib_is_left_out_and_the_picture_used(size: int, kept: bool) -> None:
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(min(2**20, size - at))) for at in range(0, size, 2**20)) + packer.flush()
    content = _with_chunk(picture(40, 30), _chunk(b"zTXt", b"note\0\0" + packed))
    assert len(content) < 2 * 2**20
    with Image.open(io.BytesIO(content)) as image:
        assert (len(image.info.get("note", "")) == size) == kept
    assert image_size(content) == (40, 30)
    assert np.array_equal(np.asarray(decode_rgb(content)), np.asarray(decode_rgb(picture(40, 30))))


def test_checksums_and_cut_off_pixels_are_damage_that_decoding_alone_does_not_see() -> None:
    sound = picture(64, 64)
    place = sound.index(b"IDAT")
    size = struct.unpack(">I", sound[place - 4 : place])[0]
    wrong_sum = bytearray(sound)
    wrong_sum[place + 4 + size] ^= 1
    assert hidden_damage(sound) == "" and hidden_damage(picture(64, 64, kind="JPEG")) == ""
    assert np.array_equal(np.asarray(decode_rgb(bytes(wrong_sum))), np.asarray(decode_rgb(sound)))
    assert "checksum" in hidden_damage(bytes(wrong_sum))
    assert "truncated" in hidden_damage(picture(64, 64, kind="JPEG")[:-200])
    with pytest.raises(BadImage, match="unknown format"):
        hidden_damage(b"not an image")
    assert decode_rgb(picture(64, 64, kind="JPEG")[:-200]).size == (64, 64), "training still uses what is there"


def test_orientations_that_decoding_ignores_are_known() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (12, 8))
    for kind in ("JPEG", "PNG", "WEBP"):
        content = _saved(image, kind, exif=exif.tobytes())
        assert ignored_orientation(content) == 6 and decode_rgb(content).size == image_size(content) == (12, 8)
        assert ignored_orientation(_saved(image, kind)) == 1
    turned = _saved(image, "TIFF", exif=exif)
    assert ignored_orientation(turned) == 1 and decode_rgb(turned).size == image_size(turned) == (8, 12)


@pytest.mark.parametrize(
    ("name", "reason"), [("folder", "it is a folder"), ("pipe", "it is a named pipe"), ("link", "which does not exist")]
)
def test_what_is_not_a_regular_file_is_named_and_never_opened(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for read in (image_size, decode_rgb, hidden_damage, ignored_orientation):
        with pytest.raises(BadImage, match=f"{tmp_path / name}: .*{reason}"):
            read(tmp_path / name)


def test_a_missing_file_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=f"{tmp_path}/absent.png: no such file"):
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
