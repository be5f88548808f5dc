"""What makes batches in the workers of faulty_train.py, in a module that they can import."""

from __future__ import annotations

import json
import os

from bagel_ds.data.batches.materialize import BatchMaker, PackTask
from bagel_ds.model.batch import PackedBatch
from tests.distributed.faulty_train import FAULTS, _happen


class FaultyMaker(BatchMaker):
    """Meets the faults at "worker"."""

    def __call__(self, task: PackTask) -> PackedBatch:
        _happen(json.loads(os.environ[FAULTS]), "worker")
        return super().__call__(task)
