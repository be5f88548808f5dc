"""BAGEL: one packed sequence of text, images to read and images to draw -> cross entropy and velocity error.

Guarantees: parameter names and shapes of the original's `ema.safetensors`; the original's forward pass, without random
numbers. Every module is called once per batch, in the same order for every batch.

Shape legend: T tokens of the pack, U understanding tokens (text, then ViT patches), G generation tokens, K positions
with a label, M positions with a velocity target, P ViT patches, C hidden, F features of a latent token (64).
"""

from __future__ import annotations

from typing import NamedTuple, Sequence, overload

import torch
from torch import Tensor, nn

from bagel_ds.model.attention.backends import attention_backend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from bagel_ds.model.embeddings import PositionTable, TimestepEmbedder, rope_tables
from bagel_ds.model.flow import flow_time, noised
from bagel_ds.model.layers import GELUMLP, Linear
from bagel_ds.model.mot import GEN, Experts, LanguageModel, LayerCache, PackGeometry
from bagel_ds.model.recompute import Recompute, keep
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import adapted_layers
from bagel_ds.model.vit import NaViT


class BagelOutput(NamedTuple):
    ce: Tensor  # [K] fp32 cross entropy of each label
    mse: Tensor  # [M, F] fp32 squared error of the predicted velocity


class Prediction(NamedTuple):
    logits: Tensor  # [K, V] fp32, of the token after each of `ce_loss_indexes`
    velocity: Tensor  # [M, F] fp32, at `mse_loss_indexes`
    last: Tensor  # [M, C] the last layer's output there, from which `velocity_of` makes the velocity


