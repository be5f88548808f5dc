"""The numbers of a logged step: names, means since the last one, totals over ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from bagel_ds.data.batches.loader import MicroBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import LossOptions, WindowTotals
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.train.metrics import meter as meter_module
from bagel_ds.train.metrics.meter import StepMeter
from bagel_ds.train.metrics.throughput import DeviceMemory
from bagel_ds.train.step import StepResult, WindowLosses
from tests.train.metrics.metric_names import METRIC_NAMES, METRIC_PREFIXES
from tests.train.metrics.test_throughput import pack, text

pytestmark = pytest.mark.usefixtures("one_rank")

TOTALS = WindowTotals(ce=3.0, mse=0.0, tokens=100.0)
LOSSES = WindowLosses(torch.tensor([2.0, 0.0], dtype=torch.float64), TOTALS, LossOptions(), breakdown=None)
RESULT = StepResult(LOSSES, grad_norm=torch.tensor(0.5), applied=True, stop=False)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


def micro(efficiency: float = 0.9, imbalance: float = 0.1, skipped: tuple = ()) -> MicroBatch:
    from dataclasses import replace

    batch = replace(pack([text(20)]), skipped=skipped)
    return MicroBatch(batch, {}, efficiency, imbalance, {"t2i": 0.25, "vlm": 1.5})


def test_every_number_has_a_public_name(clock: Clock) -> None:
    meter = StepMeter(BagelConfig(), peak_device_tflops=100.0)
    meter.add([micro()], RESULT)
    clock.now += 2
    values = meter.read(1e-4, RESULT)
    assert all(name in METRIC_NAMES or name.startswith(METRIC_PREFIXES) for name in values)
    assert set(METRIC_NAMES) <= set(values)
    assert values["loss/mse"] is None and values["loss/ce"] == 2.0 and values["optim/lr"] == 1e-4
    assert values["data/epoch/vlm"] == 1.5 and values["data/skipped/vlm"] == 0


def test_parts_of_the_losses_come_from_all_ranks_in_one_exchange(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    breakdown = LossBreakdown(["t2i", "vlm"], 1.0, LossOptions())
    exchanges = []

    def two_ranks(mine: Any) -> list[Any]:
        exchanges.append(mine)
        theirs = torch.zeros(2, 8, dtype=torch.float64)
        theirs[:, 0] = torch.tensor([9.0, 1.0])  # one token of t2i with an error of 9
        return [mine, mine._replace(losses=[1.0, 0.0], breakdown=theirs.tolist())]

    monkeypatch.setattr(meter_module, "everyone", two_ranks)
    meter = StepMeter(BagelConfig(), 0.0, breakdown=breakdown)
    sums = breakdown.zeros(torch.device("cpu"))
    sums[:, 0] = torch.tensor([6.0, 2.0])
    sums[:, 3] = torch.tensor([1.0, 4.0])
    result = RESULT._replace(losses=LOSSES._replace(breakdown=sums))
    meter.add([micro()], result)
    clock.now += 1
    values = meter.read(1e-4, result)
    assert values["loss/mse/t2i"] == 5.0 and values["loss/ce/vlm"] == 0.25
    assert "loss/mse/vlm" not in values and len(exchanges) == 1
    assert values["loss/ce"] == 3.0 and values["optim/grad_norm"] == 0.5
    assert all(name in METRIC_NAMES or name.startswith(METRIC_PREFIXES) for name in values)


def test_speeds_are_means_since_the_last_logged_step(clock: Clock) -> None:
    meter = StepMeter(BagelConfig(), peak_device_tflops=0.0)
    for _ in range(4):
        meter.add([micro()], RESULT)
        clock.now += 0.5
    first = meter.read(1e-4, RESULT)
    assert first["perf/tokens_per_sec"] == 200 and first["perf/step_seconds"] == 0.5
    meter.add([micro()], RESULT)
    clock.now += 4
    second = meter.read(1e-4, RESULT)
    assert second["perf/tokens_per_sec"] == 25 and second["perf/step_seconds"] == 4


def test_packing_is_that_of_the_step_over_its_micro_batches(clock: Clock) -> None:
    meter = StepMeter(BagelConfig(), peak_device_tflops=0.0)
    meter.add([micro(0.5, 0.0), micro(1.0, 0.2)], RESULT)
    clock.now += 1
    values = meter.read(1e-4, RESULT)
    assert values["data/packing_efficiency"] == 0.75 and values["data/imbalance"] == pytest.approx(0.1)


def test_a_skipped_row_is_counted_once_and_named_once(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = StepMeter(BagelConfig(), 0.0, lambda: {"t2i": 5, "vlm": 0})
    monkeypatch.setattr(logging.getLogger("bagel_ds"), "propagate", True)
    first = (("t2i", "t2i: a row 1: broken"), ("t2i", "t2i: a row 2: broken"), ("other", "other: a row 1: broken"))
    for skipped, expected in ((first, 7), (first, 7), ((*first, ("t2i", "t2i: a row 3: broken")), 8)):
        meter.add([micro(skipped=skipped)], RESULT)
        clock.now += 1
        values = meter.read(1e-4, RESULT)
        assert values["data/skipped/t2i"] == expected and values["data/skipped/other"] == 1
        assert values["data/skipped/vlm"] == 0
    named = [record.getMessage() for record in caplog.records]
    assert named == [
        f"skipped: {row}: broken" for row in ("t2i: a row 1", "t2i: a row 2", "other: a row 1", "t2i: a row 3")
    ]


def test_utilisation_is_over_all_ranks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_ranks(mine: Any) -> list[Any]:
        broken = {"row 7": "t2i", "row 8": "t2i"}
        mine = mine._replace(host="a", host_gib=2.0)
        other = mine._replace(flops=3 * mine.flops, host_gib=3.0, waited=mine.waited + 0.25, newly_broken=broken)
        return [mine, other]

    meter = StepMeter(BagelConfig(), peak_device_tflops=100.0)
    meter.add([micro()], RESULT)
    clock.now += 1
    alone = meter.read(1e-4, RESULT)
    monkeypatch.setattr(meter_module, "everyone", two_ranks)
    meter.add([micro()], RESULT)
    with meter.waiting_for_data():
        clock.now += 0.5
    clock.now += 0.5
    both = meter.read(1e-4, RESULT)
    assert both["perf/data_wait"] == 0.75 and alone["perf/data_wait"] == 0, "of the rank that waits longest"
    assert both["perf/mfu"] == pytest.approx(2 * alone["perf/mfu"])  # type: ignore[operator]
    assert both["memory/host_gib"] == 5.0, "ranks of one host share its memory"
    assert both["data/skipped/t2i"] == 2


def test_device_memory_is_that_of_the_fullest_rank_and_a_plan_is_compared_with_what_is_reserved(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = StepMeter(BagelConfig(), peak_device_tflops=0.0)
    for mine, other, expected in ((None, None, (None, None)), ((3.0, 5.0), (4.0, 4.5), (4.0, 5.0))):
        devices = [None if peaks is None else DeviceMemory(*peaks) for peaks in (mine, other)]
        monkeypatch.setattr(meter_module, "everyone", lambda mine: [mine._replace(device=device) for device in devices])  # noqa: B023
        meter.add([micro()], RESULT)
        clock.now += 1
        values = meter.read(1e-4, RESULT)
        assert (values["memory/device_gib"], values["memory/device_reserved_gib"]) == expected
        assert meter.device_peak == expected[1]
