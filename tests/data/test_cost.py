"""The prices, against counts made another way: dense masks for attention, module shapes for linear work."""

from __future__ import annotations

import random

import pytest
import torch

from bagel_ds.data.cost import UNIT, CostModel, llm_flops_per_token, vae_flops_per_cell, vit_flops_per_patch, work_of
from bagel_ds.data.sample import TEXT, VAE, VIT, Entry, SamplePlan
from bagel_ds.model.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig


def random_plan(seed: int) -> SamplePlan:
    draw = random.Random(seed)
    kinds = draw.choices([TEXT, VIT, VAE], k=draw.randint(1, 7))
    return SamplePlan(
        0,
        0,
        seed,
        tuple(Entry(kind, 0, draw.randint(1, 20), draw.random() < 0.5, draw.random() < 0.2) for kind in kinds),
    )


def visible_pairs(plan: SamplePlan) -> int:
    """By a dense mask, as REFERENCE 7 states it: causal, or within one image; noise is seen by itself only."""
    kept = [entry for entry in plan.entries if not entry.dropped]
    split = torch.tensor([i for i, entry in enumerate(kept) for _ in range(entry.length)])
    is_image = torch.tensor([e.kind != TEXT for e in kept])[split]
    is_noise = torch.tensor([e.kind == VAE and e.loss for e in kept])[split]
    query, key = torch.arange(len(split))[:, None], torch.arange(len(split))[None]
    same = split[:, None] == split[None]
    sees = (key <= query) | (same & is_image[:, None])
    return int((sees & (same | ~is_noise[None])).sum())


@pytest.mark.parametrize("seed", range(30))
def test_attention_pairs_equal_the_dense_mask(seed: int) -> None:
    plan = random_plan(seed)
    if plan.length:
        assert work_of(plan).attention_pairs == visible_pairs(plan)
        assert work_of(plan).tokens == plan.length


def test_work_counts_tokens_by_expert_and_labels() -> None:
    entries = (
        Entry(VAE, 0, 64, height=128, width=128),
        Entry(VIT, 0, 81, height=126, width=126),
        Entry(TEXT, 0, 10),
        Entry(TEXT, 1, 7, loss=True, special_label=5),
        Entry(VAE, 1, 32, loss=True, height=128, width=64),
        Entry(TEXT, 2, 50, loss=True, dropped=True),
    )
    work = work_of(SamplePlan(0, 0, 0, entries))
    assert work.gen_tokens == 96
    assert work.und_tokens == 2 + 83 + 12 + 9 + 2
    assert work.ce_tokens == 8 + 1
    assert work.vit_patches == (81,)
    assert work.vae_pixels == (128 * 128, 128 * 64)


def test_linear_work_is_twice_the_weights_a_token_meets() -> None:
    """The 7B counts are the recorded ones of the real model: 6,525,628,928 in an expert (norms and biases included)."""
    weights = llm_flops_per_token(LLMConfig()) / 2
    assert weights == pytest.approx(6_525_628_928, rel=1e-4)
    assert vit_flops_per_patch(ViTConfig(), 3584) / 2 == pytest.approx(
        402_552_736 - 4900 * 1152 + 3584 * 4737, rel=1e-2
    )


def test_vae_work_equals_a_convolution_by_convolution_count() -> None:
    """(inputs, outputs, kernel, side at the input's resolution 64) of the FLUX encoder, from its layers."""
    layers = [(3, 128, 9, 64)] + [(128, 128, 9, 64)] * 4 + [(128, 128, 9, 32)]
    layers += [(128, 256, 9, 32), (256, 256, 9, 32), (128, 256, 1, 32), (256, 256, 9, 32), (256, 256, 9, 32)]
    layers += [(256, 256, 9, 16), (256, 512, 9, 16), (512, 512, 9, 16), (256, 512, 1, 16)] + [(512, 512, 9, 16)] * 2
    layers += [(512, 512, 9, 8)] + [(512, 512, 9, 8)] * 4
    layers += [(512, 512, 9, 8)] * 4 + [(512, 512, 1, 8)] * 4 + [(512, 32, 9, 8)]
    assert sum(2 * i * o * k * side * side for i, o, k, side in layers) == 64 * vae_flops_per_cell(VAEConfig())


def test_a_pack_costs_the_sum_of_its_samples_and_frozen_understanding_costs_less() -> None:
    entries = (Entry(VIT, 0, 1024, height=448, width=448), Entry(TEXT, 0, 100, loss=True))
    plan = SamplePlan(0, 0, 0, entries)
    work = work_of(plan)
    trained, frozen = CostModel.of().price(work), CostModel.of(BagelConfig(freeze_und=True)).price(work)
    assert all(isinstance(number, int) for number in trained)
    assert frozen.llm < trained.llm
    assert frozen.vision < trained.vision
    tokens = 1026 + 102
    assert trained.llm == pytest.approx(tokens * llm_flops_per_token(LLMConfig()) * 4 / UNIT, rel=0.1)
