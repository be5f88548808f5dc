"""A run's metrics: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases, plus one log line per logged step.

Guarantees: one call per logged step writes the same numbers everywhere. metrics.jsonl is valid JSON line by line and
flushed per step, also after a crash. A resumed run continues from its first step; later lines supersede earlier ones.
Steps count from 0.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bagel_ds.train.metrics.console import log_line, progress_bar
from bagel_ds.train.metrics.shown import Shown
from bagel_ds.train.metrics.wandb import WandbOptions, WandbSink

logger = logging.getLogger("bagel_ds")


class _Sink(Protocol):
    """A destination of logged numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, shown: Sequence[Shown]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """metrics.jsonl: `{"step": 3, "loss/mse": 0.4, ...}`, with null for a number that is not finite."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab+")
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Remove half a line that a killed run may have left, or the next one would join it."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            end += len(line) if line.endswith(b"\n") else 0
        self.file.truncate(end)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write((json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode())
        self.file.flush()

    def show(self, step: int, shown: Sequence[Shown]) -> None:
        """Numbers only: pictures and texts have files of their own."""

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Events under `results_dir/tensorboard`; purges those of an earlier attempt from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported here because it takes a second, and only the rank that logs needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, shown: Sequence[Shown]) -> None:
        for one in shown:
            for name, image in one.named_images():
                self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
            self.writer.add_text(one.name, "    " + one.text.replace("\n", "\n    "), step)  # verbatim, as Markdown
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MetricsLog:
    """The metrics of a run. `close` it at the end.

    `results_dir` is None on ranks that write nothing; their logger also hides the lines. `first_step` is the
    number of the first step that this process runs: 0, or the checkpoint's after a resume. With `total_steps` a
    terminal shows a progress bar over optimizer steps.
    """

    def __init__(
        self,
        results_dir: Path | str | None,
        first_step: int,
        wandb: WandbOptions | None = None,
        *,
        total_steps: int | None = None,
    ) -> None:
        self._sinks: list[_Sink] = []
        if results_dir is not None:
            folder = Path(results_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._sinks += [] if wandb is None else [WandbSink(folder, wandb)]
            self._sinks += [_JsonLines(folder / "metrics.jsonl"), _TensorBoard(folder / "tensorboard", first_step)]
        self._failing: set[int] = set()  # sinks that could not be written the last time
        self._bar = progress_bar(total_steps, first_step)
        self._total_steps = total_steps
        self._first_logged: tuple[int, float] | None = None  # step and time: the first steps are slower than the rest

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one step's numbers everywhere. None means "not measured in this step" and is left out.

        NaN and infinities are results: null in metrics.jsonl, as they are elsewhere. A full disk loses numbers, with
        one warning, but does not end the run.
        """
        known = {name: float(value) for name, value in values.items() if value is not None}
        logger.info(log_line(step, known, self._seconds_left(step, known.get("perf/step_seconds"))))
        self._write(step, lambda sink: sink.log(step, known))

    def show(self, step: int, shown: Sequence[Shown]) -> None:
        """Write pictures and texts of a step to TensorBoard and W&B."""
        if shown:
            self._write(step, lambda sink: sink.show(step, shown))

    def _write(self, step: int, write: Callable[[_Sink], None]) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                write(sink)
                self._failing.discard(number)
            except OSError as error:
                if number not in self._failing:
                    logger.warning("metrics of step %d can't be written (%s); training goes on", step, error)
                self._failing.add(number)

    def advance(self) -> None:
        """Move the progress bar by one step; call it once per optimizer step, logged or not."""
        self._bar.update(1)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._bar.close()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                sink.close()
            except OSError as error:
                logger.warning("the last metrics can't be written (%s)", error)

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """Seconds until the last step, including saves and everything else between steps; None at the end."""
        if step_seconds is None:
            return None
        now = time.monotonic()
        if self._first_logged is None:
            self._first_logged = (step, now)
        first, then = self._first_logged
        speed = (now - then) / (step - first) if step > first else step_seconds
        left = (self._total_steps or 0) - 1 - step
        return left * speed if left > 0 else None
