"""A run's saves, which overlap with training: begun after a step, finished before the next update.

Guarantees: the next step's data, forward and backward passes run while a save is written, and no update changes what is
being saved. One log line says what a save cost. A save that fails costs only itself if training can go on.
"""

from __future__ import annotations

import logging
from typing import Any

from bagel_ds.train.process.stall import StallWatch
from bagel_ds.train.ranks.agreement import is_main
from bagel_ds.train.saves.save import Save, SaveFault, SaveOptions
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine

logger = logging.getLogger("bagel_ds")


class OverlappedSaves:
    """The saves of one run, one at a time. Make every call on every rank."""

    def __init__(
        self, options: SaveOptions, engine: ZeroEngine, ema: ShardedEMA | None, watch: StallWatch, save_every: int
    ):
        self._options, self._engine, self._ema = options, engine, ema
        self._watch, self._save_every = watch, save_every
        self._pending: Save | None = None
        if engine.states_move is not None:
            logger.info("saves overlap less: they read the states before training goes on (%s)", engine.states_move)

    def begin(self, step: int, trainer: dict[str, Any], last: bool) -> None:
        """Start saving step_<step>; `finish` completes it. A failure is a warning."""
        try:
            self._begin(step, trainer, last)
        except SaveFault as fault:
            self._go_on(fault)

    def finish(self) -> None:
        """Complete the save that was begun, if any. Call before anything changes the states."""
        try:
            self._complete()
        except SaveFault as fault:
            self._go_on(fault)

    def save_now(self, step: int, trainer: dict[str, Any], last: bool) -> None:
        """Save step_<step> completely. Raises `SaveFault`."""
        self._begin(step, trainer, last)
        self._complete()

    def close(self) -> None:
        """Give up an unfinished save; the next start removes its folder."""
        if self._pending is not None:
            self._pending.give_up()

    def _begin(self, step: int, trainer: dict[str, Any], last: bool) -> None:
        assert self._pending is None, "an update without `finish` before it"
        save = Save(self._options, self._engine, self._ema, step, last)
        save.begin(trainer)
        self._pending = save

    def _complete(self) -> None:
        save, self._pending = self._pending, None
        if save is not None:
            with self._watch.within("save"):
                saved = save.finish()
            logger.info(
                "saved %s in %.1f s; training waited %.1f s", saved.folder, saved.seconds, saved.training_waited
            )

    def _go_on(self, fault: SaveFault) -> None:
        if is_main():
            logger.warning("%s Training goes on; the next attempt is in %d steps.", fault, self._save_every)
