"""Moments are read back from a training state. What weights a run starts with is in test_start.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.checkpoint.state import WEIGHT, Held, StateFiles, rank_file
from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.train.saves.restore import restore_moments
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ
from tests.checkpoint.written import write_rank
from tests.train.saves.one_rank_engine import Engine

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("was_frozen", [False, True])
def test_moments_come_back_and_are_zero_for_what_was_frozen(was_frozen: bool, tmp_path: Path) -> None:
    kinds = [WEIGHT] if was_frozen else [MASTER, EXP_AVG, EXP_AVG_SQ]
    held = [Held(kind, "trains", 0, 6, torch.float32) for kind in kinds]
    pieces = [(kind, Pieces("trains", [(Range("trains", 0, 6), torch.arange(6.0))])) for kind in kinds]
    write_rank(rank_file(tmp_path, 0), held, pieces)
    engine: Any = Engine()
    restore_moments(engine, StateFiles(tmp_path), 5)
    expected = torch.zeros(6) if was_frozen else torch.arange(6.0)
    for kind in (EXP_AVG, EXP_AVG_SQ):
        assert torch.equal(engine.partitions.flats[kind], expected)
    assert engine.partitions.step == 5
