"""A build lock goes away when its builder is gone, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.zero import builds
from bagel_ds.zero.builds import remove_stale_locks


def test_a_lock_without_a_builder_is_removed_and_a_held_one_stays(tmp_path: Path) -> None:
    stale, held = tmp_path / "async_io" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir()
        lock.touch()
    with held.open():
        assert remove_stale_locks([tmp_path]) == [stale]
    assert held.exists() and not stale.exists()


def test_locks_of_others_stay(tmp_path: Path) -> None:
    full = tmp_path / "cpu_adam" / "lock"
    mine = [tmp_path / "lock", tmp_path / "my_extension" / "lock", tmp_path / "a" / "b" / "async_io" / "lock", full]
    stale = tmp_path / "py311_cpu" / "async_io" / "lock"
    for lock in (*mine, stale):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    full.write_text("not torch's, whose lock is empty")
    assert remove_stale_locks([tmp_path]) == [stale]
    assert all(lock.exists() for lock in mine)


def test_ranks_that_remove_the_same_locks_do_not_trip_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = [tmp_path / name / "lock" for name in ("async_io", "cpu_adam")]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    look = builds.is_open_somewhere

    def another_rank_is_faster(path: Path) -> bool:
        for lock in locks:
            lock.unlink(missing_ok=True)
        return look(path)

    monkeypatch.setattr(builds, "is_open_somewhere", another_rank_is_faster)
    assert remove_stale_locks([tmp_path]) == []
