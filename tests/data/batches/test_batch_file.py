"""A pack that a run has kept comes back to the bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel_ds.data.batches.batch_file import load_batch, save_batch
from bagel_ds.model.batch import PackedBatch


@pytest.fixture
def batch() -> PackedBatch:
    """Any tensors will do; the two images are one, as where an image is read and drawn."""
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    values: dict[str, Any] = {
        "sample_lens": (4, 3),
        "split_lens": (4, 3),
        "attn_modes": ("causal", "noise"),
        "vit_seqlens": (2,),
        "latent_shapes": ((1, 1), (1, 1)),
        "images": (image, image),
        "samples": ("t2i: a.parquet row group 0 row 1", "edit: b.parquet row group 2 row 3"),
        "skipped": (("vlm", "c.jsonl: cut short"),),
        "timesteps": torch.tensor([-math.inf, 0.25]),
        "noise": torch.full((2, 64), math.nan),
    }
    names = [field.name for field in dataclasses.fields(PackedBatch) if field.name not in values]
    return PackedBatch(**values, **{name: torch.arange(5) for name in names})


def equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_pack_comes_back_as_it_was(batch: PackedBatch, tmp_path: Path) -> None:
    save_batch(tmp_path / "new" / "pack", batch)
    found = load_batch(tmp_path / "new" / "pack")
    for field in dataclasses.fields(batch):
        assert equal(getattr(found, field.name), getattr(batch, field.name)), field.name
