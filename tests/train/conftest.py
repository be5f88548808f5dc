"""A process group of one rank, for what talks to all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from bagel_ds.train import agreement
from bagel_ds.train.hosts import Hosts, RankInfo


def rank_on(host: str, **changed: object) -> RankInfo:
    """What a rank tells of itself: a process on `host`, with two cores and no GPU."""
    usual = RankInfo(host, f"kernel of {host}", "pid:[1]", 100, None, None, "10.0.0.1", (), (0, 1))
    return usual._replace(**changed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    agreement.enter(Hosts(0, (rank_on("here"),)))
    yield
    dist.destroy_process_group()
