"""A pack that a run has kept comes back to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_ds.data.batches.batch_file import load_batch, save_batch
from bagel_ds.model.batch import PackedBatch
from tests.data.stand_in import odd_batch


@pytest.fixture
def batch() -> PackedBatch:
    return odd_batch()


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
