"""Weights for a tiny FLUX autoencoder that works without training.

Guarantees: a latent cell holds the colors of its 8x8 pixels at a resolution of 4 pixels (12 numbers, mixed into 16
channels by a random isometry) with almost no noise. The decoder paints the cell's mean colors, smoothed, with a
contrast normalized per picture. To achieve this, residual branches and attention end in zeros, so each block passes its
input on, and the few remaining convolutions average pixels or take Haar differences.

Shape legend: F features before the mixing (12), Z latent channels (16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model.vae import AutoEncoder, Downsample, ResBlock, SpatialAttention, Upsample

CONFIG = VAEConfig(channels=32)  # the minimum for 32 normalization groups; everything else as released
LOG_VARIANCE = -8.0  # of the posterior: a standard deviation of 0.018
GAIN = 8.0  # gives the latents of the demo's pictures a mean square of about 1, like the released autoencoder's
MEAN_COLOR = 0.6  # of the demo's pictures, in -1..1
ANCHOR = 16.0  # much larger than any feature, see `_encoder`

# Orthonormal Haar basis over the four corners of a 2x2 block, corners in the order of `_corners`.
HAAR = 0.5 * torch.tensor(
    [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
)


@torch.no_grad()
def haar_autoencoder(generator: torch.Generator) -> AutoEncoder:
    """The network with its weights in fp32. `generator` draws the mixing and the weights without effect."""
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
    """Average colors twice, split them into Haar features once, and mix these.

    The last norm would divide by each picture's contrast. So each of its groups of four channels holds
    (f, -f, anchor, -anchor): mean zero and a root mean square of anchor / sqrt(2), whatever f is. The activation has no
    effect on such a pair, because silu(x) - silu(-x) = x.
    """
    encoder = vae.encoder
    _pass_on(encoder.conv_in)
    steps = [module.conv for module in encoder.modules() if isinstance(module, Downsample)]
    for step in steps[:-1]:
        nn.init.zeros_(step.weight)
        for color in range(3):
            _corners(step, color, color, torch.full((4,), 0.25))
    split = steps[-1]
    split_bias = split.get_parameter("bias")
    nn.init.zeros_(split.weight)
    for feature in range(12):
        color, basis = divmod(feature, 4)
        _corners(split, 4 * feature, color, HAAR[basis])
        _corners(split, 4 * feature + 1, color, -HAAR[basis])
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
    """Enlarge and smooth each block's mean colors (features 0, 4, 8); pairs of signs cancel the last activation."""
    decoder = vae.decoder
    colors_3Z = mixing_ZF.T[::4] / GAIN / 2  # the first Haar feature is twice the mean
    nn.init.zeros_(decoder.conv_in.weight)
    for sign, start in ((1, 0), (-1, 3)):
        decoder.conv_in.weight[start : start + 3, :, 1, 1] = sign * colors_3Z
        decoder.conv_in.get_parameter("bias")[start : start + 3] = sign * MEAN_COLOR
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    for module in decoder.modules():
        if isinstance(module, Upsample):
            nn.init.zeros_(module.conv.weight)
            for channel in range(6):
                module.conv.weight[channel, channel] = blur[:, None] * blur
    out = decoder.conv_out
    nn.init.zeros_(out.weight)
    for color in range(3):  # restore a usual contrast after the last norm, which leaves mean 0 and variance 1
        out.weight[color, color, 1, 1], out.weight[color, color + 3, 1, 1] = 0.5, -0.5
    nn.init.constant_(out.get_parameter("bias"), MEAN_COLOR)


def _mean_features() -> Tensor:
    """Features [F] of a picture that is MEAN_COLOR everywhere."""
    features_F = torch.zeros(12)
    features_F[::4] = 2 * MEAN_COLOR
    return features_F


def _pass_on(convolution: nn.Conv2d) -> None:
    """Make channel i of the output equal to channel i of the input, if both exist."""
    nn.init.zeros_(convolution.weight)
    middle = convolution.kernel_size[0] // 2
    for channel in range(min(convolution.in_channels, convolution.out_channels)):
        convolution.weight[channel, channel, middle, middle] = 1.0


def _corners(convolution: nn.Conv2d, to: int, of: int, weights_4: Tensor) -> None:
    """Make a stride-2 convolution weigh (top left, top right, bottom left, bottom right) of each 2x2 block."""
    convolution.weight[to, of, :2, :2] = weights_4.reshape(2, 2)
