"""Updates that are not finite: counted, kept for replay, limited."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.errors import UserError
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.normalization import LossOptions, WindowTotals
from bagel_ds.train import nonfinite
from bagel_ds.train.nonfinite import NonFiniteGuard
from bagel_ds.train.step import StepResult, WindowLosses
from tests.data.stand_in import odd_batch

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def batch() -> PackedBatch:
    return odd_batch()


def result(grad_norm: float) -> StepResult:
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64)
    losses = WindowLosses(sums, WindowTotals(4.0, 5.0, 7.0), LossOptions(), breakdown=None)
    return StepResult(losses, grad_norm, applied=math.isfinite(grad_norm), stop=False)


def test_a_finite_update_is_neither_counted_nor_kept(batch: PackedBatch, tmp_path: Path) -> None:
    guard = NonFiniteGuard(tmp_path, 0, limit=0)
    guard.check(3, [batch], result(1.5))
    assert guard.skipped == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_past_the_limit_the_error_names_the_samples_and_the_packs(
    norm: float, batch: PackedBatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = NonFiniteGuard(tmp_path, 0, limit=1)
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        nonfinite.logger.propagate = True
        guard.check(3, [batch, batch], result(norm))
    assert (
        f"step 3 skipped: loss 3.0, gradient norm {norm}" in caplog.text and "(1 of --max_nonfinite 1)" in caplog.text
    )
    with pytest.raises(UserError) as found:
        guard.check(4, [batch], result(norm))
    for words in ("2 updates", "more than --max_nonfinite 1", "step 4", *batch.samples, "nonfinite"):
        assert words in str(found.value)
    kept = sorted(path.name for path in (tmp_path / "nonfinite").glob("*.safetensors"))
    assert kept == [f"step_{name}.safetensors" for name in ("3_rank_0_pack_0", "3_rank_0_pack_1", "4_rank_0_pack_0")]


def test_a_full_disk_costs_the_kept_packs_and_not_the_run(
    batch: PackedBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "save_batch", full)
    guard = NonFiniteGuard(tmp_path, 0, limit=5)
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        nonfinite.logger.propagate = True
        guard.check(3, [batch], result(math.nan))
    assert guard.skipped == 1 and "No space left on device" in caplog.text
