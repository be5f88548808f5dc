"""The prices, against counts made another way: dense masks, and the operations that torch counts in a real step."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.plan import cost
from bagel_ds.data.plan.cost import (
    UNIT,
    CostModel,
    vit_flops_per_patch,
    work_of,
)
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, Entry, SamplePlan
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from bagel_ds.model.losses import head
from bagel_ds.model.recompute import recompute
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from bagel_ds.model.shape.flops import llm_matmul_parameters, vae_flops_per_cell
from bagel_ds.model.shape.parts import Freezing, part_of, trainable_parts
from bagel_ds.model.vae import AutoEncoder, encode_images
from bagel_ds.model_folder.tokenizer import SpecialTokens
from bench.cost_packs import SIZES, make_packs


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


def test_work_is_what_the_batch_of_the_same_samples_holds() -> None:
    """Over packs of every composition, those that `bench/cost_model.py` times."""
    size = SIZES["small"]
    for theme, plans, batch in make_packs(12, size, seed=0):
        works = [work_of(plan) for plan in plans]
        mask = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes).dense_mask()
        assert sum(work.tokens for work in works) == batch.sequence_length == size.tokens, theme
        assert sum(work.gen_tokens for work in works) == len(batch.vae_indexes), theme
        assert sum(work.ce_tokens for work in works) == len(batch.ce_loss_indexes), theme
        assert sum(work.attention_pairs for work in works) == int(mask.sum()), theme
        assert sum((work.vit_patches for work in works), ()) == batch.vit_seqlens, theme
        assert sum((work.vae_pixels for work in works), ()) == tuple(x[0].numel() for x in batch.images), theme


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
    weights = 2 * llm_matmul_parameters(LLMConfig()) / 2
    assert weights == pytest.approx(6_525_628_928, rel=1e-4)
    forward = vit_flops_per_patch(ViTConfig(), 3584, trains=False, connector_trains=False)
    assert forward / 2 == pytest.approx(402_552_736 - 4900 * 1152 + 3584 * 4737, rel=1e-2)


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
    assert trained.llm == pytest.approx(tokens * 2 * llm_matmul_parameters(LLMConfig()) * 4 / UNIT, rel=0.1)


LLM, VIT_SHAPE, VAE_SHAPE = LLMConfig(256, 1024, 2, 2, 1, 2048), ViTConfig(128, 512, 3, 4), VAEConfig(channels=32)
PACK = (
    (
        Entry(VAE, 0, 16, height=64, width=64),
        Entry(VIT, 0, 20, height=56, width=70),
        Entry(VAE, 0, 24, loss=True, height=64, width=96),
    ),
    (Entry(VIT, 0, 10, height=28, width=70), Entry(TEXT, 0, 20), Entry(TEXT, 0, 40, loss=True)),
)


def pack_of(samples: tuple[tuple[Entry, ...], ...]) -> PackedBatch:
    """The samples with empty content."""
    loaded = [
        [
            Loaded(
                entry.kind,
                ids=[7] * entry.tokens if entry.kind == TEXT else (),
                image=None if entry.kind == TEXT else torch.zeros(3, entry.height, entry.width, dtype=torch.uint8),
                loss=entry.loss,
            )
            for entry in sample
        ]
        for sample in samples
    ]
    return layout(loaded, SpecialTokens(0, 1, 2, 3, 4), LayoutOptions(max_latent_size=8))


def network(config: BagelConfig, freezing: Freezing) -> Bagel:
    bagel, trained = Bagel(config, recompute), trainable_parts(config, freezing)
    for name, weight in bagel.named_parameters():
        torch.nn.init.normal_(weight, std=0.02).requires_grad_(part_of(name) in trained)
    return bagel


class Counted(FlopCounterMode):
    """FLOP by kind: linear maps are products of matrices, attention of batches of matrices."""

    def __init__(self) -> None:
        super().__init__(display=False)

    @property
    def linear(self) -> int:
        counts = self.get_flop_counts()["Global"]
        return counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)

    @property
    def attention(self) -> int:
        return self.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


def priced(model: CostModel, samples: tuple[tuple[Entry, ...], ...]) -> tuple[int, int]:
    costs = [model.price(work_of(SamplePlan(0, 0, 0, sample))) for sample in samples]
    return sum(each.llm for each in costs), sum(each.vision for each in costs)


SWITCHES = {
    "all_trained": (False, Freezing()),
    "freeze_und": (True, Freezing()),
    "freeze_vit": (False, Freezing(freeze_vit=True)),
    "freeze_llm": (False, Freezing(freeze_llm=True)),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_prices_are_the_operations_of_a_real_step_under_every_switch(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, but for the small layers around the language model, which are added here; with ZeRO-3's linear layers.

    torch's plain attention, the one it can count, keeps the scores: its backward is 2 forwards, not 2.5. A price is
    that of a head without room for logits, which computes them twice.
    """
    monkeypatch.setattr(head, "KEPT_LOGITS", 0)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    monkeypatch.setattr(cost, "UNIT", 1)
    freeze_und, freezing = SWITCHES[switch]
    config = BagelConfig(llm=LLM, vit=VIT_SHAPE, max_latent_size=8, freeze_und=freeze_und)
    bagel, batch, model = network(config, freezing), pack_of(PACK), CostModel.of(config, VAE_SHAPE, freezing)

    with sdpa_kernel(SDPBackend.MATH), Counted() as whole:
        output = bagel(batch, torch.zeros_like(batch.noise))
        (output.ce.sum() + output.mse.sum()).backward()
    with sdpa_kernel(SDPBackend.MATH), Counted() as vision:
        patches = normalize_pixels(batch.vit_patches)
        within_images = bagel.attention(AttentionLayout.images(batch.vit_seqlens))
        features = bagel.connector(bagel.vit_model(patches, batch.vit_position_ids, within_images, recompute))
        if features.requires_grad:
            features.sum().backward()

    free = {"attention_pair": 0, "vit_pair": 0, "vae_cell": 0, "vae_pair": 0}
    llm_linear, vision_linear = priced(dataclasses.replace(model, **free), PACK)
    assert vision.linear == vision_linear
    assert whole.linear - vision.linear == llm_linear + small_layers(config, batch)
    attention = dataclasses.replace(model, und_token=0, gen_token=0, ce_token=0, vit_patch=0, vae_cell=0, vae_pair=0)
    llm_attention, vision_attention = priced(attention, PACK)
    runs_backward = "vit" in trainable_parts(config, freezing)
    assert vision.attention * (9 / 8 if runs_backward else 1) == vision_attention
    # A text that sees an image is computed as a whole rectangle, of which the upper half is masked.
    masked = model.attention_pair * 64 * 63 // 2
    assert (whole.attention - vision.attention) * 9 / 8 == llm_attention + masked


def small_layers(config: BagelConfig, batch: PackedBatch) -> int:
    """FLOP of what is not priced: timestep embedding and the projections of latents; inputs need no gradient."""
    width, features = config.llm.hidden_size, config.latent_features
    latents, noised = len(batch.vae_indexes), len(batch.mse_loss_indexes)
    return 2 * (latents * (2 * 256 * width + 3 * width**2 + 2 * features * width) + noised * 3 * features * width)


def test_the_price_of_the_autoencoder_is_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "UNIT", 1)
    vae, batch = AutoEncoder(VAE_SHAPE), pack_of(PACK)
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        encode_images(vae, batch.images, batch.latent_shapes, batch.posterior_eps, 2)
    only_images = ((Entry(VAE, 0, 16, height=64, width=64), Entry(VAE, 0, 24, loss=True, height=64, width=96)),)
    assert counted.get_total_flops() == priced(CostModel.of(BagelConfig(), VAE_SHAPE), only_images)[1]
