"""The schedules against the recorded learning rates of the original, whatever schedules `lr/lr.json` holds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.train.schedule import learning_rate


def recorded_schedules() -> list[Any]:
    """One pytest parameter per schedule of the file: (arguments of `learning_rate`, rates of steps 0, 1, ...)."""
    folder = os.environ.get("BAGEL_REFERENCE_DIR")
    if not folder:
        reason = "BAGEL_REFERENCE_DIR is not set: no recordings to compare with"
        return [pytest.param({}, [], marks=pytest.mark.skip(reason=reason), id="no-recordings")]
    recorded = json.loads((Path(folder) / "lr" / "lr.json").read_text())
    cases = []
    for name, entry in recorded.items():
        if isinstance(entry, list):  # "constant_warmup20": the warm-up is in the name
            warmup = re.search(r"warmup_?(\d+)", name)
            about = {"warmup": int(warmup.group(1)) if warmup else 0, "total": len(entry), "min_lr": 0.0}
            rates = entry
        elif isinstance(entry, dict):
            about, rates = entry, entry["lr"]
        else:
            continue
        arguments = {
            "lr": about.get("base_lr", recorded["base_lr"]),
            "min_lr": about.get("min_lr", 0.0),
            "warmup_steps": about["warmup"],
            "total_steps": about["total"],
            "schedule": name.split("_")[0],
        }
        cases.append(pytest.param(arguments, rates, id=name))
    return cases


@pytest.mark.parametrize(("arguments", "rates"), recorded_schedules())
def test_every_step_has_the_recorded_rate(arguments: dict[str, Any], rates: list[float]) -> None:
    assert rates, "the recording holds no steps"
    ours = [learning_rate(step, **arguments) for step in range(len(rates))]
    # The same float64 operations in the same order: equality is demanded, not closeness.
    assert ours == rates
