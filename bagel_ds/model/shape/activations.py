"""Bytes of activations by phase of a step, for one pack on one rank.

Guarantees: the coefficients are counted from the network's own operations in bf16: what autograd saves, plus what a
backward step holds for itself. tests/memory/test_phases.py runs the real modules, adds up live tensors and compares.
The counts bound any mixture of tokens from above; the worst pack sends all its tokens to one expert.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.model.shape.config import BagelConfig, VAEConfig

CHUNK_ELEMENTS = 2**25  # fp32 logits that the head holds at once: 128 MiB
CHUNK_COLUMNS = 1024  # the least columns of a chunk of logits
KEPT_LOGITS = 2**29  # logits that the head keeps for its backward pass, in the run's dtype: 1 GiB in bf16
ARENA_ALIGNMENT = 512  # bytes, of the slices in the arena of offloaded layer inputs


class PackShape(NamedTuple):
    """The largest pack to plan for. `tokens` includes `labels` and `vit_tokens`."""

    tokens: int
    labels: int
    vit_tokens: int


class Activations(NamedTuple):
    """Bytes. Checkpoints and inputs live from the forward to the backward pass, the rest only in its own phase."""

    checkpoints: int  # inputs of recomputed layers, or with "none" all that their backward pass needs
    layer_input: int  # the part of one decoder layer
    inputs: int  # embeddings, flow and pixels of the pack
    layer: int  # what one decoder layer adds during its backward pass
    products: int  # of that, results of products and attention, which "selective" keeps from the forward pass
    vit_layer: int
    vit_checkpoints: int
    vit_layer_input: int
    head: int  # hidden states of labels, their gradient, logits that are kept and one chunk more


def activations(config: BagelConfig, pack: PackShape, mode: str, dtype_bytes: int) -> Activations:
    """`mode` is the argument activation_checkpointing: "full", "none", "offload" or "selective" (sized like "full")."""
    llm, vit = config.llm, config.vit
    tokens, patches = pack.tokens, pack.vit_tokens if config.visual_und else 0
    share = dtype_bytes / 2  # the counts below are those of bf16
    width, inner = llm.hidden_size, llm.intermediate_size
    keys = width * llm.num_key_value_heads / llm.num_attention_heads
    # What attention reads. Segments with a prefix have it in copies of their own, as many again on average. In fp32 a
    # GPU has no kernel that shares them between heads (attention/sdpa.py).
    attended = 2 * width if dtype_bytes == 4 else 4 * keys
    saved = share * (14 * width + 2 * keys + attended + 6 * inner)  # of one layer
    transient = share * (4 * width + 4 * inner)
    products = share * (8 * width + 4 * keys + 4 * inner) + 4 * llm.num_attention_heads
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
        products=int(tokens * products),
        vit_layer=int(patches * (vit_transient if mode == "none" else vit_saved + vit_transient)),
        vit_checkpoints=int(patches * vit.num_layers * layers[1]),
        vit_layer_input=int(patches * vit_checkpoint),
        head=head_bytes(pack.labels, llm.vocab_size, width, dtype_bytes),
    )


def arena_bytes(config: BagelConfig, tokens: int, dtype_bytes: int) -> int:
    """Host memory for the layer inputs of any pack of `tokens`, even one that is all ViT patches.

    Each decoder layer has two inputs, one per expert.
    """
    llm, vit = config.llm, config.vit
    inputs = 2 * llm.num_hidden_layers, vit.num_layers if config.visual_und else 0
    rows = tokens * llm.num_hidden_layers * llm.hidden_size + tokens * inputs[1] * vit.hidden_size
    return rows * dtype_bytes + sum(inputs) * ARENA_ALIGNMENT


def chunk_columns(positions: int) -> int:
    """Vocabulary columns of one chunk of logits."""
    return max(CHUNK_COLUMNS, CHUNK_ELEMENTS // max(positions, 1))


def head_bytes(labels: int, vocabulary: int, width: int, dtype_bytes: int) -> int:
    """Cross entropy: logits that are kept, what a chunk needs in fp32, the labels' rows and their gradient."""
    columns = min(vocabulary, chunk_columns(labels))
    every = labels * vocabulary
    kept = every if every <= KEPT_LOGITS else KEPT_LOGITS + labels * columns
    fp32 = labels * columns * (8 if dtype_bytes < 4 else 4)
    return int(kept * dtype_bytes + fp32 + labels * width * (2 * dtype_bytes + 4))


def vae_bytes(vae: VAEConfig, pixels: int, bf16: bool, on_cpu: bool) -> int:
    """Peak of encoding one image under autocast: a rate per pixel and channel of the first level.

    CUDA's autocast keeps group norms in fp32; on a CPU the convolutions take their products in fp32. The middle block's
    attention holds no matrix over all cells (model/vae.py).
    """
    rate = 20.5 if not bf16 else 16.5 if on_cpu else 16.0
    return int(rate * vae.channels * pixels)


def decoder_bytes(vae: VAEConfig, pixels: int, bf16: bool, on_cpu: bool) -> int:
    """Peak of decoding one image, counted like `vae_bytes`.

    It is in the first block at full size, which has twice the channels: its input, the norm's output and silu's.
    """
    rate = 24.5 if not bf16 else 23.5 if on_cpu else 20.5
    return int(rate * vae.channels * pixels)
