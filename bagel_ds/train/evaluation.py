"""Evaluation during training: the losses on the split of --val_config.

Guarantees: training goes on as if there were no evaluation. Every rank makes the same number of calls of the network,
with empty packs if needed.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing

import torch.distributed as dist
from torch import Tensor

from bagel_ds.arguments.parse import duration_text
from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.inference.evaluate import Scores, validate
from bagel_ds.machine.device import uses_cuda
from bagel_ds.model.bagel import BagelOutput
from bagel_ds.model.batch import PackedBatch
from bagel_ds.train.prepare import Prepared
from bagel_ds.train.step import Encode
from bagel_ds.zero.engine import ZeroEngine

logger = logging.getLogger("bagel_ds")


class Evaluation:
    """The evaluations of a run; without --val_config none is due."""

    def __init__(self, config: RunConfig, prepared: Prepared, engine: ZeroEngine, encode: Encode):
        self._config, self._held_out = config, prepared.held_out
        self._timestep_shift = prepared.model.timestep_shift
        self._engine, self._encode = engine, encode

    def is_due(self, steps_done: int, is_last: bool) -> bool:
        return self._held_out is not None and (is_last or steps_done % self._config.training.val_every == 0)

    def run(self) -> Scores:
        """The scores over all ranks; call it on all of them."""
        assert self._held_out is not None
        held_out, engine, data = self._held_out, self._engine, self._config.data
        began, world = time.monotonic(), dist.get_world_size()
        batches = held_out.batches(dist.get_rank(), world, data.num_workers, data.prefetch_factor, uses_cuda())
        with closing(batches), engine.forward_only():
            shift = self._timestep_shift
            scores = validate(batches, self._forward, engine.device, held_out.datasets, shift, _over_ranks)
        seconds = duration_text(time.monotonic() - began)
        logger.info("evaluated %d rows in %d packs, which took %s", held_out.rows, len(held_out.packs), seconds)
        return scores

    def _forward(self, batch: PackedBatch) -> BagelOutput:
        output: BagelOutput = self._engine.forward(batch, self._encode(batch))
        return output


def _over_ranks(sums: Tensor) -> Tensor:
    dist.all_reduce(sums)
    return sums
