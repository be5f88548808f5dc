"""One optimizer step: a window of micro-batches in, updated weights and the step's losses out.

Guarantees: every rank makes the same calls in the same order, whatever its batches hold. Nothing here waits for a GPU:
ranks exchange over the network what they know on the host, and losses stay on the device until a step is logged.
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
    WindowTotals,
    partial_means,
    weighted,
    window_counts,
)
from bagel_ds.train.metrics.profile import phase_of_step
from bagel_ds.train.ranks.agreement import everyone, on_any_rank, sum_over_ranks
from bagel_ds.zero.engine import ZeroEngine

Encode = Callable[[PackedBatch], Tensor]  # the batch's images as clean latent tokens [G, F] fp32


class WindowLosses(NamedTuple):
    """What `accumulate` hands to `update`; tensors are on the engine's device."""

    sums: Tensor  # [2] fp64: this rank's part of the step's mean ce and mse
    totals: WindowTotals
    options: LossOptions
    breakdown: Tensor | None  # this rank's sums by part (`LossBreakdown`)


class StepMeans(NamedTuple):
    """Losses over the whole step and all ranks. ce or mse is None if the step has none of it."""

    ce: float | None
    mse: float | None
    total: float


class StepResult(NamedTuple):
    """A finished step. Reading a loss or `grad_norm` waits for the device."""

    losses: WindowLosses
    grad_norm: Tensor | float  # before clipping
    applied: bool  # False if a loss or gradient was not finite: then no rank has updated anything
    stop: bool  # a rank wants to stop after this step

    @property
    def tokens(self) -> int:
        """Over all ranks."""
        return int(self.losses.totals.tokens)

    def means(self, sums_by_rank: Sequence[Sequence[float]]) -> StepMeans:
        """The step's losses, from `losses.sums.tolist()` of every rank."""
        ce, mse = (math.fsum(parts) for parts in zip(*sums_by_rank, strict=True))
        _, totals, options, _ = self.losses
        total = options.ce_weight * ce + options.mse_weight * mse
        return StepMeans(ce if totals.ce else None, mse if totals.mse else None, total)

    def read(self) -> StepMeans:
        """The step's losses, exchanged with the other ranks: call it on all of them."""
        return self.means(everyone(self.losses.sums.tolist()))


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
    totals = WindowTotals(*sum_over_ranks(window_counts(window, options)))
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
    return WindowLosses(sums, totals, options, breakdown_sums)


def update(
    engine: ZeroEngine, losses: WindowLosses, learning_rate: float, wants_stop: Callable[[], object] = lambda: False
) -> StepResult:
    """Update the weights with the accumulated gradients.

    Asks `wants_stop` once, after the update; a true answer on any rank counts for all.
    """
    with phase_of_step("update"):
        applied, grad_norm = engine.update(learning_rate)
    return StepResult(losses, grad_norm, applied, stop=on_any_rank(bool(wants_stop())))


def _spoiled_unless_finite(loss: Tensor) -> Tensor:
    """A loss that is not finite may have finite gradients. Make them NaN, so that all ranks skip the update."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
