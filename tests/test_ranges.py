"""Ranges copied piece by piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagel_ds import ranges
from bagel_ds.ranges import Range, copy_range


def test_a_range_is_copied_whole_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "COPIED_ELEMENTS", 4)
    stored = torch.arange(100, dtype=torch.bfloat16)
    sizes: list[int] = []

    def read(name: str, start: int, numel: int) -> Tensor:
        assert name == "w"
        sizes.append(numel)
        return stored[start : start + numel]

    target = torch.zeros(10)
    assert copy_range(target, Range("w", 7, 10), read) == 2 * 10
    assert target.tolist() == list(range(7, 17))
    assert sizes == [4, 4, 2]


def test_an_empty_range_reads_nothing() -> None:
    def read(name: str, start: int, numel: int) -> Tensor:
        raise AssertionError("nothing to read")

    assert copy_range(torch.zeros(0), Range("w", 7, 0), read) == 0
