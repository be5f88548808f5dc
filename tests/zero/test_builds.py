"""A build lock goes away when its builder is gone, and only then."""

from __future__ import annotations

from pathlib import Path

from bagel_ds.zero.builds import remove_stale_locks


def test_a_lock_without_a_builder_is_removed_and_a_held_one_stays(tmp_path: Path) -> None:
    stale, held = tmp_path / "async_io" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir()
        lock.touch()
    with held.open():
        assert remove_stale_locks([tmp_path]) == [stale]
    assert held.exists() and not stale.exists()
