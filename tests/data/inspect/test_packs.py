"""inspect: what is shown is what the batch holds, the mask is the layout's, the plan's numbers are audited."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_ds.data.batches.loader import PackingOptions, PlannedData
from bagel_ds.data.inspect import plan_numbers as plan_numbers_module
from bagel_ds.data.inspect import sheet as sheet_module
from bagel_ds.data.inspect.packs import ShownPack, first_packs, pack_text
from bagel_ds.data.inspect.plan_numbers import plan_numbers, plan_text
from bagel_ds.data.inspect.sheet import contact_sheets, scaled_mask
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import byte_tokenizer, mixed_groups, streams_of

DROPOUT = {"text_cond_dropout_prob": 0.2, "vit_cond_dropout_prob": 0.4, "vae_cond_dropout_prob": 0.4}
LIMIT = 700


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> PlannedData:
    folder = tmp_path_factory.mktemp("data")
    streams = streams_of(folder, mixed_groups(folder), tokenizer, max_num_tokens_per_sample=LIMIT, **DROPOUT)
    return PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(LIMIT, LIMIT // 2), noise_seed=0)


@pytest.fixture(scope="module")
def packs(data: PlannedData) -> list[ShownPack]:
    return list(first_packs(data, 6))


def test_pieces_cover_the_pack_and_carry_its_losses(packs: list[ShownPack]) -> None:
    for pack in packs:
        pieces = [piece for sample in pack.samples for piece in sample.pieces]
        kept = [piece for piece in pieces if not piece.is_dropped]
        assert [(piece.length, piece.mode) for piece in kept] == list(
            zip(pack.batch.split_lens, pack.batch.attn_modes, strict=True)
        )
        assert [piece.start for piece in kept] == [0, *np.cumsum(pack.batch.split_lens)[:-1]]
        assert sum(piece.labels for piece in kept) == len(pack.batch.ce_loss_indexes)
        assert sum(piece.targets for piece in kept) == len(pack.batch.mse_loss_indexes)
    kinds = {(piece.kind, piece.is_dropped) for pack in packs for s in pack.samples for piece in s.pieces}
    assert kinds == {(kind, dropped) for kind in (TEXT, VIT, VAE) for dropped in (False, True)}


def test_images_are_the_pixels_of_the_batch(packs: list[ShownPack]) -> None:
    for pack in packs:
        kept = [p for sample in pack.samples for p in sample.pieces if not p.is_dropped]
        latents = [piece.image for piece in kept if piece.kind == VAE]
        assert len(latents) == len(pack.batch.images)
        for shown, image in zip(latents, pack.batch.images, strict=True):
            assert shown is not None and torch.equal(shown, image.permute(1, 2, 0))
        seen = [piece.image for piece in kept if piece.kind == VIT]
        assert sum(image.numel() for image in seen if image is not None) == pack.batch.vit_patches.numel()
        patches = iter(pack.batch.vit_patches)
        for image in seen:
            assert image is not None
            first = next(patches)
            assert torch.equal(image[:14, :14].flatten(), first), "the top left patch, rows first"
            for _ in range(image.numel() // first.numel() - 1):
                next(patches)


def test_the_text_tells_pieces_roles_and_losses(data: PlannedData, packs: list[ShownPack]) -> None:
    for pack in packs:
        text = "\n".join(pack_text(pack))
        assert f"pack {pack.number}: {pack.batch.sequence_length:,} of {LIMIT:,} tokens" in text
        for sample in pack.samples:
            assert sample.name in text
            for piece in sample.pieces:
                assert piece.role in text and piece.mode in text
                if piece.kind == TEXT and not piece.is_dropped:
                    assert piece.text.startswith("<|im_start|>") and piece.text.endswith("<|im_end|>")
    everything = "\n".join(line for pack in packs for line in pack_text(pack))
    assert "its end predicts <|vision_start|>" in everything and "its end predicts <|endoftext|>" in everything


def test_packs_go_on_from_a_state(data: PlannedData, packs: list[ShownPack]) -> None:
    state = next(islice(data.planner.steps(1), 3, None)).state
    later = list(first_packs(data, 2, state))
    assert [pack.number for pack in later] == [4, 5]
    assert [pack_text(pack) for pack in later] == [pack_text(pack) for pack in packs[4:6]]


def test_a_sample_that_cannot_be_read_is_shown_with_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    streams = streams_of(tmp_path, mixed_groups(tmp_path), tokenizer)
    data = PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(2000, 1000), noise_seed=0)
    (tmp_path / "vlm" / "images" / "x.png").unlink()
    (pack,) = first_packs(data, 1)
    broken = [sample for sample in pack.samples if sample.reason]
    assert broken and len(broken) == len(pack.batch.skipped)
    assert all("no such file" in sample.reason and not sample.pieces for sample in broken)
    assert f"skipped: {broken[0].reason}" in "\n".join(pack_text(pack))
    assert contact_sheets(pack)


@settings(deadline=None, max_examples=30)
@given(
    samples=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.sampled_from([CAUSAL, FULL, NOISE])), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    side=st.integers(1, 60),
)
def test_the_scaled_mask_is_the_dense_one_at_evenly_spaced_tokens(
    samples: list[list[tuple[int, str]]], side: int
) -> None:
    splits = [split for sample in samples for split in sample]
    layout = AttentionLayout.from_splits(
        [sum(length for length, _ in sample) for sample in samples],
        [length for length, _ in splits],
        [mode for _, mode in splits],
    )
    dense = layout.dense_mask().numpy()
    tokens = (np.arange(side) * 2 + 1) * len(dense) // (2 * side)
    assert np.array_equal(scaled_mask(layout, side), dense[tokens][:, tokens])
    assert np.array_equal(scaled_mask(layout, len(dense)), dense)


def test_a_sheet_shows_every_pieces_color(packs: list[ShownPack]) -> None:
    for pack in packs[:2]:
        (sheet,) = contact_sheets(pack)
        colors = {color for _, color in sheet.getcolors(2**24)}
        looks = sheet_module._LOOKS
        assert {looks[piece.role].color for sample in pack.samples for piece in sample.pieces} <= colors


def test_many_samples_go_on_several_pages(packs: list[ShownPack], monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = contact_sheets(packs[0])
    monkeypatch.setattr(sheet_module, "_PAGE", 1)
    pages = contact_sheets(packs[0])
    assert len(pages) == len(packs[0].samples) and all(page.width == whole.width for page in pages)


@pytest.mark.parametrize(("world_size", "steps"), [(1, 5), (3, 40)])
def test_numbers_are_those_of_the_planned_steps(data: PlannedData, world_size: int, steps: int) -> None:
    numbers = plan_numbers(data, world_size, steps)
    planned = list(islice(data.planner.steps(world_size), steps))
    packs = [pack for step in planned for pack in step.packs]
    assert numbers.packs == len(packs) == world_size * steps
    assert numbers.samples == sum(len(pack.samples) for pack in packs) == sum(numbers.samples_by_group.values())
    assert numbers.packing_efficiency == pytest.approx(sum(pack.length for pack in packs) / (len(packs) * LIMIT))
    assert numbers.imbalance_llm == pytest.approx(sum(step.imbalance_llm for step in planned) / steps)
    assert numbers.imbalance_vision == pytest.approx(sum(step.imbalance_vision for step in planned) / steps)
    assert numbers.max_wait == max(pack.waited for pack in packs)
    assert numbers.dropped == 0 and numbers.epochs == planned[-1].epochs
    assert any(f"{numbers.packing_efficiency:.2%}" in line for line in plan_text(numbers))


def test_the_audit_finds_a_lost_sample(data: PlannedData) -> None:
    steps = list(islice(data.planner.steps(2), 10))
    packs = [pack for step in steps for pack in step.packs]
    assert plan_numbers_module._audit(data.planner, packs, steps[-1].state)[0] == 0
    lost = packs[3]._replace(samples=packs[3].samples[1:], rows=packs[3].rows[1:])
    assert plan_numbers_module._audit(data.planner, [*packs[:3], lost, *packs[4:]], steps[-1].state)[0] == 1
