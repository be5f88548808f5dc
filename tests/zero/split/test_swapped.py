"""Groups on NVMe hold what was written, in any order of groups, with fewer and more of them than buffers."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.zero.config.settings import SPLIT_SWAP_BUFFERS
from bagel_ds.zero.split.swapped import SwappedGroups
from bagel_ds.zero.swap_io import SECTOR

DTYPES = (torch.int16, torch.bfloat16, torch.float32)
# Around a whole sector of each dtype, and less than one element per sector of a request.
SIZES = [1, 3, SECTOR // 4 - 1, SECTOR // 4, SECTOR // 2, SECTOR // 2 + 1, 5 * SECTOR + 7, 2_200_001]


def values(size: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-(2**15), 2**15, (size,), generator=generator)
    return tuple(whole.to(dtype) for dtype in DTYPES)


def put(groups: SwappedGroups, group: int, new: tuple[Tensor, ...], ahead: bool) -> None:
    with groups.open(group, write=True, ahead=ahead) as held:
        for one, other in zip(held, new):
            one.copy_(other)


def same(groups: SwappedGroups, group: int, expected: tuple[Tensor, ...]) -> bool:
    with groups.open(group, write=False) as held:
        return all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))


@pytest.mark.parametrize("count", [1, SPLIT_SWAP_BUFFERS - 1, SPLIT_SWAP_BUFFERS, SPLIT_SWAP_BUFFERS + 1, len(SIZES)])
def test_groups_hold_what_was_written_last(tmp_path: Path, count: int) -> None:
    groups, sizes = SwappedGroups(tmp_path / "new", SIZES[-count:], DTYPES), SIZES[-count:]
    held = {group: tuple(torch.zeros(size, dtype=dtype) for dtype in DTYPES) for group, size in enumerate(sizes)}
    assert all(same(groups, group, held[group]) for group in held), "zeros at first"
    for step in range(3):  # as an update goes through them
        for group, size in enumerate(sizes):
            assert same(groups, group, held[group])
            held[group] = values(size, 100 * step + group)
            put(groups, group, held[group], ahead=True)
        groups.flush()
    draw = random.Random(count)
    for step in range(60):  # in any order, as loads and saves do
        group = draw.randrange(count)
        if draw.random() < 0.5:
            held[group] = values(sizes[group], 1000 + step)
            put(groups, group, held[group], ahead=draw.random() < 0.5)
        other = draw.randrange(count)
        assert same(groups, other, held[other]), (step, group, other)


def test_the_files_and_not_only_the_buffers_hold_it(tmp_path: Path) -> None:
    """What is in memory is of few groups, and no group has more than its file."""
    groups = SwappedGroups(tmp_path, [1000] * (SPLIT_SWAP_BUFFERS + 2), DTYPES)
    for group in range(SPLIT_SWAP_BUFFERS + 2):
        put(groups, group, values(1000, group), ahead=True)
    groups.flush()
    first = tmp_path / "group_0.split"
    assert torch.equal(torch.from_file(str(first), size=1000, dtype=torch.int16), values(1000, 0)[0])
    first.write_bytes(bytes(first.stat().st_size))
    assert same(groups, 0, tuple(torch.zeros(1000, dtype=dtype) for dtype in DTYPES)), "read again"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= (SPLIT_SWAP_BUFFERS + 2) * (8000 + 2 * SECTOR)


def test_a_file_that_lost_its_end_is_named_and_never_half_used(tmp_path: Path) -> None:
    groups = SwappedGroups(tmp_path, [5000] * (SPLIT_SWAP_BUFFERS + 1), DTYPES)
    os.truncate(tmp_path / "group_1.split", 100)
    with pytest.raises(UserError, match=r"--nvme_path: .*group_1\.split could not be read"):
        with groups.open(1, write=False):
            raise AssertionError("opened")
    with groups.open(0, write=False, ahead=True):
        pass  # what is read ahead fails when it is needed
    with pytest.raises(UserError, match=r"group_1\.split could not be read"):
        with groups.open(1, write=True):
            raise AssertionError("opened")


def test_a_drive_without_room_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"group_0\.split can't hold .* of the optimizer's states \(No space left"):
        SwappedGroups(tmp_path, [1000], DTYPES)
