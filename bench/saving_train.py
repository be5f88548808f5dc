"""launch/train.py whose saves overlap training in turn and not; started by bench/saving.py.

Guarantees: the run itself is the trainer's, but that the first, third, ... save is finished at once; lines
"STEP <number> <seconds>" of rank 0 say how long the work of a step took, without what it waited for a save.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

import bagel_ds.train.trainer as trainer_module  # noqa: E402
from bagel_ds.train.main import main  # noqa: E402
from bagel_ds.train.ranks.agreement import is_main  # noqa: E402
from bagel_ds.train.saves.overlap import Saving  # noqa: E402


class EverySecondOverlaps(Saving):
    count = 0
    waited = 0.0

    def save(self, *arguments: Any) -> None:
        super().save(*arguments)
        self.count += 1
        if self.count % 2:
            super().finish()

    def finish(self, must: bool = False) -> None:
        began = time.monotonic()
        super().finish(must)
        self.waited = time.monotonic() - began


class TimedTrainer(trainer_module.Trainer):
    saving: EverySecondOverlaps

    def _start_saving(self, *arguments: Any) -> Saving:
        self.saving = super()._start_saving(*arguments)  # type: ignore[assignment]
        return self.saving

    def _step(self, step: int, *arguments: Any) -> Any:
        began = time.monotonic()
        result = super()._step(step, *arguments)
        if is_main():
            print(f"STEP {step} {time.monotonic() - began - self.saving.waited:.3f}", flush=True)
        return result


if __name__ == "__main__":
    trainer_module.Saving = EverySecondOverlaps  # type: ignore[misc]
    trainer_module.Trainer = TimedTrainer  # type: ignore[misc]
    sys.exit(main())
