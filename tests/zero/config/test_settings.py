"""What other packages see of a configuration is what DeepSpeed itself would make of it."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from bagel_ds.zero.config.settings import Gathering, ZeroSettings

EVERYTHING = {
    "stage3_prefetch_bucket_size": 11,
    "stage3_param_persistence_threshold": 12,
    "stage3_max_live_parameters": 13,
    "stage3_max_reuse_distance": 14,
    "reduce_bucket_size": 15,
    "sub_group_size": 16,
    "overlap_comm": False,
    "contiguous_gradients": False,
    "zero_hpz_partition_size": 2,
}


@pytest.mark.parametrize("written", [{}, EVERYTHING], ids=["defaults", "written"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_values_are_those_that_deepspeed_takes(stage: int, written: dict[str, Any]) -> None:
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "a"}, "offload_param": {"device": "cpu"}}
    section = {"stage": stage, **written, **(offload if stage == 3 else {})}
    theirs, ours = DeepSpeedZeroConfig(**section), ZeroSettings.of({"zero_optimization": section})
    assert ours.gathering == Gathering(*(getattr(theirs, name) for name in Gathering._fields))
    names = ("stage", "sub_group_size", "overlap_comm", "contiguous_gradients")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert ours.hpz_group == theirs.zero_hpz_partition_size
    if stage == 3:
        assert ours.optimizer.buffers == theirs.offload_optimizer.buffer_count
        assert ours.param.buffers == theirs.offload_param.buffer_count
        assert ours.param.buffer_elements == theirs.offload_param.buffer_size
