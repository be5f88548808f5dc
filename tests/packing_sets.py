"""The recorded rows as our streams, and which row and epoch of ours makes each recorded sample.

The order of samples is outside the recordings we match, and a row may give several samples, so a recorded sample is
looked for among everything that our sources make of the recorded rows.
"""

from __future__ import annotations

import functools
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.formats.record import ParsedRow
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import decode_rgb, resize_to_uint8
from bagel_ds.data.samples.sample import TEXT, VAE, Entry, SamplePlan
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.model.batch import normalize_pixels
from bagel_ds.model_folder.tokenizer import Tokenizer, load_tokenizer
from tests.recordings import bagel_config, read_json, reference, tensors

EXPECTED = "packing/expected"
_EPOCHS = 10_000  # enough for every choice of a row to turn up


@dataclass(frozen=True)
class Found:
    """A recorded sample and the plan of ours that equals it; `la`: it shows an LA image converted as upstream does."""

    row: int
    epoch: int
    la: bool


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(reference() / "model")


@functools.cache
def layout_options() -> LayoutOptions:
    config = bagel_config(reference() / "model")
    return LayoutOptions(
        vit_patch_size=config.vit.patch_size,
        latent_patch_size=config.latent_patch_size,
        max_latent_size=config.max_latent_size,
        vit_max_num_patch_per_side=config.vit.max_patches_per_side,
        latent_channels=config.z_channels,
    )


@functools.cache
def stream(name: str, text: float = 0.0, vit: float = 0.0, vae: float = 0.0) -> GroupStream:
    """The recorded data set `name` with the given dropout probabilities."""
    samples = read_json(f"{EXPECTED}/samples_{name}")["samples"]
    kind = samples[0]["data_indexes"]["dataset_name"]
    folder = reference() / "packing" / name
    transforms = read_json("packing/transform_args")
    dataset: dict[str, Any] = {"name": name, "data_dir": str(folder)}
    group: dict[str, Any] = {"image_transform_args": transforms["vae"]}
    if kind == "vlm_sft":
        dataset = {"name": name, "data_dir": str(folder / "images"), "jsonl_path": str(next(folder.glob("*.jsonl")))}
        group = {"image_transform_args": transforms["vlm"]}
    elif kind != "t2i_pretrain":
        group["vit_image_transform_args"] = transforms["vit"]
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "recorded.yaml")
        config.write_text(yaml.safe_dump({kind: {**group, "dataset_names": [dataset]}}))
        options = SampleOptions(10**9, text, vit, vae)
        return open_streams(load_dataset_config(str(config)), tokenizer(), options, scratch, False)[0]


@functools.cache
def recorded_images(name: str) -> dict[str, Tensor]:
    return tensors(f"{EXPECTED}/samples_{name}")


def unpackable(sample: dict[str, Any]) -> bool:
    """More image entries than images: upstream cannot pack it (REFERENCE 8, vlm line "4")."""
    return sum(entry["type"] != TEXT for entry in sample["sequence_plan"]) > len(sample["image_shapes"])


@functools.cache
def find(name: str, number: int) -> Found | None:
    """Where our streams make recorded sample `number` of data set `name`."""
    source = stream(name)
    sample = read_json(f"{EXPECTED}/samples_{name}")["samples"][number]
    for row in range(source.rows):
        for plan in _outcomes(name, row):
            la = _equal(plan, sample, name, number)
            if la is not None:
                return Found(row, plan.epoch, la)
    return None


@functools.cache
def _outcomes(name: str, row: int) -> tuple[SamplePlan, ...]:
    """Every different sample of a row, each with the first epoch that draws it."""
    outcomes: dict[tuple[Entry, ...], SamplePlan] = {}
    for epoch in range(_EPOCHS):
        plan = stream(name).plan_sample(row, epoch)
        if plan is None or (epoch == 64 and len(outcomes) == 1):
            break
        outcomes.setdefault(plan.entries, plan)
    return tuple(outcomes.values())


def _equal(plan: SamplePlan, sample: dict[str, Any], name: str, number: int) -> bool | None:
    """None: another sample; else whether an LA image was left out of the comparison."""
    source = stream(name)
    recorded = [(e["type"], bool(e["loss"]), _label(e), bool(e["enable_cfg"])) for e in sample["sequence_plan"]]
    ours = [(e.kind, e.loss, e.special_label, _droppable(e.kind, e.loss, source)) for e in plan.entries]
    if ours != recorded:
        return None
    row = source.read(plan)
    assert isinstance(row, ParsedRow)
    texts = [tokenizer().encode(row.texts[e.content]) for e in plan.entries if e.kind == TEXT]
    if texts != sample["text_ids_list"]:
        return None
    left_out = False
    images = [entry for entry in plan.entries if entry.kind != TEXT]
    for place, entry in enumerate(images):
        content = row.images[entry.content]
        if _is_la(content) and source.kind != "interleave_reasoning":  # the Canvas set was recorded on white
            left_out = True
            continue
        transform = source.vae_transform if entry.kind == VAE else source.vit_transform
        assert transform is not None
        sharing = len(row.images) if source.source.images_share_pixels else 1
        pixels = normalize_pixels(resize_to_uint8(decode_rgb(content), transform, sharing))
        recorded_pixels = recorded_images(name)[f"sample.{number}.image.{place}"]
        if pixels.shape != recorded_pixels.shape or not torch.equal(pixels, recorded_pixels):
            return None
        if (entry.height, entry.width) != tuple(pixels.shape[1:]):
            return None
    return left_out


def _label(entry: dict[str, Any]) -> int:
    return entry["special_token_label"] if entry["special_token_loss"] else -1


def _droppable(kind: str, loss: bool, source: GroupStream) -> bool:
    return source.source.conditions_drop and not (kind == VAE and loss)


def _is_la(content: bytes | Path) -> bool:
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        return image.mode == "LA"
