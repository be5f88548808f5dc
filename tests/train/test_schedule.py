"""Promises of the learning-rate schedule that hold without any recording."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from bagel_ds.arguments.options import all_options
from bagel_ds.train.schedule import learning_rate

SCHEDULES = all_options()["lr_scheduler"].metadata["choices"]


def rates(steps: int, **changed: Any) -> list[float]:
    arguments: dict[str, Any] = {
        "lr": 2e-5,
        "min_lr": 1e-7,
        "warmup_steps": 10,
        "total_steps": 100,
        "schedule": "cosine",
    }
    return [learning_rate(step, **{**arguments, **changed}) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_of_a_warm_up_has_rate_zero(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [0.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_linear_and_ends_at_the_full_rate(schedule: str) -> None:
    ramp = rates(11, schedule=schedule)
    assert ramp[10] == 2e-5
    assert all(math.isclose(rate, 2e-5 * step / 10, rel_tol=1e-12, abs_tol=0) for step, rate in enumerate(ramp))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: str) -> None:
    assert rates(1, schedule=schedule, warmup_steps=0) == [2e-5]


def test_constant_ignores_min_lr_and_total_steps() -> None:
    assert set(rates(300, schedule="constant", min_lr=1e-6, total_steps=20)[10:]) == {2e-5}


def test_cosine_never_rises_and_stays_at_min_lr_past_the_end() -> None:
    curve = rates(250)[10:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(curve))
    assert all(math.isclose(rate, 1e-7, rel_tol=1e-9) for rate in curve[90:])


def test_cosine_is_half_way_at_the_middle() -> None:
    assert math.isclose(rates(60)[55], (2e-5 + 1e-7) / 2, rel_tol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_ends_on_the_ramp(schedule: str) -> None:
    curve = rates(6, schedule=schedule, warmup_steps=10, total_steps=5)
    assert curve == [2e-5 * (step / 10) for step in range(6)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_equal_to_the_run_divides_by_nothing(schedule: str) -> None:
    assert all(math.isfinite(rate) for rate in rates(12, schedule=schedule, warmup_steps=10, total_steps=10))


def test_rate_zero_is_zero_at_every_step() -> None:
    assert set(rates(20, schedule="constant", lr=0.0)) == {0.0}


def test_the_options_offer_the_schedules_that_these_tests_cover() -> None:
    assert tuple(SCHEDULES) == ("constant", "cosine")
