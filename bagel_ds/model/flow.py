"""The rectified flow between images and noise: its time, its path, and the times at which a sampler steps.

Guarantees: the original's formulas, once for training, inspection and sampling. It is not in losses/, because the
network's forward pass and the sampler use it, and the losses only read its time.

Shape legend: G latent tokens, F features of a latent token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise: shift * t / (1 + (shift - 1) * t)."""
    return shift * t / (1 + (shift - 1) * t)


def flow_time(timesteps: Tensor, shift: float) -> Tensor:
    """t of the flow, 0 (clean) to 1 (noise), from timesteps before the sigmoid (`PackedBatch.timesteps`)."""
    return shifted(torch.sigmoid(timesteps), shift)


def noised(latents_GF: Tensor, noise_GF: Tensor, t_G: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t noise, whose velocity dx/dt is noise - x_0."""
    return (1 - t_G[:, None]) * latents_GF + t_G[:, None] * noise_GF


def sampling_times(num_timesteps: int, shift: float) -> Tensor:
    """[num_timesteps] fp32, from 1 (noise) to 0 (image): the ends of num_timesteps - 1 Euler steps."""
    return shifted(torch.linspace(1, 0, num_timesteps), shift)
