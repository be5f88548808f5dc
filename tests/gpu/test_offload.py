"""States on NVMe are those in CPU memory to the last bit, also where gradients come from a GPU: the networks and cases
of tests/distributed/test_offload_equality.py, whose operations add in a fixed order there, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_offload_equality import PRESETS, SEEDS, assert_same, train_tables
from tests.gpu.launches import ON_GPU, RANKS


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    train_tables(folder, RANKS, ON_GPU)
    return folder


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_states_on_nvme_are_those_in_memory_to_the_last_bit(tables: Path, seed: int, preset: str) -> None:
    assert assert_same(tables, RANKS, seed, preset, "zero3_cpu")["gradient_bytes"] > 0
