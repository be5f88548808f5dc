"""The autoencoder against its recordings. padded_batch.* is excluded: REFERENCE 0, "encode each image by itself"."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from bagel_ds.model.batch import patchify
from bagel_ds.model.vae import AutoEncoder, encode_images
from bagel_ds.model_folder.folder import ModelFolder
from tests.recordings import (
    UNSET,
    bagel_config,
    cases,
    read_json,
    recorded_batch,
    reference,
    reference_folder,
    relative,
    tensors,
)


def recorded_images() -> list:
    if reference_folder() is None:
        return [pytest.param("0", marks=pytest.mark.skip(reason=UNSET))]
    return sorted({name.split(".")[0] for name in tensors("vae/vae")} - {"padded_batch"})


def image(number: str) -> dict[str, Tensor]:
    by_image: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors("vae/vae").items():
        key, _, what = name.partition(".")
        by_image[key][what] = tensor
    return by_image[number]


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    return ModelFolder(reference() / "model").load_vae()


@pytest.mark.parametrize("number", recorded_images())
def test_moments_and_latent_equal_the_recording(number: str, vae: AutoEncoder) -> None:
    recorded = image(number)
    moments = vae.moments(recorded["image"])
    assert relative(moments, recorded["moments"]) <= 1e-5
    assert relative(vae.sample(moments, recorded["posterior_eps"]), recorded["latent"]) <= 1e-5
    zero = torch.zeros_like(recorded["posterior_eps"])
    assert relative(vae.sample(moments, zero), recorded["latent_mean"]) <= 1e-5


@pytest.mark.parametrize("number", recorded_images())
def test_decoded_images_equal_the_recording(number: str, vae: AutoEncoder) -> None:
    recorded = image(number)
    assert relative(vae.decode(recorded["latent"]), recorded["decoded"]) <= 1e-5
    assert relative(vae.decode(recorded["latent_mean"]), recorded["decoded_mean"]) <= 1e-5


@pytest.mark.parametrize("number", recorded_images())
def test_latent_tokens_equal_the_patchified_recording(number: str, vae: AutoEncoder) -> None:
    recorded = image(number)
    patch = 2
    rows, columns = (size // patch for size in recorded["latent"].shape[-2:])
    eps = patchify(recorded["posterior_eps"][0], patch)
    found = encode_images(vae, [recorded["image"][0]], [(rows, columns)], eps, patch)
    assert relative(found, patchify(recorded["latent"][0], patch)) <= 1e-5


@pytest.mark.parametrize("stem", cases("forward/*.safetensors"))
def test_latents_of_equal_sized_packs_equal_the_recording(stem: str, vae: AutoEncoder) -> None:
    """Where nothing is padded, what the original encodes together is what we encode one by one."""
    info, recorded = read_json(stem), tensors(stem)
    config = bagel_config(reference() / "model")
    shapes = [(rows, columns) for rows, columns in info.get("patchified_vae_latent_shapes") or []]
    if not shapes:
        assert "in.padded_images" not in recorded
        return
    batch, latents = recorded_batch(recorded, info, config)
    pixels = config.latent_patch_size * vae.config.downsample
    full = recorded["in.padded_images"].shape[-2:]
    start = 0
    for number, (rows, columns) in enumerate(shapes):
        stop = start + rows * columns
        if (rows * pixels, columns * pixels) == tuple(full):
            eps = patchify(recorded["vae.posterior_eps"][number], config.latent_patch_size)
            picture = recorded["in.padded_images"][number]
            found = encode_images(vae, [picture], [(rows, columns)], eps, config.latent_patch_size)
            assert relative(found, latents[start:stop]) <= 1e-5
        start = stop
    assert start == len(latents) == len(batch.vae_indexes)


def test_an_image_is_encoded_the_same_whatever_stands_beside_it(vae: AutoEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in ((32, 48), (64, 32))]
    shapes = [(2, 3), (4, 2)]
    eps = torch.randn(14, 64, generator=generator)
    together = encode_images(vae, images, shapes, eps, 2)
    alone = [
        encode_images(vae, [images[0]], shapes[:1], eps[:6], 2),
        encode_images(vae, [images[1]], shapes[1:], eps[6:], 2),
    ]
    assert torch.equal(together, torch.cat(alone))
