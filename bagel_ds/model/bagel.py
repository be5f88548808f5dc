"""BAGEL: one packed sequence of text, images to read and images to draw -> cross entropy and velocity error.

Guarantees: parameter names and shapes of the original's `ema.safetensors`; the forward pass of REFERENCE 3 to 5,
drawing no random numbers; every module is called once per batch in one order, whatever the batch holds.

Shape legend: T tokens of the pack, U understanding tokens (text, then ViT patches), G generation tokens, K positions
with a label, M positions with a velocity target, P ViT patches, C hidden, F features of a latent token (64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from bagel_ds.model.attention import AttentionLayout
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from bagel_ds.model.cache import Cache
from bagel_ds.model.embeddings import PositionTable, TimestepEmbedder, rope_tables
from bagel_ds.model.layers import GELUMLP, Linear
from bagel_ds.model.mot import GEN, Experts, LanguageModel, PackGeometry
from bagel_ds.model.recompute import Recompute, keep
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.vit import NaViT


class BagelOutput(NamedTuple):
    ce: Tensor  # [K] fp32 cross entropy of each label
    mse: Tensor  # [M, F] fp32 squared error of the predicted velocity


class Prediction(NamedTuple):
    logits: Tensor  # [K, V] fp32, at `ce_loss_indexes`
    velocity: Tensor  # [M, F] fp32, at `mse_loss_indexes`
    last: Tensor  # [M, C] the last layer's output there, from which `velocity_of` makes the velocity


def flow_time(timesteps: Tensor, shift: float) -> Tensor:
    """t of the flow, 0 (clean) to 1 (noise), from timesteps before the sigmoid (`PackedBatch.timesteps`)."""
    sigma = torch.sigmoid(timesteps)
    return shift * sigma / (1 + (shift - 1) * sigma)


class Bagel(nn.Module):
    """Weights are not initialised here: load them (`model_folder/folder.py`) before the first forward."""

    def __init__(self, config: BagelConfig, recompute: Recompute = keep):
        super().__init__()
        self.config = config
        self.recompute = recompute
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config)
        self.time_embedder = TimestepEmbedder(width)
        self.vae2llm = Linear(config.latent_features, width)
        self.llm2vae = Linear(width, config.latent_features)
        self.latent_pos_embed = PositionTable(width, config.max_latent_size)
        self.vit_model = NaViT(config.vit)
        self.connector = GELUMLP(config.vit.hidden_size, width, width)
        self.vit_pos_embed = PositionTable(width, config.vit.max_patches_per_side)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which activations travel."""
        return self.llm2vae.weight.dtype

    @overload
    def forward(self, batch: PackedBatch, latents_GF: Tensor) -> BagelOutput: ...
    @overload
    def forward(self, batch: PackedBatch, latents_GF: Tensor, t_G: Tensor, cache: Cache) -> Prediction: ...
    def forward(
        self, batch: PackedBatch, latents_GF: Tensor, t_G: Tensor | None = None, cache: Cache | None = None
    ) -> BagelOutput | Prediction:
        """The losses of a pack. `latents_GF`: clean latent tokens [G, F] of its images (`vae.encode_images`), fp32.

        With a `cache`, predict instead: the pack's tokens come after the cached ones of their samples, `latents_GF` are
        latents at flow time `t_G`, used as they are, and the cache takes up the new tokens.
        """
        target = None
        if t_G is None:
            latents_GF, target, t_G = self.flow(batch, latents_GF)
        x = Experts(self.embed_understanding(batch), self.embed_generation(batch, latents_GF, t_G))
        geometry = self.geometry(batch, () if cache is None else cache.lens)
        hidden = self.language_model.model(x, geometry, self.recompute, cache)

        ce_rows = geometry.to_sequence[batch.ce_loss_indexes]
        of_text = self.language_model.lm_head(hidden.und[ce_rows], None if target is None else batch.label_ids)
        mse_rows = geometry.to_sequence[batch.mse_loss_indexes] - len(x.und)
        if target is None:
            assert cache is not None and cache.last_GC is not None
            return Prediction(of_text, self.llm2vae(hidden.gen[mse_rows]).float(), cache.last_GC[mse_rows])
        if not self.config.visual_gen:
            return BagelOutput(of_text, target[mse_rows])
        velocity = self.llm2vae(hidden.gen[mse_rows])
        return BagelOutput(of_text, (velocity.float() - target[mse_rows]) ** 2)

    def velocity_of(self, last_MC: Tensor) -> Tensor:
        """The velocity [M, F] fp32 that follows from the last layer's output at latent tokens (`Prediction.last`)."""
        norm = getattr(self.language_model.model, "norm" + GEN)
        return self.llm2vae(norm(last_MC)).float()

    def flow(self, batch: PackedBatch, latents_GF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = (1-t) x0 + t noise, its velocity noise - x0 (both [G, F] fp32) and t [G]; clean latents have t = 0."""
        t_G = flow_time(batch.timesteps, self.config.timestep_shift)
        noised = (1 - t_G[:, None]) * latents_GF + t_G[:, None] * batch.noise
        return noised, batch.noise - latents_GF, t_G

    def embed_understanding(self, batch: PackedBatch) -> Tensor:
        """[U, C]: text embeddings, then ViT features."""
        x_UC = self.language_model.model.embed_tokens(batch.text_ids)
        if self.config.visual_und:
            patches = normalize_pixels(batch.vit_patches).to(self.dtype)
            features = self.vit_model(patches, batch.vit_position_ids, batch.vit_seqlens, self.recompute)
            features = self.connector(features) + self.vit_pos_embed(batch.vit_position_ids)
            x_UC = torch.cat([x_UC, features])
        return x_UC.detach() if self.config.freeze_und else x_UC

    def embed_generation(self, batch: PackedBatch, noised_GF: Tensor, t_G: Tensor) -> Tensor:
        """[G, C]: noised or clean latents with their timestep and position."""
        if not self.config.visual_gen:
            return noised_GF.new_zeros((0, self.config.llm.hidden_size), dtype=self.dtype)
        latents = self.vae2llm(noised_GF.to(self.dtype))
        return latents + self.time_embedder(t_G) + self.latent_pos_embed(batch.latent_position_ids)

    def geometry(self, batch: PackedBatch, cached_lens: Sequence[int] = ()) -> PackGeometry:
        """Order of tokens, who attends to whom, and rotary tables of a pack; `cached_lens`: of each sample."""
        to_experts = torch.cat([batch.text_indexes, batch.vit_indexes, batch.vae_indexes])
        assert len(to_experts) == batch.sequence_length, "every token is text, ViT or VAE"
        to_sequence = torch.empty_like(to_experts)
        to_sequence[to_experts] = torch.arange(len(to_experts), device=to_experts.device)
        llm = self.config.llm
        cos, sin = rope_tables(batch.position_ids, llm.head_dim, llm.rope_theta, self.dtype)
        attention = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes, cached_lens)
        return PackGeometry(attention, cos, sin, to_sequence, to_experts)
