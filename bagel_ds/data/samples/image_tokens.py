"""The numbers that decide how many tokens an image takes: patch sizes and the sides of the position tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayoutOptions:
    """Patch sizes are in pixels (of latent patches: in latent cells), sides of position tables in patches."""

    vit_patch_size: int = 14
    latent_patch_size: int = 2
    vae_downsample: int = 8
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    interpolate_pos: bool = False
    latent_channels: int = 16

    @property
    def latent_stride(self) -> int:
        """Pixels per side of a latent token."""
        return self.latent_patch_size * self.vae_downsample

    @property
    def latent_features(self) -> int:
        """F: features of a latent token."""
        return self.latent_patch_size**2 * self.latent_channels
