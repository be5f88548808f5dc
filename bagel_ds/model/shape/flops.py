"""Arithmetic of the network, counted from its shapes: what one token, patch, cell or visible pair costs.

Guarantees: whole numbers, without torch. Counts are matrix products (2 FLOP per parameter and row); norms, embeddings
and the 64-wide latent projections are too small to count. What a training step makes of these counts (passes,
recomputation) is up to its users: data/plan/cost.py prices packs, train/metrics/throughput.py measures speed.
"""

from __future__ import annotations

from bagel_ds.model.shape.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig


def llm_matmul_parameters(llm: LLMConfig) -> int:
    """Parameters of one expert's linear maps in all layers: what each token is multiplied with."""
    attention = 2 * llm.hidden_size * (llm.num_attention_heads + llm.num_key_value_heads) * llm.head_dim
    return llm.num_hidden_layers * (attention + 3 * llm.hidden_size * llm.intermediate_size)


def head_parameters(llm: LLMConfig) -> int:
    """Parameters of the head: what each position with a label is multiplied with."""
    return llm.hidden_size * llm.vocab_size


def llm_pair_flops(llm: LLMConfig) -> int:
    """Forward FLOP of a visible query-key pair in all layers: scores and values, 2 FLOP per multiply-add each."""
    return 4 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim


def vit_matmul_parameters(vit: ViTConfig) -> int:
    """Parameters of the linear maps in all layers."""
    return vit.num_layers * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size)


def vit_pair_flops(vit: ViTConfig) -> int:
    """Forward FLOP of a pair of patches of one image in all layers."""
    return 4 * vit.num_layers * vit.hidden_size


def forward_flops(config: BagelConfig, tokens: int, pairs: int, labels: int, vit_seqlens: tuple[int, ...]) -> int:
    """Matrix products of one forward pass: `tokens` in the language model with `pairs`, `labels`, patches per image."""
    llm, vit = config.llm, config.vit
    total = 2 * llm_matmul_parameters(llm) * tokens + llm_pair_flops(llm) * pairs + 2 * head_parameters(llm) * labels
    if config.visual_und:
        total += 2 * vit_matmul_parameters(vit) * sum(vit_seqlens)
        total += vit_pair_flops(vit) * sum(length**2 for length in vit_seqlens)
    return total


def vae_flops_per_cell(vae: VAEConfig) -> int:
    """Forward FLOP of the encoder per latent cell (downsample**2 pixels), without the attention of its middle block."""

    def res_block(inputs: int, outputs: int) -> int:
        shortcut = inputs * outputs if inputs != outputs else 0
        return 9 * inputs * outputs + 9 * outputs * outputs + shortcut

    levels = len(vae.channel_multipliers)
    positions = vae.downsample**2  # of one cell at full resolution
    total = positions * 9 * 3 * vae.channels
    width = vae.channels
    for level, multiplier in enumerate(vae.channel_multipliers):
        for _ in range(vae.res_blocks):
            total += positions * res_block(width, vae.channels * multiplier)
            width = vae.channels * multiplier
        if level < levels - 1:
            positions //= 4
            total += positions * 9 * width * width
    total += 2 * res_block(width, width) + 4 * width * width + 9 * width * 2 * vae.z_channels
    return 2 * total
