"""What stops a run from going wrong quietly: updates that are not finite.

Guarantees: an update with a loss or gradient that is not finite is skipped on all ranks (DeepSpeed sees the norm of
all), counted, and its packs are written for replay; past `limit` the run ends with an error that names the samples.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Sequence

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.model.batch import PackedBatch
from bagel_ds.train.ranks.agreement import everyone, together
from bagel_ds.train.step import StepResult

logger = logging.getLogger("bagel_ds")

FOLDER = "nonfinite"


class NonFiniteGuard:
    """Counts skipped updates of this process; `limit` of them are allowed."""

    def __init__(self, results_dir: Path, rank: int, limit: int):
        self._folder, self._rank, self._limit = results_dir / FOLDER, rank, limit
        self.skipped = 0

    def check(self, step: int, window: Sequence[PackedBatch], result: StepResult) -> None:
        """Call after every step, on every rank. Raises `UserError` past the limit."""
        if result.applied:
            return
        self.skipped += 1
        self._keep(step, window)
        samples = [name for names in everyone([name for batch in window for name in batch.samples]) for name in names]
        logger.warning(
            "step %d skipped: loss %s, gradient norm %s. Its packs are in %s (%d of --max_nonfinite %d)",
            step,
            result.total,
            result.grad_norm,
            self._folder,
            self.skipped,
            self._limit,
        )

        def stop_past_limit() -> None:
            if self.skipped > self._limit:
                raise UserError(
                    f"{self.skipped} updates were not finite, more than --max_nonfinite {self._limit}. The last one "
                    f"(step {step}) held: {'; '.join(samples)}. Its packs are in {self._folder}: "
                    "look at them with `bagel-ds inspect --pack`, lower --lr, or take these rows out."
                )

        together(stop_past_limit)

    def _keep(self, step: int, window: Sequence[PackedBatch]) -> None:
        try:
            for number, batch in enumerate(window):
                save_batch(self._folder / f"step_{step}_rank_{self._rank}_pack_{number}", batch)
        except (OSError, SafetensorError) as error:
            logger.warning("the packs of step %d can't be kept in %s: %s", step, self._folder, error)


def save_batch(stem: Path, batch: PackedBatch) -> None:
    """Write a pack as <stem>.safetensors (tensors) and <stem>.json (the rest)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, object] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.cpu().contiguous()
        elif field.name == "images":
            # An image that is read and drawn is one tensor twice, which the file format refuses.
            tensors |= {f"images.{number}": image.cpu().clone() for number, image in enumerate(value)}
        else:
            rest[field.name] = value
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(rest, indent=1))


def load_batch(stem: Path) -> PackedBatch:
    """What `save_batch` wrote."""
    tensors: dict[str, Any] = load_file(stem.with_suffix(".safetensors"))
    described = json.loads(stem.with_suffix(".json").read_text())
    rest: dict[str, Any] = {name: _tuples(value) for name, value in described.items()}
    images = tuple(tensors.pop(f"images.{n}") for n in range(sum(name.startswith("images.") for name in tensors)))
    return PackedBatch(**tensors, **rest, images=images)


def _tuples(value: object) -> object:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
