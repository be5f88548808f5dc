"""Drives are measured with files that go away, and judged by what a run does with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.doctor import drives
from bagel_ds.doctor.drives import GB, Speed, save_findings, swap_findings
from bagel_ds.doctor.environment import Verdict
from bagel_ds.units import MIB


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drives, "_MOST_BLOCKS", 2)
    monkeypatch.setattr(drives, "_BLOCK", 4 * MIB)


def test_both_ways_of_writing_are_measured_and_leave_nothing(short: None, tmp_path: Path) -> None:
    for measure in (drives.save_speed, drives.swap_speed):
        speed = measure(tmp_path)
        assert speed.write > 0 and speed.read > 0
        assert list(tmp_path.iterdir()) == []


def test_a_file_is_removed_also_when_measuring_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drives.os, "fsync", full)
    found = save_findings(tmp_path, measured=True)[-1]
    assert found.verdict is Verdict.FAULT and "No space left" in found.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("speed", "saves", "swaps"),
    [
        (Speed(3 * GB, 5 * GB), True, True),
        (Speed(0.5 * GB, 0.9 * GB), True, False),
        (Speed(0.1 * GB, GB), False, False),
    ],
)
def test_a_slow_drive_is_a_warning_that_says_what_it_costs(
    speed: Speed, saves: bool, swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "save_speed", lambda folder: speed)
    monkeypatch.setattr(drives, "swap_speed", lambda folder: speed)
    saving, swapping = save_findings(tmp_path, True)[-1], swap_findings(tmp_path, True)[-1]
    assert (saving.verdict is Verdict.GOOD, swapping.verdict is Verdict.GOOD) == (saves, swaps)
    assert f"a checkpoint of the whole 7B takes about {292 * GB / speed.write / 60:.0f} minutes" in saving.message
    assert f"in about {176 * GB / speed.write + 176 * GB / speed.read:.0f} s" in swapping.message
    assert swaps or "use a local NVMe SSD" in swapping.remedy


def test_too_little_space_for_a_checkpoint_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(drives.shutil.disk_usage(tmp_path))
    for free, verdict in ((291 * GB, Verdict.NOTE), (293 * GB, Verdict.GOOD)):
        monkeypatch.setattr(drives.shutil, "disk_usage", lambda path, free=free: usage(10**12, 0, free))
        (found,) = save_findings(tmp_path / "not" / "there", measured=False)
        assert found.verdict is verdict and f"{free // GB} GB free" in found.message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert save_findings(tmp_path / "file" / "below", measured=True)[0].verdict is Verdict.FAULT
    assert swap_findings(tmp_path / "file" / "below", measured=True)[0].verdict is Verdict.FAULT


def test_a_folder_to_swap_to_that_is_not_there_is_a_warning_and_leaves_nothing(tmp_path: Path) -> None:
    (found,) = swap_findings(tmp_path / "new" / "swap", measured=False)
    assert found.verdict is Verdict.NOTE and "does not exist yet, and a run will make it" in found.message
    assert f"{tmp_path / 'new' / 'swap'} (" in found.message and "mount it" in found.remedy
    assert list(tmp_path.iterdir()) == [], "neither the folder that was made for the check nor the one above it"
    assert swap_findings(tmp_path, measured=False)[0].verdict is Verdict.GOOD


def test_swapping_to_memory_is_refused_as_a_run_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_ds.zero.nvme_check.file_system", lambda path: "tmpfs")
    (found,) = swap_findings(tmp_path / "new", measured=True)
    assert found.verdict is Verdict.FAULT and "which is memory" in found.text
    assert list(tmp_path.iterdir()) == [], "the folder that was made for the check"
