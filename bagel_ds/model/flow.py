"""Time of the flow between a clean latent (t = 0) and noise (t = 1), for training and sampling alike."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """shift * t / (1 + (shift - 1) * t): more of the time near the noise for a shift above 1."""
    return shift * t / (1 + (shift - 1) * t)


def flow_time(timesteps: Tensor, shift: float) -> Tensor:
    """t of the flow from timesteps before the sigmoid (`PackedBatch.timesteps`); -inf, a clean latent, gives 0."""
    return shift_time(torch.sigmoid(timesteps), shift)


def sampling_times(points: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of the Euler steps from noise to the image, and their lengths, [points - 1] float32 each."""
    t = shift_time(torch.linspace(1, 0, points), shift)
    return t[:-1], t[:-1] - t[1:]
