"""Updates that are not finite: skipped, counted, kept for replay, and an error if there are too many.

Guarantees: if a loss or gradient is not finite on any rank, no rank updates anything. Each rank keeps its packs of that
step. More than `limit` such steps end the run with an error that names the samples of the last.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Sequence

from safetensors import SafetensorError

from bagel_ds.data.batches.batch_file import save_batch
from bagel_ds.model.batch import PackedBatch
from bagel_ds.train.ranks.agreement import SharedFault, everyone
from bagel_ds.train.step import StepResult

logger = logging.getLogger("bagel_ds")

FOLDER = "nonfinite"


class NonFiniteGuard:
    """Counts the skipped updates of this process and allows `limit` of them."""

    def __init__(self, results_dir: Path, rank: int, limit: int):
        self._folder, self._rank, self._limit = results_dir / FOLDER, rank, limit
        self.skipped = 0

    def check(self, step: int, window: Sequence[PackedBatch], result: StepResult) -> None:
        """Call after every step, on every rank. Raises `SharedFault` past the limit."""
        if result.applied:
            return
        self.skipped += 1
        self._keep(step, window)
        samples = [name for names in everyone([name for batch in window for name in batch.samples]) for name in names]
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s. Its packs are in %s (%d of --max_nonfinite %d)",
            step,
            result.read().total,
            float(result.grad_norm),
            self._folder,
            self.skipped,
            self._limit,
        )
        if self.skipped > self._limit:
            raise SharedFault(
                f"{self.skipped} updates were not finite, more than --max_nonfinite {self._limit}. The last one "
                f"(step {step}) held: {'; '.join(samples)}. Its packs are in {self._folder}: "
                "inspect them with `bagel-ds inspect --pack`, lower --lr, or remove these rows."
            )

    def _keep(self, step: int, window: Sequence[PackedBatch]) -> None:
        try:
            for number, batch in enumerate(window):
                save_batch(self._folder / f"step_{step}_rank_{self._rank}_pack_{number}", batch)
        except (OSError, SafetensorError) as error:
            logger.warning("the packs of step %d can't be kept in %s: %s", step, self._folder, error)
