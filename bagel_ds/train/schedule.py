"""The learning rate of every optimizer step.

Guarantees: the original's two schedules, number for number: linear warm-up from exactly 0, then constant or cosine down
to `min_lr`. A pure function of the step, so a resumed run needs no scheduler state. Steps count from 0 and are
optimizer steps, not micro-batches; past `total_steps` the cosine stays at `min_lr`.
"""

from __future__ import annotations

import math

from bagel_ds.errors import UserError

SCHEDULES = ("constant", "cosine")


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int, schedule: str = "constant"
) -> float:
    """Learning rate that optimizer step number `step` (0-based) uses.

    With a warm-up the first step has rate 0 (Adam's moments still move); without one it has `lr`. A run shorter than
    its warm-up ends on the ramp. `min_lr` matters to the cosine only. Raises UserError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"--lr_scheduler {schedule!r} is unknown; choose one of: {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return lr * (step / warmup_steps)
    if schedule == "constant" or lr == 0:
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    floor = min_lr / lr
    # cos(pi * 0.5 * 2 * p) in the original's order of operations, so that the last bit agrees as well.
    factor = 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress))
    return lr * max(0.0, factor * (1 - floor) + floor)
