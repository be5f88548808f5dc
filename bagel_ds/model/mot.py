"""The mixture of transformers: Qwen2 layers with an understanding and a generation expert.

Guarantees: parameter names and shapes of `language_model.model.*` in a BAGEL checkpoint. Tokens pass
through norms, projections and MLPs as two contiguous tensors, one per expert; only attention sees them in sequence
order. Every module is called on every batch, if necessary with zero rows, unless the run has visual_gen off.

Shape legend: T tokens of the pack, U understanding tokens, G generation tokens (T = U + G), C hidden, H heads, K
key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Sequence

import torch
from torch import Tensor, nn

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.embeddings import apply_rope
from bagel_ds.model.layers import Embedding, RMSNorm, SwiGLUMLP
from bagel_ds.model.losses.head import CrossEntropyHead
from bagel_ds.model.permutation import permuted
from bagel_ds.model.pointwise.kernels import pointwise_kernels
from bagel_ds.model.quantized import linear_layer
from bagel_ds.model.recompute import Recompute
from bagel_ds.model.shape.config import BagelConfig

GEN = "_moe_gen"


class Experts(NamedTuple):
    """One tensor per expert: und [U, ...], gen [G, ...]."""

    und: Tensor
    gen: Tensor

    def __add__(self, other: Experts) -> Experts:  # type: ignore[override]
        return Experts(self.und + other.und, self.gen + other.gen)


class PackGeometry(NamedTuple):
    """What all layers need to know about the pack, apart from the tokens themselves."""

    attend: Attend
    cos_TD: Tensor
    sin_TD: Tensor
    to_sequence: Tensor  # [T] expert-major row of each sequence position
    to_experts: Tensor  # [T] sequence position of each expert-major row


class LayerCache(Protocol):
    """Keys and values of one layer from earlier passes; kept after RoPE, in the order of the layout's segments."""

    def extend(self, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of this pass with those of each sample's context in front of the sample's own."""


class TwoExperts(nn.Module):
    """A module whose children come in pairs `name` and `name_moe_gen`."""

    use_gen: bool
    freeze_und: bool

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.use_gen = config.visual_gen
        self.freeze_und = config.freeze_und

    def route(self, name: str, x: Experts) -> Experts:
        """Each expert's `name` on its own tokens."""
        und = getattr(self, name)(x.und)
        gen = getattr(self, name + GEN)(x.gen) if self.use_gen else und[:0]
        return Experts(und, gen)

    def stop_und(self, x: Experts) -> Experts:
        """With freeze_und, no gradient passes through understanding tokens."""
        return Experts(x.und.detach(), x.gen) if self.freeze_und else x


class MoTAttention(TwoExperts):
    def __init__(self, config: BagelConfig):
        super().__init__(config)
        llm = config.llm
        self.head_dim = llm.head_dim
        self.qk_norm = llm.qk_norm
        linear = linear_layer(config)
        self.kernels = pointwise_kernels(config.fused_kernels)
        for suffix in ("", GEN):
            self.add_module("q_proj" + suffix, linear(llm.hidden_size, llm.num_attention_heads * llm.head_dim))
            self.add_module("k_proj" + suffix, linear(llm.hidden_size, llm.num_key_value_heads * llm.head_dim))
            self.add_module("v_proj" + suffix, linear(llm.hidden_size, llm.num_key_value_heads * llm.head_dim))
            self.add_module(
                "o_proj" + suffix, linear(llm.num_attention_heads * llm.head_dim, llm.hidden_size, bias=False)
            )
            if llm.qk_norm:
                self.add_module("q_norm" + suffix, RMSNorm(llm.head_dim, llm.rms_norm_eps, self.kernels))
                self.add_module("k_norm" + suffix, RMSNorm(llm.head_dim, llm.rms_norm_eps, self.kernels))

    def forward(self, x: Experts, geometry: PackGeometry, cache: LayerCache | None) -> Experts:
        q_THD, k_TKD = (
            apply_rope(self._heads(which, x, geometry), geometry.cos_TD, geometry.sin_TD, self.kernels)
            for which in ("q", "k")
        )
        v_TKD = self._heads("v", x, geometry)
        if cache is not None:
            k_TKD, v_TKD = cache.extend(k_TKD, v_TKD)
        o_TC = geometry.attend(q_THD, k_TKD, v_TKD).flatten(1)
        by_expert = permuted(o_TC, geometry.to_experts, geometry.to_sequence)
        und, gen = by_expert.split([len(x.und), len(x.gen)])
        return self.stop_und(self.route("o_proj", Experts(und, gen)))

    def _heads(self, which: str, x: Experts, geometry: PackGeometry) -> Tensor:
        """Projected, normed and cut into heads, in sequence order: [T, H or K, D]."""
        projected = self.route(which + "_proj", x)
        heads = Experts(*(tokens.unflatten(-1, (-1, self.head_dim)) for tokens in projected))
        if self.qk_norm and which != "v":
            heads = self.route(which + "_norm", heads)
        return permuted(torch.cat(self.stop_und(heads)), geometry.to_sequence, geometry.to_experts)


class MoTLayer(TwoExperts):
    def __init__(self, config: BagelConfig, layers_after: int):
        super().__init__(config)
        self.layers_after = layers_after  # whose backward passes come before this one's
        llm = config.llm
        width, eps, kernels = llm.hidden_size, llm.rms_norm_eps, pointwise_kernels(config.fused_kernels)
        self.self_attn = MoTAttention(config)
        for suffix in ("", GEN):
            self.add_module("mlp" + suffix, SwiGLUMLP(width, llm.intermediate_size, linear_layer(config), kernels))
            self.add_module("input_layernorm" + suffix, RMSNorm(width, eps, kernels))
            self.add_module("post_attention_layernorm" + suffix, RMSNorm(width, eps, kernels))

    def forward(
        self, x_UC: Tensor, x_GC: Tensor, geometry: PackGeometry, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        x = Experts(x_UC, x_GC)
        x = x + self.self_attn(self.route("input_layernorm", x), geometry, cache)
        mlp = self.route("mlp", self.route("post_attention_layernorm", x))
        return tuple(x + self.stop_und(mlp))  # type: ignore[return-value]


class MoTModel(TwoExperts):
    """`language_model.model`: embedding, layers, final norms."""

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        llm = config.llm
        self.embed_tokens = Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config, after) for after in reversed(range(llm.num_hidden_layers)))
        for suffix in ("", GEN):
            kernels = pointwise_kernels(config.fused_kernels)
            self.add_module("norm" + suffix, RMSNorm(llm.hidden_size, llm.rms_norm_eps, kernels))

    def forward(
        self, x: Experts, geometry: PackGeometry, recompute: Recompute, caches: Sequence[LayerCache] = ()
    ) -> Experts:
        """Hidden states after the final norms; arguments as of `run_layers`."""
        return self.final_norm(self.run_layers(x, geometry, recompute, caches))

    def run_layers(
        self, x: Experts, geometry: PackGeometry, recompute: Recompute, caches: Sequence[LayerCache] = ()
    ) -> Experts:
        """The last layer's output, before the final norms. `caches` (inference only): one per layer."""
        for layer, cache in zip(self.layers, caches or (None,) * len(self.layers), strict=True):
            x = Experts(*recompute(layer, x.und, x.gen, geometry, cache))
        return x

    def final_norm(self, x: Experts) -> Experts:
        return self.stop_und(self.route("norm", x))


class LanguageModel(nn.Module):
    """Holds `model` and `lm_head` under the checkpoint's names; BAGEL calls the two itself."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.model = MoTModel(config)
        self.lm_head = CrossEntropyHead(config.llm.hidden_size, config.llm.vocab_size)
