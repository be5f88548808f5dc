"""One optimizer step: a window of micro-batches in, updated weights and the step's losses out.

Guarantees: every rank makes the same calls in the same order, whatever its batches hold; losses are means over the
whole step and all ranks.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.losses.by_part import LossParts
from bagel_ds.model.losses.normalization import LossOptions, LossSums, partial_means, weighted, window_totals
from bagel_ds.zero.engine import ZeroEngine

Encode = Callable[[PackedBatch], Tensor]  # the batch's images as clean latent tokens [G, F] fp32


class StepResult(NamedTuple):
    """Means over the whole step; ce or mse is None where the step has none of it."""

    ce: float | None
    mse: float | None
    total: float
    grad_norm: float
    tokens: int  # over all ranks
    applied: bool  # False where a loss or gradient was not finite: nothing was updated on any rank
    stop: bool  # a rank wants to stop after this step
    parts: Tensor | None = None  # of the losses (`LossParts`): this rank's sums, on its device


def _spoiled_unless_finite(loss: Tensor) -> Tensor:
    """A loss that is not finite may have finite gradients: made NaN, they have the update skipped on all ranks."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def optimizer_step(
    engine: ZeroEngine,
    encode: Encode,
    window: Sequence[PackedBatch],
    learning_rate: float,
    options: LossOptions,
    wants_stop: Callable[[], bool] = lambda: False,
    before_update: Callable[[], None] = lambda: None,
    parts: LossParts | None = None,
) -> StepResult:
    """Forward, backward and update over `window` (this rank's micro-batches, as many as accumulation steps).

    `before_update` is called once, after the last backward pass. `wants_stop` is asked once, after the update; the
    answer of any rank holds for all. `parts` adds up what the losses consist of.
    """
    totals = window_totals(window, options, engine.device)
    world = dist.get_world_size()
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # ce, mse
    part_sums = torch.empty(0) if parts is None else parts.zeros(engine.device)
    grad_norm = None
    for batch in window:
        batch = batch.to(engine.device)
        output = engine.forward(batch, encode(batch))
        means = partial_means(output, batch, totals, options)
        if parts is not None:
            parts.add(part_sums, output, batch)
        sums += torch.stack(means).detach()
        # DeepSpeed averages gradients over ranks; the means are already over all of them.
        engine.backward(_spoiled_unless_finite(weighted(means, options)) * world)
        grad_norm = engine.micro_step(learning_rate, before_update)
    assert grad_norm is not None, "a window has as many batches as the engine has accumulation steps"
    all_ranks = torch.cat([sums, sums.new_tensor([wants_stop()])])
    dist.all_reduce(all_ranks)
    ce, mse, stops = all_ranks.tolist()
    return StepResult(
        ce=ce if totals.ce else None,
        mse=mse if totals.mse else None,
        total=float(weighted(LossSums(*all_ranks[:2]), options)),
        grad_norm=grad_norm,
        tokens=int(totals.tokens),
        applied=math.isfinite(grad_norm),
        stop=stops > 0,
        parts=None if parts is None else part_sums,
    )