class Bagel(nn.Module):
    """Weights are not initialized here: load them (`model_folder/folder.py`) before the first forward."""

    def __init__(self, config: BagelConfig, recompute: Recompute = keep):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.attention = attention_backend(config.attention)
        self.vit_attention = attention_backend(config.vit_attention)
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config)
        self.time_embedder = TimestepEmbedder(width)
        self.vae2llm = Linear(config.latent_features, width)
        self.llm2vae = Linear(width, config.latent_features)
        self.latent_pos_embed = PositionTable(width, config.max_latent_size)
        self.vit_model = NaViT(config.vit)
        self.connector = GELUMLP(config.vit.hidden_size, width, width)
        self.vit_pos_embed = PositionTable(width, config.vit.max_patches_per_side)
        if config.lora is not None:
            adapted = adapted_layers(config)
            for name, layer in self.named_modules():
                if isinstance(layer, Linear) and name in adapted:
                    layer.add_adapter(config.lora)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, in which activations travel."""
        return self.language_model.model.embed_tokens.weight.dtype  # of a part that every network has

    @overload
    def forward(self, batch: PackedBatch, latents_GF: Tensor) -> BagelOutput: ...
    @overload
    def forward(
        self, batch: PackedBatch, latents_GF: Tensor, t_G: Tensor, caches: Sequence[LayerCache], cached: Sequence[int]
    ) -> Prediction: ...
    def forward(
        self,
        batch: PackedBatch,
        latents_GF: Tensor,
        t_G: Tensor | None = None,
        caches: Sequence[LayerCache] = (),
        cached: Sequence[int] = (),
    ) -> BagelOutput | Prediction:
        """The losses of a pack. `latents_GF`: clean latent tokens [G, F] of its images (`vae.encode_images`), fp32.

        With `t_G`, a prediction instead: `latents_GF` are latents at these times of the flow, used as they are, and
        each sample continues the `cached` tokens that it has in the layers' `caches`.
        """
        if t_G is not None:
            return self._predict(batch, latents_GF, t_G, caches, cached)
        t_G = flow_time(batch.timesteps, self.config.timestep_shift)
        x_t, target = noised(latents_GF, batch.noise, t_G), batch.noise - latents_GF
        x = Experts(self.embed_understanding(batch), self.embed_generation(batch, x_t, t_G))
        geometry = self.geometry(batch)
        hidden = self.language_model.model(x, geometry, self.recompute)

        ce_rows = geometry.to_sequence[batch.ce_loss_indexes]
        ce = self.language_model.lm_head(hidden.und.index_select(0, ce_rows), batch.label_ids)
        mse_rows = geometry.to_sequence[batch.mse_loss_indexes] - len(x.und)
        if not self.config.visual_gen:
            return BagelOutput(ce, target[mse_rows])
        velocity = self.llm2vae(hidden.gen.index_select(0, mse_rows))
        return BagelOutput(ce, (velocity.float() - target[mse_rows]) ** 2)

    def _predict(
        self, batch: PackedBatch, x_t_GF: Tensor, t_G: Tensor, caches: Sequence[LayerCache], cached: Sequence[int]
    ) -> Prediction:
        x = Experts(self.embed_understanding(batch), self.embed_generation(batch, x_t_GF, t_G))
        geometry = self.geometry(batch, cached)
        network = self.language_model.model
        last = network.run_layers(x, geometry, keep, caches)
        hidden = network.final_norm(last)
        ce_rows = geometry.to_sequence[batch.ce_loss_indexes]
        logits = self.language_model.lm_head(hidden.und.index_select(0, ce_rows))
        mse_rows = geometry.to_sequence[batch.mse_loss_indexes] - len(x.und)
        if not self.config.visual_gen:
            return Prediction(logits, x_t_GF[mse_rows], last.gen[mse_rows])
        return Prediction(logits, self.llm2vae(hidden.gen.index_select(0, mse_rows)).float(), last.gen[mse_rows])

    def velocity_of(self, last_MC: Tensor) -> Tensor:
        """The velocity [M, F] fp32 that follows from the last layer's output at latent tokens (`Prediction.last`)."""
        norm = getattr(self.language_model.model, "norm" + GEN)
        return self.llm2vae(norm(last_MC)).float()

    def embed_understanding(self, batch: PackedBatch) -> Tensor:
        """[U, C]: text embeddings, then ViT features."""
        x_UC = self.language_model.model.embed_tokens(batch.text_ids)
        if self.config.visual_und:
            patches = normalize_pixels(batch.vit_patches).to(self.dtype)
            within_images = self.vit_attention(AttentionLayout.images(batch.vit_seqlens))
            features = self.vit_model(patches, batch.vit_position_ids, within_images, self.recompute)
            features = self.connector(features) + self.vit_pos_embed(batch.vit_position_ids)
            x_UC = torch.cat([x_UC, features])
        return x_UC.detach() if self.config.freeze_und else x_UC

    def embed_generation(self, batch: PackedBatch, x_t_GF: Tensor, t_G: Tensor) -> Tensor:
        """[G, C]: latents at time t of the flow (0: clean) with their time and position."""
        if not self.config.visual_gen:
            return x_t_GF.new_zeros((0, self.config.llm.hidden_size), dtype=self.dtype)
        latents = self.vae2llm(x_t_GF.to(self.dtype))
        return latents + self.time_embedder(t_G) + self.latent_pos_embed(batch.latent_position_ids)

    def geometry(self, batch: PackedBatch, cached_lens: Sequence[int] = ()) -> PackGeometry:
        """Order of tokens, attention and rotary tables of a pack, whose samples stand behind `cached_lens` tokens."""
        to_experts = torch.cat([batch.text_indexes, batch.vit_indexes, batch.vae_indexes])
        assert len(to_experts) == batch.sequence_length, "every token is text, ViT or VAE"
        to_sequence = torch.empty_like(to_experts)
        to_sequence[to_experts] = torch.arange(len(to_experts), device=to_experts.device)
        llm = self.config.llm
        cos, sin = rope_tables(batch.position_ids, llm.head_dim, llm.rope_theta, self.dtype)
        layout = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes, cached_lens)
        return PackGeometry(self.attention(layout), cos, sin, to_sequence, to_experts)
