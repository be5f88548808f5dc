"""One optimizer step: a window of micro-batches in, updated weights and the step's losses out.

Guarantees: every rank makes the same calls in the same order, whatever its batches hold. Losses are means over the
whole step and all ranks.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.breakdown import LossBreakdown
from bagel_ds.model.losses.normalization import (
    LossOptions,
    LossSums,
    WindowTotals,
    partial_means,
    weighted,
    window_totals,
)
from bagel_ds.train.metrics.profile import phase_of_step
from bagel_ds.zero.engine import ZeroEngine

Encode = Callable[[PackedBatch], Tensor]  # the batch's images as clean latent tokens [G, F] fp32


class WindowLosses(NamedTuple):
    """What `accumulate` hands to `update`; tensors are on the engine's device."""

    sums: LossSums  # this rank's part of the means, fp64
    totals: WindowTotals
    options: LossOptions
    breakdown: Tensor | None  # this rank's sums by part (`LossBreakdown`)


class StepResult(NamedTuple):
    """Means over the whole step. ce or mse is None if the step has none of it."""

    ce: float | None
    mse: float | None
    total: float
    grad_norm: float
    tokens: int  # over all ranks
    applied: bool  # False if a loss or gradient was not finite: then no rank has updated anything
    stop: bool  # a rank wants to stop after this step
    breakdown: Tensor | None = None  # `WindowLosses.breakdown`


def accumulate(
    engine: ZeroEngine,
    encode: Encode,
    window: Sequence[PackedBatch],
    options: LossOptions,
    breakdown: LossBreakdown | None = None,
) -> WindowLosses:
    """Forward and backward over `window`, this rank's micro-batches of one step; masters and moments don't change.

    `window` has as many batches as the engine has accumulation steps. `breakdown` also sums the losses by part.
    """
    totals = window_totals(window, options, engine.device)
    world = dist.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # ce, mse
    breakdown_sums = None if breakdown is None else breakdown.zeros(engine.device)
    for number, batch in enumerate(window):
        if number:
            engine.next_micro_batch()
        batch = batch.to(engine.device)
        with phase_of_step("images to latents"):
            latents = encode(batch)
        with phase_of_step("forward"):
            output = engine.forward(batch, latents)
        means = partial_means(output, batch, totals, options)
        if breakdown is not None and breakdown_sums is not None:
            breakdown.add(breakdown_sums, output, batch)
        sums += torch.stack(means).detach()
        # DeepSpeed averages gradients over ranks, but the means are already over all ranks.
        with phase_of_step("backward"):
            engine.backward(_spoiled_unless_finite(weighted(means, options)) * world)
    return WindowLosses(LossSums(*sums), totals, options, breakdown_sums)


def update(
    engine: ZeroEngine, losses: WindowLosses, learning_rate: float, wants_stop: Callable[[], object] = lambda: False
) -> StepResult:
    """Update the weights with the accumulated gradients.

    Asks `wants_stop` once, after the update; a true answer on any rank counts for all.
    """
    with phase_of_step("update"):
        grad_norm = engine.update(learning_rate)
    all_ranks = torch.stack([*losses.sums, losses.sums.ce.new_tensor(bool(wants_stop()))])
    dist.all_reduce(all_ranks)
    ce, mse, stops = all_ranks.tolist()
    return StepResult(
        ce=ce if losses.totals.ce else None,
        mse=mse if losses.totals.mse else None,
        total=float(weighted(LossSums(*all_ranks[:2]), losses.options)),
        grad_norm=grad_norm,
        tokens=int(losses.totals.tokens),
        applied=math.isfinite(grad_norm),
        stop=stops > 0,
        breakdown=losses.breakdown,
    )


def _spoiled_unless_finite(loss: Tensor) -> Tensor:
    """A loss that is not finite may have finite gradients. Make them NaN, so that all ranks skip the update."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
