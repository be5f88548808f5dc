"""SigLIP NaViT: packed image patches of any aspect ratio -> one feature per patch.

Guarantees: parameter names and shapes of `vit_model.*` in a BAGEL checkpoint. Zero images are fine.

Shape legend: P patches of all images, H heads, D head dim, W ViT width.
"""

from __future__ import annotations

from torch import Tensor, nn

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.layers import GELUMLP, Embedding, Linear
from bagel_ds.model.recompute import Recompute
from bagel_ds.model.shape.config import ViTConfig


class ViTAttention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x_PW: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x_PW).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).flatten(1))


class ViTLayer(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.self_attn = ViTAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GELUMLP(config.hidden_size, config.intermediate_size, config.hidden_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_PW: Tensor, attend: Attend) -> Tensor:
        x_PW = x_PW + self.self_attn(self.layer_norm1(x_PW), attend)
        return x_PW + self.mlp(self.layer_norm2(x_PW))


class ViTEmbeddings(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = Embedding(config.max_patches_per_side**2, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class ViTEncoder(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_layers))


class ViTVisionModel(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = ViTEmbeddings(config)
        self.encoder = ViTEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, attend: Attend, recompute: Recompute) -> Tensor:
        x_PW = self.embeddings(patches, position_ids)
        for layer in self.encoder.layers:
            x_PW = recompute(layer, x_PW, attend)
        return self.post_layernorm(x_PW)


class NaViT(nn.Module):
    """`forward` takes normalized patches [P, 588] in the model's dtype, attention within each image; returns [P, W]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vision_model = ViTVisionModel(config)

    def forward(self, patches: Tensor, position_ids: Tensor, attend: Attend, recompute: Recompute) -> Tensor:
        return self.vision_model(patches, position_ids, attend, recompute)
