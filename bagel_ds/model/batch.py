"""PackedBatch: the only type that goes from data to model.

It is the complete input of one micro-batch. The step itself draws no random numbers, so equal batches give equal steps.
A modality that is absent is a tensor of zero rows or an empty tuple, never None.

Shape legend: T tokens of the pack, N text tokens, P ViT patches, G generation (VAE latent) tokens, K positions with a
cross-entropy label, M positions with a velocity target, F features of a latent token (64).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

CAUSAL, FULL, NOISE = "causal", "full", "noise"


@dataclass(frozen=True)
class PackedBatch:
    """Several samples concatenated to one sequence; all index tensors are int64.

    Indexes point into the sequence, and every position is in exactly one of text_indexes, vit_indexes and vae_indexes.
    A sample is a run of splits, a split a run of tokens: `sum(sample_lens) == sum(split_lens) == T`.
    """

    sample_lens: tuple[int, ...]
    split_lens: tuple[int, ...]
    attn_modes: tuple[str, ...]  # per split: CAUSAL, FULL or NOISE
    position_ids: Tensor  # [T] RoPE positions

    text_ids: Tensor  # [N] token ids, image markers included
    text_indexes: Tensor  # [N]

    vit_patches: Tensor  # [P, 3*14*14] uint8 pixels, or normalized float32; features (row, column, channel)
    vit_indexes: Tensor  # [P]
    vit_position_ids: Tensor  # [P] row * 70 + column
    vit_seqlens: tuple[int, ...]  # patches per ViT image

    images: tuple[Tensor, ...]  # per VAE image, in sequence order: [3, height, width] uint8 pixels
    latent_shapes: tuple[tuple[int, int], ...]  # per VAE image: (rows, columns) of latent tokens
    vae_indexes: Tensor  # [G]
    latent_position_ids: Tensor  # [G] row * max_latent_size + column
    timesteps: Tensor  # [G] float32, before the sigmoid; -inf marks a clean (conditioning) latent
    noise: Tensor  # [G, F] float32 standard normal: the flow's end point (used for noised latents)
    posterior_eps: Tensor  # [G, F] float32 standard normal: the draw for the VAE's posterior, in token layout

    mse_loss_indexes: Tensor  # [M] subset of vae_indexes, in the same order
    ce_loss_indexes: Tensor  # [K]
    label_ids: Tensor  # [K]
    ce_loss_weights: Tensor  # [K] float32, used only with ce_loss_reweighting

    samples: tuple[str, ...] = ()  # the origin of each sample, for messages: "dataset: file row group 3 row 17"
    datasets: tuple[str, ...] = ()  # the dataset of each sample, as in metrics; empty if unknown
    skipped: tuple[tuple[str, str], ...] = ()  # (dataset, reason) of planned samples that could not be read

    @property
    def sequence_length(self) -> int:
        """T."""
        return sum(self.sample_lens)

    @property
    def device(self) -> torch.device:
        return self.position_ids.device

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`; copies from pinned memory run in the background."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which copies to the device run in the background."""
        return self.map(Tensor.pin_memory)

    def map(self, function: Callable[[Any], Any]) -> PackedBatch:
        """The same batch with each tensor replaced by `function` of it."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "Tensor":
                changed[field.name] = function(value)
            elif field.name == "images":
                changed[field.name] = tuple(function(image) for image in value)
        return dataclasses.replace(self, **changed)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, as (x / 255 - 0.5) / 0.5; float input must already be normalized."""
    if pixels.dtype == torch.uint8:
        return (pixels.float() / 255 - 0.5) / 0.5
    return pixels


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """[C, h*patch, w*patch] -> [h*w, patch*patch*C]: patches row by row, features (row, column, channel)."""
    channels, height, width = image_CHW.shape
    rows, columns = height // patch, width // patch
    x = image_CHW.reshape(channels, rows, patch, columns, patch)
    return x.permute(1, 3, 2, 4, 0).reshape(rows * columns, patch * patch * channels)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Inverse of `patchify`: [rows*columns, patch*patch*C] -> [C, rows*patch, columns*patch]."""
    channels = tokens.shape[1] // (patch * patch)
    x = tokens.reshape(rows, columns, patch, patch, channels)
    return x.permute(4, 0, 2, 1, 3).reshape(channels, rows * patch, columns * patch)
