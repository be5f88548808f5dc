"""When a run's saves begin and end: begun after a step, finished before the next update.

Guarantees: masters, moments, average and frozen weights stay as they are from the beginning of a save to its end, while
the next step's data, forward and backward passes run; what a save cost is told in one line; one that fails costs no
more than itself where training can go on.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

from bagel_ds.train.process.stall import StallWatch
from bagel_ds.train.ranks.agreement import is_main
from bagel_ds.train.saves.writer import CheckpointWriter, PendingSave, SaveFault
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine

logger = logging.getLogger("bagel_ds")


class Saving:
    """The saves of one run, one at a time; every call on every rank."""

    def __init__(
        self,
        writer: CheckpointWriter,
        engine: ZeroEngine,
        ema: ShardedEMA | None,
        watch: StallWatch,
        note: Callable[[str], None],
        save_every: int,
    ):
        self._writer, self._engine, self._ema = writer, engine, ema
        self._watch, self._note, self._save_every = watch, note, save_every
        self._pending: PendingSave | None = None
        if engine.states_move is not None and is_main():
            logger.info("saves read the states before training goes on, and overlap it less: %s", engine.states_move)
        if not writer.one_host and is_main():
            logger.info("saves gather the weights before training goes on, and overlap it less: ranks on several hosts")

    def save(self, step: int, trainer: dict[str, Any], last: bool, must: bool) -> None:
        """Begin to save step_<step>, which `finish` ends; with `must` end it at once. Raises `SaveFault` then."""
        assert self._pending is None, "an update without `finish` before it"
        try:
            self._pending = self._writer.begin(step, self._engine, self._ema, trainer, last)
        except SaveFault as fault:
            self._go_on(fault, must)
        if must:
            self.finish(must)

    def finish(self, must: bool = False) -> None:
        """Call before anything changes what is being saved; returns once the checkpoint is complete, or failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with self._watch.within("save"):
                saved = pending.finish()
        except SaveFault as fault:
            self._go_on(fault, must)
            return
        held = f"{saved.seconds:.1f} s, {saved.without_training:.1f} s of them without training"
        self._note(f"saved {saved.folder} in {held}")

    def close(self) -> None:
        """Give up what is not finished: its folder is swept at the next start."""
        if self._pending is not None:
            self._pending.give_up()

    def _go_on(self, fault: SaveFault, must: bool) -> None:
        if must:
            raise fault
        if is_main():
            logger.warning("%s Training goes on; the next try is in %d steps.", fault, self._save_every)
