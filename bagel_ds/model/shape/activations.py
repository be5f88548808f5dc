"""Bytes of activations by moment of a step, for one pack on one rank.

Guarantees: the coefficients are counted from the network's own operations in bf16 (what autograd saves, plus what a
backward step holds besides); a test runs the real modules, adds up live tensors and compares. They bound any mixture of
tokens from above: the worst is a pack whose tokens all go to one expert.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.model.shape.config import BagelConfig, VAEConfig

CHUNK_ELEMENTS = 2**25  # as in model/losses/head.py, which this file must not import: it needs torch
CHUNK_COLUMNS = 1024  # the least a chunk of logits has
ARENA_ALIGNMENT = 512  # bytes; as in model/offload.py


class PackShape(NamedTuple):
    """The largest pack to plan for. `labels` and `vit_tokens` are parts of `tokens`."""

    tokens: int
    labels: int
    vit_tokens: int


class Activations(NamedTuple):
    """Bytes. `held` live from the forward to the backward pass of their part; the rest only at their moment."""

    checkpoints: int  # inputs of recomputed layers, or with "none" all that their backward needs
    layer_input: int  # of them, one decoder layer's
    inputs: int  # embeddings, flow and pixels of the pack
    layer: int  # one decoder layer's own while its backward runs
    vit_layer: int
    vit_checkpoints: int
    vit_layer_input: int
    head: int  # hidden states of labels, their gradient, one chunk of logits


def activations(config: BagelConfig, pack: PackShape, mode: str, dtype_bytes: int) -> Activations:
    """`mode` as the argument activation_checkpointing: "full", "none" or "offload" (sizes as "full")."""
    llm, vit = config.llm, config.vit
    tokens, patches = pack.tokens, pack.vit_tokens if config.visual_und else 0
    share = dtype_bytes / 2  # the counts below are those of bf16; fp32 copies in norms weigh the same in both
    width, inner = llm.hidden_size, llm.intermediate_size
    keys = width * llm.num_key_value_heads / llm.num_attention_heads
    saved = share * (19 * width + 2 * keys + 8 * inner) + 14 * width + 3 * keys  # of one layer
    transient = share * (2 * width + keys + 4 * inner)
    vit_saved = share * (15 * vit.hidden_size + 4 * vit.intermediate_size) + 3 * vit.hidden_size
    vit_transient = share * 2 * vit.intermediate_size
    checkpoint, vit_checkpoint = 2 * share * width, 2 * share * vit.hidden_size
    layers = (checkpoint, vit_checkpoint) if mode != "none" else (saved + checkpoint, vit_saved + vit_checkpoint)
    patch_features = vit.num_channels * vit.patch_size**2
    return Activations(
        checkpoints=int(tokens * llm.num_hidden_layers * layers[0]),
        layer_input=int(tokens * checkpoint),
        inputs=int(
            tokens * (share * 4 * width + 12 * config.latent_features) + patches * patch_features * (1 + 2 * share)
        ),
        layer=int(tokens * (transient if mode == "none" else saved + transient)),
        vit_layer=int(patches * (vit_transient if mode == "none" else vit_saved + vit_transient)),
        vit_checkpoints=int(patches * vit.num_layers * layers[1]),
        vit_layer_input=int(patches * vit_checkpoint),
        head=head_bytes(pack.labels, llm.vocab_size, width, dtype_bytes),
    )


def arena_bytes(config: BagelConfig, tokens: int, dtype_bytes: int) -> int:
    """Host memory for the layer inputs of any pack of so many tokens, all of which may be patches of ViT images.

    Each decoder layer has two inputs, one of each expert.
    """
    llm, vit = config.llm, config.vit
    inputs = 2 * llm.num_hidden_layers, vit.num_layers if config.visual_und else 0
    rows = tokens * llm.num_hidden_layers * llm.hidden_size + tokens * inputs[1] * vit.hidden_size
    return rows * dtype_bytes + sum(inputs) * ARENA_ALIGNMENT


def head_bytes(labels: int, vocabulary: int, width: int, dtype_bytes: int) -> int:
    """Cross entropy in chunks: logits in the run's dtype and twice in fp32, the labels' rows and their gradient."""
    columns = min(vocabulary, max(CHUNK_COLUMNS, CHUNK_ELEMENTS // max(labels, 1)))
    per_logit = 8 + (dtype_bytes if dtype_bytes < 4 else 0)
    return int(labels * columns * per_logit + labels * width * (2 * dtype_bytes + 4))


def vae_bytes(vae: VAEConfig, pixels: int, bf16: bool, on_cpu: bool) -> int:
    """Encoding one image under autocast, by pixel and channel of the first level.

    CUDA's autocast keeps group norms in fp32, the CPU's does not. The attention of the middle block holds no matrix
    over all cells (model/vae.py).
    """
    rate = 20.5 if not bf16 else 10.5 if on_cpu else 16.0
    return int(rate * vae.channels * pixels)
