"""What ranks say of themselves, without the machines."""

from __future__ import annotations

from bagel_ds.train.ranks.hosts import RankInfo


def rank_on(host: str, **changed: object) -> RankInfo:
    """What a rank says of itself: a process on `host`, with two cores and no GPU."""
    usual = RankInfo(host, f"kernel of {host}", "pid:[1]", 100, None, None, "10.0.0.1", (), (0, 1))
    return usual._replace(**changed)  # type: ignore[arg-type]
