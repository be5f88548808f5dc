"""A step's losses by dataset, and its velocity error by timestep.

Guarantees: a step adds up its sums on the device, without a synchronization and without communication; they are read
and combined over ranks only when the step is logged. Tokens weigh as in the loss itself, so the means of the subsets,
weighted by their tokens, give the loss. A subset without tokens in the step gets no number.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Sequence

import torch
from torch import Tensor

from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.flow import flow_time
from bagel_ds.model.losses.normalization import LossOptions, token_losses

MSE, CE, BY_TIME = "loss/mse/", "loss/ce/", "loss/mse_t/"  # followed by a dataset's name or a band of t
BANDS = 4  # of t after the shift, from 0 (clean) to 1 (noise)


class LossBreakdown:
    """Adds up one step's weighted losses and their weights in a tensor [2, subsets]."""

    def __init__(self, datasets: Sequence[str], timestep_shift: float, options: LossOptions):
        self._datasets = {name: place for place, name in enumerate(datasets)}
        self._shift, self._options = timestep_shift, options
        bands = [f"{BY_TIME}{band / BANDS:g}-{(band + 1) / BANDS:g}" for band in range(BANDS)]
        self.names = [*(MSE + name for name in datasets), *(CE + name for name in datasets), *bands]

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(2, len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, sums: Tensor, output: BagelOutput, batch: PackedBatch) -> None:
        """Add a micro-batch (on the device of `sums`) to the step's sums."""
        ce, ce_weights, mse = token_losses(output, batch, self._options)
        count = len(self._datasets)
        if batch.datasets:
            of_sample = _to([self._datasets[name] for name in batch.datasets], sums.device)
            ends = _to(list(accumulate(batch.sample_lens)), sums.device)
            mse_of, ce_of = (
                of_sample[torch.bucketize(indexes, ends, right=True)]
                for indexes in (batch.mse_loss_indexes, batch.ce_loss_indexes)
            )
            _add(sums, mse_of, mse, torch.ones_like(mse))
            _add(sums, ce_of + count, ce, ce_weights)
        rows = torch.searchsorted(batch.vae_indexes, batch.mse_loss_indexes)
        bands = (flow_time(batch.timesteps[rows], self._shift) * BANDS).long().clamp(0, BANDS - 1)
        _add(sums, bands + 2 * count, mse, torch.ones_like(mse))

    def means(self, by_rank: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
        """Means over all ranks of the subsets that have tokens, from each rank's sums as nested lists."""
        losses, weights = ([sum(column) for column in zip(*rows, strict=True)] for rows in zip(*by_rank, strict=True))
        return {
            name: loss / weight for name, loss, weight in zip(self.names, losses, weights, strict=True) if weight > 0
        }


def _to(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def _add(sums: Tensor, subsets: Tensor, losses: Tensor, weights: Tensor) -> None:
    sums.index_add_(1, subsets, torch.stack([losses, weights]).double())
