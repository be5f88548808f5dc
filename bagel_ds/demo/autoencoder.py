"""Weights for a tiny FLUX autoencoder that works without training.

Guarantees: a latent cell holds its 8x8 pixels' colours at 4 pixels' resolution (12 numbers, mixed into 16 channels by a
random isometry) with next to no noise; the decoder paints the cell's mean colours back, smoothed, at a contrast
normalised per picture. How: residual branches and attention end in zeros, so each block passes its input on, and the
few convolutions left on the path average pixels or take Haar differences.

Shape legend: F features before the mixing (12), Z latent channels (16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model.vae import AutoEncoder, Downsample, ResBlock, SpatialAttention, Upsample

CONFIG = VAEConfig(channels=32)  # the least that 32 normalisation groups allow; everything else as released
LOG_VARIANCE = -8.0  # of the posterior: a standard deviation of 0.018
GAIN = (
    8.0  # brings the latents of the demo's pictures to a mean square of about 1, as those of the released autoencoder
)
MEAN_COLOUR = 0.6  # of the demo's pictures, in -1..1
ANCHOR = 16.0  # much larger than any feature, see `_encoder`

# Orthonormal Haar basis over the four corners of a 2x2 block, corners in the order of `_corners`.
HAAR = 0.5 * torch.tensor(
    [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
)


@torch.no_grad()
def haar_autoencoder(generator: torch.Generator) -> AutoEncoder:
    """The network with its weights, fp32; `generator` draws the mixing and the weights that have no effect."""
    vae = AutoEncoder(CONFIG)
    for name, parameter in vae.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            if hasattr(module, "nin_shortcut"):
                _pass_on(module.nin_shortcut)
        elif isinstance(module, SpatialAttention):
            nn.init.zeros_(module.proj_out.weight)
    mixing_ZF = torch.linalg.qr(torch.randn(CONFIG.z_channels, 12, generator=generator)).Q
    _encoder(vae, mixing_ZF)
    _decoder(vae, mixing_ZF)
    return vae


def _encoder(vae: AutoEncoder, mixing_ZF: Tensor) -> None:
    """Colours averaged twice, split into Haar features once, mixed.

    The last norm would divide by each picture's own contrast. Each of its groups of four channels therefore holds
    (f, -f, anchor, -anchor): mean zero and a root mean square of anchor / sqrt(2), whatever f is. And
    silu(x) - silu(-x) = x, so the pair passes the activation as if there were none.
    """
    encoder = vae.encoder
    _pass_on(encoder.conv_in)
    steps = [module.conv for module in encoder.modules() if isinstance(module, Downsample)]
    for step in steps[:-1]:
        nn.init.zeros_(step.weight)
        for colour in range(3):
            _corners(step, colour, colour, torch.full((4,), 0.25))
    split = steps[-1]
    split_bias = split.get_parameter("bias")
    nn.init.zeros_(split.weight)
    for feature in range(12):
        colour, basis = divmod(feature, 4)
        _corners(split, 4 * feature, colour, HAAR[basis])
        _corners(split, 4 * feature + 1, colour, -HAAR[basis])
        split_bias[4 * feature + 2], split_bias[4 * feature + 3] = ANCHOR, -ANCHOR
    out = encoder.conv_out
    nn.init.zeros_(out.weight)
    strength = GAIN * ANCHOR / math.sqrt(2)
    out.weight[: len(mixing_ZF), 0:48:4, 1, 1] = strength * mixing_ZF
    out.weight[: len(mixing_ZF), 1:48:4, 1, 1] = -strength * mixing_ZF
    out_bias = out.get_parameter("bias")
    out_bias[: len(mixing_ZF)] = -GAIN * mixing_ZF @ _mean_features()
    out_bias[len(mixing_ZF) :] = LOG_VARIANCE


def _decoder(vae: AutoEncoder, mixing_ZF: Tensor) -> None:
    """The block's mean colours (features 0, 4, 8), enlarged and smoothed; the sign twins undo the last activation."""
    decoder = vae.decoder
    colours_3Z = mixing_ZF.T[::4] / GAIN / 2  # the first Haar feature is twice the mean
    nn.init.zeros_(decoder.conv_in.weight)
    for sign, start in ((1, 0), (-1, 3)):
        decoder.conv_in.weight[start : start + 3, :, 1, 1] = sign * colours_3Z
        decoder.conv_in.get_parameter("bias")[start : start + 3] = sign * MEAN_COLOUR
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    for module in decoder.modules():
        if isinstance(module, Upsample):
            nn.init.zeros_(module.conv.weight)
            for channel in range(6):
                module.conv.weight[channel, channel] = blur[:, None] * blur
    out = decoder.conv_out
    nn.init.zeros_(out.weight)
    for colour in range(3):  # the last norm leaves mean 0 and variance 1 per channel: give a usual contrast back
        out.weight[colour, colour, 1, 1], out.weight[colour, colour + 3, 1, 1] = 0.5, -0.5
    nn.init.constant_(out.get_parameter("bias"), MEAN_COLOUR)


def _mean_features() -> Tensor:
    """Features [F] of a picture that is MEAN_COLOUR everywhere."""
    features_F = torch.zeros(12)
    features_F[::4] = 2 * MEAN_COLOUR
    return features_F


def _pass_on(convolution: nn.Conv2d) -> None:
    """Channel i of the output is channel i of the input, as far as both exist."""
    nn.init.zeros_(convolution.weight)
    middle = convolution.kernel_size[0] // 2
    for channel in range(min(convolution.in_channels, convolution.out_channels)):
        convolution.weight[channel, channel, middle, middle] = 1.0


def _corners(convolution: nn.Conv2d, to: int, of: int, weights_4: Tensor) -> None:
    """A stride-2 convolution that reads (top left, top right, bottom left, bottom right) of each 2x2 block."""
    convolution.weight[to, of, :2, :2] = weights_4.reshape(2, 2)
