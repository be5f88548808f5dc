"""The layout of a pack: what single entries become, and what dropping and missing modalities leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.data.batches.layout import Loaded, layout, length_weight
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import SpecialTokens

SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4, end_of_text=5)
CLEAN = float("-inf")


def _text(*ids: int, loss: bool = False, label: int = -1, dropped: bool = False) -> Loaded:
    return Loaded(TEXT, ids, loss=loss, special_label=label, dropped=dropped)


def _vit(rows: int, columns: int, dropped: bool = False) -> Loaded:
    return Loaded(VIT, image=torch.zeros(3, 14 * rows, 14 * columns, dtype=torch.uint8), dropped=dropped)


def _vae(rows: int, columns: int, loss: bool = False, dropped: bool = False, **frame: bool | int) -> Loaded:
    image = torch.zeros(3, 16 * rows, 16 * columns, dtype=torch.uint8)
    timestep = 0.5 if loss else CLEAN
    return Loaded(VAE, image=image, loss=loss, timestep=timestep, dropped=dropped, **frame)  # type: ignore[arg-type]


def _layout(*samples: list[Loaded]) -> PackedBatch:
    return layout(samples, SPECIAL, LayoutOptions(), [f"sample {i}" for i in range(len(samples))])


def test_a_text_with_loss_predicts_its_ids_and_its_end() -> None:
    batch = _layout([_text(10, 11, loss=True, label=5)])
    assert batch.text_ids.tolist() == [1, 10, 11, 2]
    assert batch.ce_loss_indexes.tolist() == [0, 1, 2, 3]
    assert batch.label_ids.tolist() == [10, 11, 2, 5]
    assert batch.ce_loss_weights.tolist() == pytest.approx([3**-0.5] * 3 + [1.0])
    assert (batch.split_lens, batch.attn_modes) == ((4,), ("causal",))


def test_an_empty_text_still_has_its_markers() -> None:
    batch = _layout([_text(loss=True)])
    assert (batch.text_ids.tolist(), batch.label_ids.tolist()) == ([1, 2], [2])
    assert length_weight(0) == 0


def test_a_sample_behind_a_context_begins_at_its_position() -> None:
    samples = [[_text(10), _vae(1, 1)], [_text(11)]]
    batch = layout(samples, SPECIAL, first_positions=[7, 20])
    assert batch.position_ids.tolist() == [7, 8, 9, *[10] * 3, 20, 21, 22]
    assert layout(samples, SPECIAL).position_ids.tolist() == [0, 1, 2, *[3] * 3, 0, 1, 2]
    with pytest.raises(ValueError, match="shorter"):
        layout(samples, SPECIAL, first_positions=[7])


def test_positions_of_images_and_of_what_follows() -> None:
    batch = _layout([_text(10), _vae(1, 2, loss=True), _vae(1, 2), _vit(1, 1), _text(11)])
    # the noised image leaves its position to the clean copy; each other image takes one
    assert batch.position_ids.tolist() == [0, 1, 2, *[3] * 4, *[3] * 4, *[4] * 3, 5, 6, 7]
    assert batch.attn_modes == ("causal", "noise", "full", "full", "causal")
    assert batch.vae_indexes.tolist() == [4, 5, 8, 9]
    assert batch.mse_loss_indexes.tolist() == [4, 5]
    assert batch.timesteps.tolist() == [0.5, 0.5, CLEAN, CLEAN]


def test_a_dropped_image_keeps_its_position_and_a_dropped_text_does_not() -> None:
    batch = _layout([_text(10, dropped=True), _vit(1, 1, dropped=True), _vae(1, 1, dropped=True), _text(11)])
    assert batch.position_ids.tolist() == [2, 3, 4]
    assert (batch.sample_lens, batch.split_lens, batch.vit_seqlens, batch.images) == ((3,), (3,), (), ())


def test_a_sample_with_everything_dropped_leaves_no_trace() -> None:
    batch = _layout([_text(10)], [_text(11, dropped=True)], [_text(12)])
    assert batch.sample_lens == (3, 3)
    assert batch.samples == ("sample 0", "sample 2")


def test_no_samples_make_a_batch_of_zero_tokens() -> None:
    batch = _layout()
    assert batch.sequence_length == 0
    assert batch.vit_patches.shape == (0, 588) and batch.vit_patches.dtype == torch.uint8
    assert batch.noise.shape == batch.posterior_eps.shape == (0, 64)
    assert batch.to("cpu").sequence_length == 0


def test_frames_of_a_video_share_split_and_timestep() -> None:
    frames = [
        _vae(1, 1, loss=True, split_end=False, frame_delta=4),
        _vae(1, 1, loss=True, frame_delta=4),
    ]
    batch = _layout([_text(10), *frames, _text(11)])
    assert (batch.split_lens, batch.attn_modes) == ((3, 6, 3), ("causal", "full", "causal"))
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 3, 7, 7, 7, 11, 12, 13]


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_dropped_frame_leaves_the_rest_of_its_split(dropped: int) -> None:
    frames = [_vae(1, 1, dropped=dropped == 0, split_end=False), _vae(1, 1, dropped=dropped == 1)]
    batch = _layout([*frames, _text(11)])
    assert (batch.split_lens, batch.attn_modes) == ((3, 3), ("full", "causal"))


ENTRIES = st.one_of(
    st.builds(
        lambda n, loss, drop: _text(*range(10, 10 + n), loss=loss, dropped=drop),
        st.integers(0, 5),
        *[st.booleans()] * 2,
    ),
    st.builds(_vit, st.integers(1, 3), st.integers(1, 3), st.booleans()),
    st.builds(_vae, st.integers(1, 3), st.integers(1, 3), st.just(True)),
    st.builds(_vae, st.integers(1, 3), st.integers(1, 3), st.just(False), st.booleans()),
)


@given(samples=st.lists(st.lists(ENTRIES, max_size=6), max_size=4))
def test_every_pack_is_consistent(samples: list[list[Loaded]]) -> None:
    batch = _layout(*samples)
    length = batch.sequence_length
    assert sum(batch.split_lens) == length == len(batch.position_ids)
    assert len(batch.split_lens) == len(batch.attn_modes)
    owners = torch.cat([batch.text_indexes, batch.vit_indexes, batch.vae_indexes]).sort().values
    assert owners.tolist() == list(range(length))
    assert len(batch.vit_patches) == sum(batch.vit_seqlens) == len(batch.vit_indexes) == len(batch.vit_position_ids)
    grids = [rows * columns for rows, columns in batch.latent_shapes]
    assert sum(grids) == len(batch.vae_indexes) == len(batch.timesteps) == len(batch.noise)
    assert batch.vae_indexes[batch.timesteps > CLEAN].tolist() == batch.mse_loss_indexes.tolist()
    assert len(batch.ce_loss_indexes) == len(batch.label_ids) == len(batch.ce_loss_weights)
    assert len(batch.samples) == len(batch.sample_lens)


@given(samples=st.lists(st.lists(ENTRIES, max_size=6), min_size=1, max_size=4))
def test_a_pack_is_its_samples_end_to_end(samples: list[list[Loaded]]) -> None:
    together, alone = _layout(*samples), [_layout(sample) for sample in samples]
    assert together.split_lens == sum((batch.split_lens for batch in alone), ())
    for name in ("position_ids", "text_ids", "vit_patches", "vit_position_ids", "timesteps", "label_ids"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(batch, name) for batch in alone])), name
    for name in ("text_indexes", "vit_indexes", "vae_indexes", "mse_loss_indexes", "ce_loss_indexes"):
        offset, shifted = 0, []
        for batch in alone:
            shifted.append(getattr(batch, name) + offset)
            offset += batch.sequence_length
        assert torch.equal(getattr(together, name), torch.cat(shifted)), name
