"""The choice between a folder's two weight files: the moving average, or the weights themselves.

Guarantees: one rule for inference and exports. The average is the default. The weights are chosen if the half-life of
the average exceeds the run, because such an average still consists mostly of the weights that the run started from.
Checkpoints record the steps and the decay in `trainer.json`, exports in the metadata of `ema.safetensors`. In other
folders they are unknown.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.model_folder.folder import EMA, MODEL, ModelFolder
from bagel_ds.model_folder.tensor_files import read_header

_STEPS, _DECAY = "training_steps", "ema_decay"  # keys of the metadata


class Averaging(NamedTuple):
    """How often an average was updated, and its decay per update."""

    steps: int
    decay: float

    @property
    def half_life(self) -> float:
        """The number of updates after which the start weights still make up half of the average."""
        if not 0 < self.decay < 1:
            return 0.0 if self.decay <= 0 else math.inf
        return math.log(0.5) / math.log(self.decay)

    def metadata(self) -> dict[str, str]:
        """Metadata for the header of an exported safetensors file."""
        return {_STEPS: str(self.steps), _DECAY: repr(self.decay)}


class Choice(NamedTuple):
    """`stem` is "ema" or "model", as in `ModelFolder.weight_files`; `why` is a clause for the log."""

    stem: str
    why: str


def average_or_weights(folder: Path) -> Choice:
    """Which weight file of a model folder, checkpoint or export to use, and why. Raises `UserError`."""
    model_folder = ModelFolder(folder)
    average, weights = model_folder.weight_files("ema"), model_folder.weight_files("model")
    if average and weights:
        return chosen(averaging_of(folder))
    if average:
        return Choice("ema", f"the folder holds no {MODEL}")
    if weights:
        return Choice("model", f"the folder holds no {EMA}")
    raise UserError(model_folder.without_weights())


def chosen(averaging: Averaging | None) -> Choice:
    """The rule for a folder that holds both files; `averaging` is None if the numbers are unknown."""
    if averaging is None:
        return Choice("ema", "the EMA is the default, and the folder does not record its steps and decay")
    numbers = f"decay {averaging.decay:g} gives it a half-life of {averaging.half_life:,.0f} steps"
    if averaging.half_life > averaging.steps:
        return Choice("model", f"the EMA is too young: {numbers}, but the run had only {averaging.steps:,}")
    return Choice("ema", f"the EMA covers the run: {numbers}, and the run had {averaging.steps:,}")


def averaging_of(folder: Path) -> Averaging | None:
    """The numbers that a checkpoint or an export records; None if there are none. Raises `UserError`."""
    trainer = folder / "trainer.json"
    if trainer.is_file():
        try:
            saved = json.loads(trainer.read_text())
            decay = saved.get("arguments", {}).get("ema")
            steps = saved["steps_done"] - saved.get("skipped_updates", 0)
            return None if decay is None else Averaging(int(steps), float(decay))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{trainer} can't be read ({type(error).__name__}: {error}), so it is unknown whether {EMA} or {MODEL} "
                f"is the better choice. Copy the checkpoint again, or remove {trainer.name} to use {EMA}."
            ) from None
    files = ModelFolder(folder).weight_files("ema")
    metadata = read_header(files[0])[0].get("__metadata__", {}) if files else {}
    if _STEPS not in metadata or _DECAY not in metadata:
        return None
    try:
        return Averaging(int(metadata[_STEPS]), float(metadata[_DECAY]))
    except ValueError:
        found = f"{_STEPS} {metadata[_STEPS]!r} and {_DECAY} {metadata[_DECAY]!r}"
        raise UserError(f"{files[0]}: its metadata holds {found}, expected numbers. Export it again.") from None
