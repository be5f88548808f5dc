"""The original's way to draw and to answer, for comparison in bench/inference.py only: REFERENCE of the inference.

One prompt at a time, one call of the network for each branch of guidance. Both experts write into zeros by index, and
every layer of every call copies the whole cache with the new keys and values into fresh tensors. The weights are those
of our network, so the results are the same and only the way is compared. Texts and t2i only, for one sample.

Shape legend: T new tokens, N cached and new ones, K key/value heads, D head dim, C hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_ds.data.batches.layout import position_grid
from bagel_ds.inference import pictures
from bagel_ds.inference.network import Network
from bagel_ds.inference.sampler import guided
from bagel_ds.inference.settings import Settings
from bagel_ds.model.embeddings import apply_rope, rope_tables
from bagel_ds.model.flow import sampling_times


@dataclass
class Cache:
    """What one branch has read; `position` is its next RoPE position."""

    keys: list[Tensor | None]
    values: list[Tensor | None]
    position: int = 0
    length: int = 0


@dataclass
class Query:
    """The new tokens of a call: [T, C], and which of them each expert takes."""

    x_TC: Tensor
    positions: Tensor
    und: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    gen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def draw(network: Network, prompt: str, settings: Settings, seed: int) -> Tensor:
    """The clean latents [M, F] of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    height, width = settings.image_shapes
    branches = {"gen": _empty(network), "cfg_text": _empty(network), "cfg_img": _empty(network)}
    for name in ("gen", "cfg_img"):
        _read_text(network, branches[name], network.tokenizer.encode(prompt))
    tokens = pictures.tokens_of(network, height, width)
    x = pictures.noise(network, tokens, generator).to(network.device)
    ends = sampling_times(settings.num_timesteps, settings.timestep_shift)
    low, high = settings.cfg_interval
    for t, dt in zip(ends[:-1], ends[:-1] - ends[1:]):
        guides = settings.cfg_text_scale > 1 and low < float(t) <= high
        asked = ["gen", "cfg_text", "cfg_img"] if guides else ["gen"]
        if settings.cfg_img_scale <= 1:
            asked = asked[:2]
        velocities = {name: _velocity(network, branches[name], x, float(t), height, width) for name in asked}
        x = x - guided(velocities, settings) * float(dt)
    return x


def answer(network: Network, prompt: str, tokens: int) -> list[int]:
    """The ids of a greedy answer of exactly so many tokens."""
    cache = _empty(network)
    _read_text(network, cache, network.tokenizer.encode(prompt))
    token, ids = network.tokenizer.special.bos, []
    for _ in range(tokens):
        hidden = _read(network, cache, _text_query(network, [token], cache.position), causal=True)
        cache.position += 1
        token = int(network.model.language_model.lm_head(hidden).argmax())
        ids.append(token)
    return ids


def _empty(network: Network) -> Cache:
    layers = network.model.config.llm.num_hidden_layers
    return Cache([None] * layers, [None] * layers)


def _read_text(network: Network, cache: Cache, ids: list[int]) -> None:
    special = network.tokenizer.special
    _read(network, cache, _text_query(network, [special.bos, *ids, special.eos], cache.position), causal=True)
    cache.position += len(ids) + 2


def _text_query(network: Network, ids: list[int], position: int) -> Query:
    device = network.device
    x = network.model.language_model.model.embed_tokens(torch.tensor(ids, device=device))
    numbers = torch.arange(len(ids), device=device)
    return Query(x, numbers + position, numbers)


def _velocity(network: Network, cache: Cache, x_MF: Tensor, t: float, height: int, width: int) -> Tensor:
    """[M, F] fp32; the cache stays as it is."""
    model, special, options, device = network.model, network.tokenizer.special, network.layout, network.device
    markers = torch.tensor([special.start_of_image, special.end_of_image], device=device)
    embedded = model.language_model.model.embed_tokens(markers)
    x = embedded.new_zeros(len(x_MF) + 2, embedded.shape[1])
    und = torch.tensor([0, len(x) - 1], device=device)
    gen = torch.arange(1, len(x) - 1, device=device)
    places = position_grid(height, width, options.latent_stride, options.max_latent_size).to(device)
    x[und] = embedded
    times = model.time_embedder(torch.full((len(x_MF),), t, device=device))
    x[gen] = model.vae2llm(x_MF.to(model.dtype)) + times + model.latent_pos_embed(places)
    query = Query(x, torch.full((len(x),), cache.position, device=device), und, gen)
    hidden = _read(network, cache, query, causal=False, keep=False)
    return model.llm2vae(hidden)[gen].float()


@torch.no_grad()
def _read(network: Network, cache: Cache, query: Query, causal: bool, keep: bool = True) -> Tensor:
    """[T, C] after the final norms."""
    llm = network.model.config.llm
    layers: Any = network.model.language_model.model
    cos_sin = rope_tables(query.positions, llm.head_dim, llm.rope_theta, query.x_TC.dtype)
    total = cache.length + len(query.x_TC)
    old = torch.arange(cache.length, device=network.device)
    new = torch.arange(cache.length, total, device=network.device)
    x = query.x_TC
    for number, layer in enumerate(layers.layers):
        attention = layer.self_attn
        normed = _routed(layer, "input_layernorm", x, query)
        q, k, v = (_heads(attention, which, normed, query, llm.head_dim, llm.qk_norm) for which in "qkv")
        q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        merged = []
        for cached, fresh in ((cache.keys[number], k), (cache.values[number], v)):
            whole = fresh.new_zeros(total, *fresh.shape[1:])
            whole[new] = fresh
            if cached is not None:
                whole[old] = cached
            merged.append(whole)
        if keep:
            cache.keys[number], cache.values[number] = merged
        seen = _attend(q, *merged, causal=causal and len(x) > 1)
        x = x + _routed(attention, "o_proj", seen, query)
        x = x + _routed(layer, "mlp", _routed(layer, "post_attention_layernorm", x, query), query)
    if keep:
        cache.length = total
    return _routed(layers, "norm", x, query)


def _heads(attention: Any, which: str, x: Tensor, query: Query, head_dim: int, normed: bool) -> Tensor:
    heads = _routed(attention, f"{which}_proj", x, query).unflatten(-1, (-1, head_dim))
    return _routed(attention, f"{which}_norm", heads, query) if normed and which != "v" else heads


def _routed(module: Any, name: str, x: Tensor, query: Query) -> Tensor:
    """Each expert's `name` on its own rows, written into zeros; texts have one expert."""
    if not len(query.gen):
        return getattr(module, name)(x)
    und = getattr(module, name)(x[query.und])
    gen = getattr(module, f"{name}_moe_gen")(x[query.gen])
    out = und.new_zeros(len(x), *und.shape[1:])
    out[query.und], out[query.gen] = und, gen
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Causal only where nothing is cached: a prompt's first text."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1).flatten(1)
