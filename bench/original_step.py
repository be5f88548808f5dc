"""The original's way through a training step, for comparison in bench/step.py only.

The weights are those of our network and so are the losses; only the way is the original's: tokens stay in sequence
order, each expert's part is gathered before and scattered after every norm and linear layer; keys and values are copied
for every query head; each sample has a dense mask; the head makes all logits at once and the loss takes them in fp32.

Shape legend: T tokens of the pack, U and G those of the two experts, H heads, K key/value heads, D head dim, C hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from bagel_ds.model.embeddings import rope_tables
from bagel_ds.model.flow import flow_time, noised
from bagel_ds.model.mot import GEN


class Routing(NamedTuple):
    und: Tensor  # [U] positions in the sequence
    gen: Tensor  # [G]
    masks: tuple[Tensor, ...]  # per sample, [tokens, tokens] added to the scores
    sample_lens: tuple[int, ...]
    cos_TD: Tensor
    sin_TD: Tensor


def losses(model: Bagel, batch: PackedBatch, latents_GF: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy of each label [K] and squared errors [M, F], both fp32, as `Bagel.forward` returns them."""
    config: Any = model.config
    network: Any = model.language_model.model
    t_G = flow_time(batch.timesteps, config.timestep_shift)
    x = network.embed_tokens(batch.text_ids).new_zeros(batch.sequence_length, config.llm.hidden_size)
    x[batch.text_indexes] = network.embed_tokens(batch.text_ids)
    if len(batch.vit_indexes):
        within = model.attention(AttentionLayout.images(batch.vit_seqlens))
        patches = normalize_pixels(batch.vit_patches).to(x.dtype)
        features = model.vit_model(patches, batch.vit_position_ids, within, _checkpointed if recompute else _called)
        x[batch.vit_indexes] = model.connector(features) + model.vit_pos_embed(batch.vit_position_ids)
    if len(batch.vae_indexes):
        latents = model.vae2llm(noised(latents_GF, batch.noise, t_G).to(x.dtype))
        x[batch.vae_indexes] = latents + model.time_embedder(t_G) + model.latent_pos_embed(batch.latent_position_ids)
    routing = _routing(model, batch, x.dtype)
    for layer in network.layers:
        x = (_checkpointed if recompute else _called)(_layer, layer, x, routing)
    x = _routed(network, "norm", x, routing)
    logits = F.linear(x[batch.ce_loss_indexes], model.language_model.lm_head.weight)
    ce = F.cross_entropy(logits.float(), batch.label_ids, reduction="none")
    velocity = model.llm2vae(x[batch.mse_loss_indexes])
    target = (batch.noise - latents_GF)[t_G > 0]
    return ce, (velocity.float() - target) ** 2


def _called(layer: Any, *inputs: Any) -> Tensor:
    found: Tensor = layer(*inputs)
    return found


def _checkpointed(layer: Any, *inputs: Any) -> Tensor:
    found: Tensor = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return found


def _routing(model: Bagel, batch: PackedBatch, dtype: torch.dtype) -> Routing:
    llm = model.config.llm
    masks = []
    layout = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes)
    whole, start = layout.dense_mask(), 0
    for length in batch.sample_lens:
        seen = whole[start : start + length, start : start + length]
        masks.append(torch.zeros(length, length, dtype=dtype).masked_fill_(~seen, -torch.inf))
        start += length
    und = torch.cat([batch.text_indexes, batch.vit_indexes])
    tables = rope_tables(batch.position_ids, llm.head_dim, llm.rope_theta, dtype)
    return Routing(und, batch.vae_indexes, tuple(masks), batch.sample_lens, *tables)


def _layer(layer: Any, x: Tensor, routing: Routing) -> Tensor:
    x = x + _attention(layer.self_attn, _routed(layer, "input_layernorm", x, routing), routing)
    return x + _routed(layer, "mlp", _routed(layer, "post_attention_layernorm", x, routing), routing)


def _attention(attention: Any, x: Tensor, routing: Routing) -> Tensor:
    projected = (_routed(attention, f"{which}_proj", x, routing) for which in "qkv")
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in projected)
    if attention.qk_norm:
        q, k = _routed(attention, "q_norm", q, routing), _routed(attention, "k_norm", k, routing)
    q, k = (_rotated(heads, routing.cos_TD[:, None], routing.sin_TD[:, None]) for heads in (q, k))
    groups = q.shape[1] // k.shape[1]
    k, v = (heads[:, :, None].expand(-1, -1, groups, -1).reshape(q.shape) for heads in (k, v))
    found = []
    parts = zip(*(heads.transpose(0, 1).split(routing.sample_lens, dim=1) for heads in (q, k, v)), routing.masks)
    for query, key, value, mask in parts:
        found.append(F.scaled_dot_product_attention(query[None], key[None], value[None], mask)[0])
    heads_HTD = torch.cat(found, dim=1)
    return _routed(attention, "o_proj", heads_HTD.transpose(0, 1).flatten(1), routing)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _routed(module: Any, name: str, x: Tensor, routing: Routing) -> Tensor:
    """Each expert's `name` on its own rows, written into zeros."""
    und = getattr(module, name)(x[routing.und])
    gen = getattr(module, name + GEN)(x[routing.gen])
    found = und.new_zeros(len(x), *und.shape[1:])
    found[routing.und], found[routing.gen] = und, gen
    return found
