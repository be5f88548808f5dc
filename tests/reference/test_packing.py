"""Samples and packs against the recordings of packing/, exactly.

Outside, because REFERENCE 0 replaces what they record: order, sharding, resume and packer_iter; the sample that
upstream cannot pack (vlm line "4"); pixels of LA images in the upstream sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded, layout, length_weight, position_grid
from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE
from bagel_ds.model.batch import PackedBatch, normalize_pixels
from tests.packing_sets import (
    EXPECTED,
    find,
    layout_options,
    recorded_images,
    stream,
    tokenizer,
    unpackable,
)
from tests.recordings import UNSET, cases, read_json, reference_folder, tensors


def _recorded_samples() -> list[Any]:
    if reference_folder() is None:
        return [pytest.param("unset", 0, marks=pytest.mark.skip(reason=UNSET))]
    names = [stem.rsplit("samples_", 1)[1] for stem in cases(f"{EXPECTED}/samples_*.json")]
    return [(name, i) for name in names for i in range(len(read_json(f"{EXPECTED}/samples_{name}")["samples"]))]


def _packs_of_rows() -> list[Any]:
    stems = cases(f"{EXPECTED}/pack_*.json")
    return stems if reference_folder() is None else [stem for stem in stems if "samples" in read_json(stem)]


@pytest.mark.parametrize(("name", "number"), _recorded_samples())
def test_our_sources_make_every_recorded_sample(name: str, number: int) -> None:
    sample = read_json(f"{EXPECTED}/samples_{name}")["samples"][number]
    if unpackable(sample):
        pytest.skip('REFERENCE 0: vlm line "4", image tags are counted over the whole conversation')
    found = find(name, number)
    assert found is not None, f"no row of {name} gives the recorded sample"
    plan = stream(name).plan_sample(found.row, found.epoch)
    assert plan is not None
    referenced = sum(entry.tokens for entry in plan.entries)
    unused = len(sample["image_shapes"]) - sum(entry.kind != TEXT for entry in plan.entries)
    # the original also counts the patches of an image that no turn refers to
    assert referenced == sample["num_tokens"] or (unused and referenced < sample["num_tokens"])


@pytest.mark.parametrize("stem", cases(f"{EXPECTED}/pack_*.json"))
def test_layout_of_the_recorded_sequence_plans(stem: str) -> None:
    info = read_json(stem)
    draws = np.random.RandomState(info["numpy_seed"])
    if "samples" in info:
        loaded = [_loaded(*_recorded(name, number), info["dropout"], draws) for name, number in info["samples"]]
    else:
        packed = tensors(stem)
        images = [packed[f"sample.image.{i}"] for i in range(sum(e["type"] != TEXT for e in info["sequence_plan"]))]
        loaded = [_loaded(info, images, {"text": 0, "vit": 0, "vae": 0}, draws)]
    batch = layout(loaded, tokenizer().special, layout_options())
    _compare(batch, info, tensors(stem))
    recorded = tensors(stem).get("packed_timesteps", torch.empty(0))
    assert torch.equal(batch.timesteps, recorded)


@pytest.mark.parametrize("stem", _packs_of_rows())
def test_packs_made_from_the_rows_themselves(stem: str) -> None:
    info = read_json(stem)
    names = list(dict.fromkeys(name for name, _ in info["samples"]))
    streams = [stream(name, **info["dropout"]) for name in names]
    plans = []
    la = False
    for name, number in info["samples"]:
        found = find(name, number)
        assert found is not None
        plan = streams[names.index(name)].plan_sample(found.row, found.epoch)
        assert plan is not None
        plans.append(plan._replace(group=names.index(name)))
        la |= found.la
    batch = materialize(plans, streams, tokenizer(), layout_options(), noise_seed=0)
    assert batch.skipped == ()
    assert len(batch.samples) == len(plans)
    assert batch.sample_lens == tuple(plan.length for plan in plans)
    _compare(batch, info, tensors(stem), pixels=not la)
    recorded = tensors(stem).get("packed_timesteps", torch.empty(0))
    assert torch.equal(batch.timesteps == float("-inf"), recorded == float("-inf"))


@pytest.mark.parametrize(
    "number", range(len(read_json(f"{EXPECTED}/position_ids")["cases"])) if reference_folder() else [0]
)
@pytest.mark.parametrize("mode", ["extrapolate", "interpolate"])
def test_position_ids(number: int, mode: str) -> None:
    case = read_json(f"{EXPECTED}/position_ids")["cases"][number]
    grid = position_grid(case["h"], case["w"], case["patch"], case["max_per_side"], mode == "interpolate")
    assert grid.tolist() == case[mode]
    image = torch.zeros(3, case["h"], case["w"], dtype=torch.uint8)
    sizes = {"vit_patch_size": case["patch"], "vit_max_num_patch_per_side": case["max_per_side"]}
    options = LayoutOptions(**sizes, interpolate_pos=mode == "interpolate")
    batch = layout([[Loaded("vit_image", image=image)]], tokenizer().special, options)
    assert batch.vit_position_ids.tolist() == case[mode]


def test_length_weights() -> None:
    recorded = read_json(f"{EXPECTED}/len2weight")
    assert recorded["default_reduction"] == "square"
    for length, weight in recorded["values"]:
        assert length_weight(length) == pytest.approx(weight, rel=1e-15)


def _recorded(name: str, number: int) -> tuple[dict[str, Any], list[Tensor]]:
    sample = read_json(f"{EXPECTED}/samples_{name}")["samples"][number]
    images = recorded_images(name)
    return sample, [images[f"sample.{number}.image.{i}"] for i in range(len(sample["image_shapes"]))]


def _loaded(
    sample: dict[str, Any], images: list[Tensor], dropout: dict[str, float], draws: np.random.RandomState
) -> list[Loaded]:
    """A recorded sequence plan as input of `layout`; timesteps are drawn as the original does, one per noised split."""
    assert all(chance in (0, 1) for chance in dropout.values()), "a recording with a random dropout needs its draws"
    texts, pictures = iter(sample["text_ids_list"]), iter(images)
    entries = []
    for plan in sample["sequence_plan"]:
        kind, loss = plan["type"], bool(plan["loss"])
        frame = {key: plan[key] for key in ("split_end", "frame_delta") if key in plan}
        timestep = float(draws.randn()) if kind == VAE and loss and plan.get("split_start", True) else float("-inf")
        entries.append(
            Loaded(
                kind,
                ids=next(texts) if kind == TEXT else (),
                image=None if kind == TEXT else next(pictures),
                loss=loss,
                dropped=bool(plan["enable_cfg"]) and dropout[kind.split("_")[0]] == 1,
                special_label=plan["special_token_label"] if plan["special_token_loss"] else -1,
                timestep=timestep,
                **frame,
            )
        )
    return entries


def _compare(batch: PackedBatch, info: dict[str, Any], recorded: dict[str, Tensor], pixels: bool = True) -> None:
    """Everything but timesteps and noise. Recordings leave out what is absent; ours is empty then."""
    assert batch.sequence_length == info["sequence_length"]
    assert list(batch.sample_lens) == info["sample_lens"]
    assert list(batch.split_lens) == info["split_lens"]
    assert list(batch.attn_modes) == info["attn_modes"]
    assert [list(shape) for shape in batch.latent_shapes] == info.get("patchified_vae_latent_shapes", [])
    ours = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": batch.text_indexes,
        "packed_position_ids": batch.position_ids,
        "packed_vit_position_ids": batch.vit_position_ids,
        "packed_vit_token_indexes": batch.vit_indexes,
        "vit_token_seqlens": torch.tensor(batch.vit_seqlens, dtype=torch.int64),
        "packed_latent_position_ids": batch.latent_position_ids,
        "packed_vae_token_indexes": batch.vae_indexes,
        "mse_loss_indexes": batch.mse_loss_indexes,
        "packed_label_ids": batch.label_ids,
        "ce_loss_indexes": batch.ce_loss_indexes,
        "ce_loss_weights": batch.ce_loss_weights,
    }
    for key, tensor in ours.items():
        expected = recorded.get(key, torch.empty(0, dtype=tensor.dtype))
        assert (key not in recorded) == (key in info["absent"]), key
        assert tensor.dtype == expected.dtype, key
        assert torch.equal(tensor, expected), key
    if pixels:
        patches = normalize_pixels(batch.vit_patches)
        assert torch.equal(patches, recorded.get("packed_vit_tokens", patches[:0]))
        padded = recorded.get("padded_images", torch.empty(0))
        assert len(batch.images) == len(padded)
        for image, canvas in zip(batch.images, padded, strict=True):
            height, width = image.shape[1:]
            assert torch.equal(normalize_pixels(image), canvas[:, :height, :width])
            assert not canvas[:, height:].any() and not canvas[:, :, width:].any()
