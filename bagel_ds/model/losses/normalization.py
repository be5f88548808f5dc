"""Loss of an optimizer step, normalized over all its ranks and micro-batches.

Guarantees: all labeled tokens of a step weigh the same, and so do all noised latent tokens, whichever rank or
micro-batch holds them: two micro-batches on one rank give the same gradient as one on each of two. A step without
labels (or without noised images) has a zero loss of that kind, with zero gradients.

    loss = ce_weight * sum(ce) / N_ce + mse_weight * sum(mean over features of mse) / N_mse

with N over all ranks and micro-batches. With ce_loss_reweighting, sum(ce w) / sum(w) replaces the first mean.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch


class LossOptions(NamedTuple):
    """The original's arguments of these names."""

    ce_weight: float = 1.0
    mse_weight: float = 1.0
    ce_loss_reweighting: bool = False


class WindowTotals(NamedTuple):
    """Counts of one optimizer step over all ranks and micro-batches."""

    ce: float  # labels, or the sum of their weights with ce_loss_reweighting
    mse: float  # noised latent tokens
    tokens: float


def window_counts(window: Sequence[PackedBatch], options: LossOptions) -> WindowTotals:
    """What this rank adds to a step's totals. The batches are on the host."""
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in window:
        labels = batch.ce_loss_weights.double().sum() if options.ce_loss_reweighting else len(batch.label_ids)
        counts += torch.tensor([labels, len(batch.mse_loss_indexes), batch.sequence_length], dtype=torch.float64)
    return WindowTotals(*counts.tolist())


class LossSums(NamedTuple):
    """Contributions to a step's two means; their sums over ranks and micro-batches are the means."""

    ce: Tensor
    mse: Tensor


def token_losses(output: BagelOutput, batch: PackedBatch, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(cross entropy of each label times its weight [K], the weights [K], squared error of each noised token [M])."""
    weights = batch.ce_loss_weights if options.ce_loss_reweighting else torch.ones_like(batch.ce_loss_weights)
    ce = output.ce * weights if options.ce_loss_reweighting else output.ce
    return ce, weights, output.mse.mean(dim=-1)


def partial_means(output: BagelOutput, batch: PackedBatch, totals: WindowTotals, options: LossOptions) -> LossSums:
    """One micro-batch's contribution to the step's mean cross entropy and mean squared error."""
    ce, _, mse = token_losses(output, batch, options)
    # A kind without tokens on any rank: zero divided by 1 stays zero and stays in the graph.
    return LossSums(ce.sum() / (totals.ce or 1.0), mse.sum() / (totals.mse or 1.0))


def weighted(means: LossSums, options: LossOptions) -> Tensor:
    """The scalar whose gradient is taken."""
    return options.ce_weight * means.ce + options.mse_weight * means.mse
