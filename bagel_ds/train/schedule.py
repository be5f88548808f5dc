"""The learning rate of every optimizer step.

Guarantees: the original's two schedules to the last bit: linear warm-up from exactly 0, then constant, or cosine down
to `min_lr`. A pure function of the step, so a resumed run needs no scheduler state. Steps count from 0 and are
optimizer steps, not micro-steps.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int, schedule: str = "constant"
) -> float:
    """The learning rate of optimizer step `step` (0-based); `schedule` is "constant" or "cosine".

    With a warm-up the first step has rate 0 (Adam's moments still move); without one it has `lr`. A run shorter than
    its warm-up ends on the ramp. Past `total_steps` the cosine, which needs lr > 0, stays at `min_lr`.
    """
    if step < warmup_steps:
        return lr * (step / warmup_steps)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    floor = min_lr / lr
    # cos(pi * 0.5 * 2 * p) in the original's order of operations, so that the last bit agrees.
    factor = 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress))
    return lr * max(0.0, factor * (1 - floor) + floor)
