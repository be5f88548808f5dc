"""The FLUX autoencoder: images <-> 16-channel latents, frozen.

Guarantees: parameter names and shapes of `ae.safetensors`. Each image is encoded separately, so its latent does not
depend on the other images of the pack (the original pads them to one canvas). Weights are fp32; run it under autocast
for bf16 arithmetic.

Shape legend: B images, c channels, h w latent cells (height/8, width/8).
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_ds.model.batch import PackedBatch, normalize_pixels, patchify
from bagel_ds.model.shape.config import VAEConfig

GROUPS = 32


class Conv2d(nn.Conv2d):
    """A convolution that takes its products in fp32 on a CPU where autocast asks for bf16.

    Inputs, weights and result are rounded to bf16 as there, and sums run in fp32 in both. CPUs without AVX-512 have no
    bf16 convolutions: torch's plain loops took 50 to 90 times as long as fp32's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        weight, bias = self.weight.to(dtype).float(), self.bias if self.bias is None else self.bias.to(dtype).float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.to(dtype).float(), weight, bias).to(dtype)


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in, eps=1e-6)
        self.conv1 = Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels_out, eps=1e-6)
        self.conv2 = Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """One head over all cells, 1x1 convolutions as projections."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (self._cells(conv(normed)) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(attended)

    @staticmethod
    def _cells(x: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, 1, cells, c], contiguous: with strided channels torch picks the kernel that builds the
        whole cells x cells matrix, 1 GiB in fp32 for an image of 1024 x 1024.
        """
        return x.flatten(2).transpose(1, 2)[:, None].contiguous()


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution and the change to the next one, if there is one."""

    def __init__(self, channels: Sequence[int], **change: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(channels, channels[1:]))
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            for step in module if name == "block" else [module]:  # type: ignore[union-attr]
                x = step(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            change = {} if last else {"downsample": Downsample(width)}
            self.down.append(Level([previous] + [width] * config.res_blocks, **change))
            previous = width
        self.mid = Middle(previous)
        self.norm_out = nn.GroupNorm(GROUPS, previous, eps=1e-6)
        self.conv_out = Conv2d(previous, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """`up.0` is the full-resolution level; levels run from the last to the first."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            previous = widths[min(level + 1, len(widths) - 1)]
            change = {} if level == 0 else {"upsample": Upsample(width)}
            self.up.append(Level([previous] + [width] * (config.res_blocks + 1), **change))
        self.norm_out = nn.GroupNorm(GROUPS, widths[0], eps=1e-6)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encoder and decoder. Training only encodes; `decodes=False` leaves out the decoder, the larger part."""

    def __init__(self, config: VAEConfig = VAEConfig(), decodes: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if decodes:
            self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalized pixels -> [B, 32, h, w]: mean and log variance of the posterior."""
        return self.encoder(images)

    def sample(self, moments: Tensor, eps: Tensor) -> Tensor:
        """scale * (mean + exp(logvar / 2) * eps - shift): the latent as BAGEL reads it, [B, 16, h, w]."""
        mean, log_variance = moments.chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * eps
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of `sample`, then the decoder: [B, 16, h, w] -> [B, 3, H, W], nominally -1..1."""
        assert hasattr(self, "decoder"), "made with decodes=False"
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)


def encode_batch(vae: AutoEncoder, batch: PackedBatch, patch: int, bf16: bool) -> Tensor:
    """A batch's images as clean latent tokens [G, F] fp32; with `bf16` in the arithmetic of a network in bf16."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
        return encode_images(vae, batch.images, batch.latent_shapes, batch.posterior_eps, patch)


@torch.no_grad()
def encode_images(
    vae: AutoEncoder,
    images: Sequence[Tensor],
    latent_shapes: Sequence[tuple[int, int]],
    posterior_eps_GF: Tensor,
    patch: int,
) -> Tensor:
    """Latent tokens [G, F] fp32 of images (uint8 or normalized [3, H, W]), one image at a time.

    `posterior_eps_GF` holds the posterior's draws in token layout, rows*columns tokens per image, in order. Only the
    top-left rows*patch x columns*patch cells of a latent become tokens.
    """
    tokens = []
    eps_per_image = posterior_eps_GF.split([rows * columns for rows, columns in latent_shapes])
    for image, (rows, columns), eps in zip(images, latent_shapes, eps_per_image):
        moments = vae.moments(normalize_pixels(image)[None])[0].float()
        mean, log_variance = moments[:, : rows * patch, : columns * patch].chunk(2)
        mean, log_variance = patchify(mean, patch), patchify(log_variance, patch)
        tokens.append(vae.sample(torch.cat([mean, log_variance], dim=1), eps))
    return torch.cat(tokens) if tokens else posterior_eps_GF
