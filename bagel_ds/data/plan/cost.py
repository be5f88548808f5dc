"""What a pack costs: floating-point operations of one training micro-step, counted from the shapes of the network.

Guarantees: integer arithmetic only, so every rank and machine computes the same numbers. A pack costs exactly the sum
of its samples, because attention never crosses samples. There are two costs, because ranks wait for each other after
each: vision (ViT and VAE) and the language model. Operations are those of a step with activation checkpointing under
ZeRO-3, as torch counts them (tests/data/plan/test_cost.py), without negligible ones (norms, embeddings, the 64-wide
latent projections).

bench/cost_model.py compares costs with measured times (docs/benchmarks.md, "What a pack costs"), so far on a CPU:
operations explain the language model's time of full packs to 1.5 %, tokens to 3.8 %. All kinds of operations have the
same price. Kernels reach different shares of the peak, but ratios from 1/2 to 4 between attention and linear layers, or
between VAE and ViT, change the imbalance of planned packs by less than the packer's tolerances: attention is an eighth
of the language model's work at 7B, vision a thirtieth of the total.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bagel_ds.data.samples.sample import TEXT, VAE, VIT, SamplePlan
from bagel_ds.model.shape.config import BagelConfig, VAEConfig, ViTConfig
from bagel_ds.model.shape.flops import (
    head_parameters,
    llm_matmul_parameters,
    llm_pair_flops,
    vae_flops_per_cell,
    vit_matmul_parameters,
    vit_pair_flops,
)
from bagel_ds.model.shape.parts import Freezing, trainable_parts

UNIT = 10**6  # costs are whole MFLOP: sums over any pack stay far below 2**53, exact as int64 and as float64
# Matrix products of a checkpointed layer in one step, in units of a forward pass: forward, recomputation, gradient of
# the input, and (only if they train) gradient of the weights.
FROZEN_PASSES, TRAINED_PASSES = 3, 4
# Attention's backward recomputes the scores: 2.5 forwards (Dao, FlashAttention-2, section 4.1). Doubled: an integer.
ATTENTION_HALF_PASSES = 9


class Cost(NamedTuple):
    """MFLOP of one micro-step."""

    llm: int
    vision: int


class Work(NamedTuple):
    """What a sample asks of the network, in the units that `CostModel` prices."""

    und_tokens: int  # text, ViT patches and all image markers
    gen_tokens: int  # VAE latents
    ce_tokens: int  # positions with a cross-entropy label
    attention_pairs: int  # visible (query, key) pairs
    vit_patches: tuple[int, ...]  # per ViT image
    vae_pixels: tuple[int, ...]  # per VAE image

    @property
    def tokens(self) -> int:
        """The sample's length."""
        return self.und_tokens + self.gen_tokens


def work_of(plan: SamplePlan) -> Work:
    """Count a sample's work. A query sees its own split (text: up to itself) and all earlier ones except noise."""
    und = gen = ce = pairs = visible = 0
    vit: list[int] = []
    vae: list[int] = []
    for kind, _, tokens, loss, dropped, special_label, height, width, _ in plan.entries:
        if dropped:
            continue
        length = tokens + 2
        if kind == TEXT:
            und += length
            pairs += length * (length + 1) // 2 + length * visible
            visible += length
            ce += (tokens + 1 if loss else 0) + (special_label >= 0)
            continue
        pairs += length * (length + visible)
        if kind == VIT:
            und += length
            visible += length
            vit.append(tokens)
        else:
            assert kind == VAE, kind
            und += 2
            gen += tokens
            visible += 0 if loss else length  # noised latents are invisible to later splits
            vae.append(height * width)
    return Work(und, gen, ce, pairs, tuple(vit), tuple(vae))


def vit_flops_per_patch(vit: ViTConfig, llm_hidden: int, trains: bool = True, connector_trains: bool = True) -> int:
    """FLOP of one patch in one step: patch embedding, linear maps of all layers, connector.

    Only layers are checkpointed, and without a gradient they run once. Pixels need no gradient.
    """
    embedding = vit.num_channels * vit.patch_size**2 * vit.hidden_size
    return 2 * (
        vit_matmul_parameters(vit) * (TRAINED_PASSES if trains else 1)
        + embedding * (1 + trains)
        + vit.hidden_size * llm_hidden * (1 + connector_trains + trains)
        + llm_hidden**2 * (1 + connector_trains + (connector_trains or trains))
    )


@dataclass(frozen=True)
class CostModel:
    """Prices of the units of `Work` in FLOP of one training step; build it with `of`.

    At 7B a token costs 52 GFLOP and a visible pair 1.8 MFLOP: attention over 8,192 visible keys is about a quarter of
    a token's linear work.
    """

    und_token: int
    gen_token: int
    ce_token: int
    attention_pair: int
    vit_patch: int
    vit_pair: int
    vae_cell: int
    vae_pair: int
    vae_cell_pixels: int

    @classmethod
    def of(
        cls, config: BagelConfig | None = None, vae: VAEConfig | None = None, freezing: Freezing = Freezing()
    ) -> CostModel:
        """The prices of a network. Default: BAGEL-7B-MoT with the FLUX autoencoder, fully trained."""
        config, vae = config or BagelConfig(), vae or VAEConfig()
        llm, vit = config.llm, config.vit
        trained = trainable_parts(config, freezing)  # adapters are too small to count

        def passes(part: str) -> int:
            return TRAINED_PASSES if part in trained else FROZEN_PASSES

        # freeze_und also stops the gradient of the input.
        und_passes = 2 if config.freeze_und else passes("und_expert")
        vit_half_passes = ATTENTION_HALF_PASSES if "vit" in trained else 2
        token = 2 * llm_matmul_parameters(llm)
        vae_width = vae.channels * vae.channel_multipliers[-1]
        return cls(
            und_token=token * und_passes,
            gen_token=token * passes("gen_expert"),
            ce_token=2 * head_parameters(llm) * passes("lm_head"),
            attention_pair=llm_pair_flops(llm) * ATTENTION_HALF_PASSES // 2,
            vit_patch=vit_flops_per_patch(vit, llm.hidden_size, "vit" in trained, "connector" in trained),
            vit_pair=vit_pair_flops(vit) * vit_half_passes // 2,
            vae_cell=vae_flops_per_cell(vae),
            vae_pair=4 * vae_width,
            vae_cell_pixels=vae.downsample**2,
        )

    def price(self, work: Work) -> Cost:
        """MFLOP of the sample in the language model and in vision."""
        llm = (
            work.und_tokens * self.und_token
            + work.gen_tokens * self.gen_token
            + work.ce_tokens * self.ce_token
            + work.attention_pairs * self.attention_pair
        )
        vision = sum(n * self.vit_patch + n * n * self.vit_pair for n in work.vit_patches)
        for pixels in work.vae_pixels:
            cells = pixels // self.vae_cell_pixels
            vision += cells * self.vae_cell + cells * cells * self.vae_pair
        return Cost(llm // UNIT, vision // UNIT)
