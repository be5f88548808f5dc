"""Pictures as the network reads and draws them.

Guarantees: sizes and pixels are the original inferencer's: an input is first resized by the rule of images to draw, and
that picture is what both the autoencoder and the ViT get; drawn pixels are cut off, not rounded, to 8 bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded
from bagel_ds.data.samples.images import BadImage, decode_rgb, resize_to_uint8, to_rgb
from bagel_ds.data.samples.sample import VAE, VIT
from bagel_ds.errors import UserError
from bagel_ds.inference.network import Network
from bagel_ds.model.batch import unpatchify


def opened(image: Image.Image | str | Path | bytes) -> Image.Image:
    """RGB, alpha composited on white. Raises `UserError` for a file (or its bytes) that is damaged or too large."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    try:
        return decode_rgb(image if isinstance(image, bytes) else Path(image))
    except BadImage as fault:
        named = "image:" if isinstance(image, bytes) else "image"  # the fault begins with the file's name
        raise UserError(f"{named} {fault}. Pass a PNG, JPEG or WebP file.") from None


def resized(network: Network, image: Image.Image) -> Image.Image:
    """By the rule of images to draw; an edit has this size."""
    pixels = resize_to_uint8(image, network.vae_transform)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_see(network: Network, picture: Image.Image) -> Loaded:
    """A `resized` picture for the ViT."""
    return Loaded(VIT, image=resize_to_uint8(picture, network.vit_transform))


def to_redraw(network: Network, picture: Image.Image, generator: torch.Generator) -> Loaded:
    """A `resized` picture as clean latents; the autoencoder's posterior is drawn from `generator`."""
    pixels = resize_to_uint8(picture, network.vae_transform)
    tokens = tokens_of(network, *pixels.shape[1:])
    return Loaded(VAE, image=pixels, posterior_eps=noise(network, tokens, generator))


def tokens_of(network: Network, height: int, width: int) -> int:
    """Latent tokens of an image of so many pixels."""
    stride = network.layout.latent_stride
    return (height // stride) * (width // stride)


def noise(network: Network, tokens: int, generator: torch.Generator) -> Tensor:
    """Standard normal [tokens, F] fp32, drawn on the CPU so that every device draws the same."""
    return torch.randn(tokens, network.layout.latent_features, generator=generator)


def decoded(network: Network, latents_MF: Tensor, height: int, width: int) -> Image.Image:
    """The picture of clean latents [M, F]."""
    assert network.vae is not None, "drawing needs the autoencoder"
    stride, patch = network.layout.latent_stride, network.layout.latent_patch_size
    latent = unpatchify(latents_MF, height // stride, width // stride, patch)[None]
    with torch.no_grad(), torch.autocast(network.device.type, torch.bfloat16, enabled=network.in_bf16):
        pixels = network.vae.decode(latent)[0].float()
    pixels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
