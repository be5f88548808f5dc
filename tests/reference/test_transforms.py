"""Image decoding, the resize rule and its pixels against the recordings, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bagel_ds.data.samples.images import ImageTransform, decode_rgb, image_size, resize_to_uint8
from bagel_ds.model.batch import normalize_pixels
from tests.recordings import UNSET, read_json, reference, reference_folder, tensors

SIZES, IMAGES = "transforms/resize", "transforms/images"


def _listed(stem: str, key: str) -> list[Any]:
    if reference_folder() is None:
        return [pytest.param(0, marks=pytest.mark.skip(reason=UNSET))]
    return list(range(len(read_json(stem)[key])))


@pytest.mark.parametrize("args", _listed(SIZES, "args"))
def test_resized_sizes_equal_the_recorded_ones(args: int) -> None:
    recorded = read_json(SIZES)
    transform = ImageTransform(**recorded["args"][args])
    rows = [row for row in recorded["rows"] if row["args"] == args]
    sizes = [transform.size(row["w"], row["h"], row["img_num"]) for row in rows]
    assert sizes == [(row["out_w"], row["out_h"]) for row in rows]


def test_default_max_pixels_is_the_original_one() -> None:
    assert ImageTransform(16, 1024, 512).max_pixels == read_json(SIZES)["default_max_pixels"]


@pytest.mark.parametrize("conversion", ["canvas", "upstream"])
@pytest.mark.parametrize("number", _listed(IMAGES, "images"))
def test_decoded_and_resized_pixels_equal_the_recorded_ones(number: int, conversion: str) -> None:
    info = read_json(IMAGES)
    image = info["images"][number]
    if conversion == "upstream" and image["mode"] == "LA":
        pytest.skip("REFERENCE 0: LA images are composited on white, upstream drops their alpha")
    recorded = tensors(IMAGES)
    name = image["file"].rsplit("/", 1)[-1]
    content = (reference() / "transforms" / image["file"]).read_bytes()
    decoded = decode_rgb(content)
    assert image_size(content) == tuple(image["size"]) == decoded.size
    assert np.array_equal(np.asarray(decoded), recorded[f"{name}.{conversion}.rgb_uint8"].numpy())
    expected = {f"{name}.{conversion}.tensor": info["args_tensor"]}
    if conversion == "upstream":
        expected[f"{name}.vit.tensor"] = info["args_vit_tensor"]
    for key, args in expected.items():
        pixels = resize_to_uint8(decoded, ImageTransform(**args))
        assert pixels.dtype == torch.uint8
        assert torch.equal(normalize_pixels(pixels), recorded[key]), key
