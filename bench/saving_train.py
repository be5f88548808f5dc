"""launch/train.py whose saves overlap training in turn and not; started by bench/saving.py.

Guarantees: the run itself is the trainer's, but that the first, third, ... save is finished at once; lines
"STEP <number> <seconds>" of rank 0 say how long the work of a step took, without what it waited for a save. With
BAGEL_BENCH_HOSTS=several its ranks take themselves for ranks of several hosts.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import bagel_ds.train.trainer as trainer_module  # noqa: E402
from bagel_ds.train.main import main  # noqa: E402
from bagel_ds.train.ranks.agreement import is_main  # noqa: E402
from bagel_ds.train.saves.overlap import OverlappedSaves  # noqa: E402


class EverySecondOverlaps(OverlappedSaves):
    count = 0
    waited = 0.0

    def begin(self, *arguments: Any) -> None:
        super().begin(*arguments)
        self.count += 1
        if self.count % 2:
            super().finish()

    def finish(self) -> None:
        began = time.monotonic()
        super().finish()
        self.waited = time.monotonic() - began


class TimedTrainer(trainer_module.Trainer):
    saving: EverySecondOverlaps

    def _start_saving(self) -> OverlappedSaves:
        self.saving = super()._start_saving()
        return self.saving

    def _step(self, step: int, *arguments: Any) -> Any:
        began = time.monotonic()
        result = super()._step(step, *arguments)
        if is_main():
            print(f"STEP {step} {time.monotonic() - began - self.saving.waited:.3f}", flush=True)
        return result


if __name__ == "__main__":
    trainer_module.OverlappedSaves = EverySecondOverlaps  # type: ignore[misc]
    if os.environ.get("BAGEL_BENCH_HOSTS") == "several":
        trainer_module.on_one_host = lambda: False
    trainer_module.Trainer = TimedTrainer  # type: ignore[misc]
    sys.exit(main())
