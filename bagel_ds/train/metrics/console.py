"""What a run prints: log lines on the console and in log.txt, and a progress bar.

Guarantees: rank 0 logs everything, other ranks only warnings with their rank in front. Log lines appear above a running
progress bar, not through it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from bagel_ds.arguments.parse import duration_text
from bagel_ds.errors import UserError

# The fields of a log line after the three of the original, in this order.
_LINE_FIELDS = (
    ("loss/total", "Loss: {:.4f}"),
    ("optim/lr", "LR: {:.3e}"),
    ("optim/grad_norm", "Grad Norm: {:.3f}"),
    ("perf/tokens_per_sec", "Tokens/Sec: {:.0f}"),
    ("perf/mfu", "MFU: {:.3f}"),
    ("memory/device_gib", "Device GiB: {:.2f}"),
    ("memory/device_reserved_gib", "Reserved GiB: {:.2f}"),
    ("memory/host_gib", "Host GiB: {:.2f}"),
    ("data/packing_efficiency", "Packing: {:.3f}"),
    ("data/imbalance", "Imbalance: {:.3f}"),
    ("perf/data_wait", "Data Wait: {:.3f}"),
    ("val/mse", "Val mse: {:.4f}"),
    ("val/ce", "Val ce: {:.4f}"),
)

logger = logging.getLogger("bagel_ds")


class _ConsoleHandler(logging.Handler):
    """Prints above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr)


class _Formatter(logging.Formatter):
    """`[2026-01-25 10:00:00] message`, with the level from WARNING up and the rank if given."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        text = f"[{self.formatTime(record, self.datefmt)}] {self.prefix}{level}{record.getMessage()}"
        return text if record.exc_info is None else text + "\n" + self.formatException(record.exc_info)


def setup_logging(results_dir: Path | str | None, rank: int) -> logging.Logger:
    """Configure and return the logger "bagel_ds" of this process; a second call replaces the first's settings.

    Rank 0 writes INFO and up to the console and appends to `results_dir/log.txt` (None: no file yet). Every other rank
    shows only warnings, on the console, with its rank in front. Raises UserError if `results_dir` can't be written.
    """
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if rank == 0 and results_dir is not None:
        try:
            folder = Path(results_dir)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "log.txt"
            handlers.append(logging.FileHandler(file, mode="a", encoding="utf-8", errors="backslashreplace"))
        except OSError as fault:
            reason = fault.strerror or fault
            raise UserError(
                f"--results_dir {results_dir} can't be written: {reason}; pass a folder you may write"
            ) from None
    for handler in handlers:
        handler.setFormatter(_Formatter("" if rank == 0 else f"[rank {rank}] "))
        logger.addHandler(handler)
    return logger


def log_line(step: int, values: Mapping[str, float], seconds_left: float | None = None) -> str:
    """The original's `(step=0000000) Train Loss mse: 0.4063, ..., Train Steps/Sec: 0.01, `, then further fields.

    The last field is the time left, if `seconds_left` is known.
    """
    parts = [f"Train Loss {kind}: {values[f'loss/{kind}']:.4f}" for kind in ("mse", "ce") if f"loss/{kind}" in values]
    seconds = values.get("perf/step_seconds")
    if seconds is not None:
        parts.append(f"Train Steps/Sec: {1 / seconds if seconds > 0 else math.inf:.2f}")
    parts += [text.format(values[name]) for name, text in _LINE_FIELDS if name in values]
    skipped = sum(int(value) for name, value in values.items() if name.startswith("data/skipped/"))
    if skipped:
        parts.append(f"Rows Skipped: {skipped}")
    if seconds_left is not None:
        parts.append(f"ETA: {duration_text(seconds_left)}")
    return f"(step={step:07d}) " + "".join(part + ", " for part in parts)


class _BarInLines:
    """A progress bar for a file or a pipe: whole lines, at most one per EVERY seconds."""

    EVERY = 5.0

    def __init__(self, total: int, initial: int) -> None:
        self.total, self.initial, self.done = total, initial, initial
        self.began = time.monotonic()
        self.shown = self.began

    def update(self, n: float = 1) -> None:
        self.done += int(n)
        now = time.monotonic()
        if self.done >= self.total or now - self.shown >= self.EVERY:
            self.shown = now
            elapsed = now - self.began
            text = tqdm.format_meter(
                self.done, self.total, elapsed, initial=self.initial, ncols=80, prefix="train", unit="step"
            )
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: no bar is left on the screen."""


def progress_bar(total: int | None, initial: int) -> tqdm | _BarInLines:
    """A bar on a terminal. BAGEL_DS_PROGRESS=1 shows one elsewhere too, in whole lines; 0 shows none."""
    wish = os.environ.get("BAGEL_DS_PROGRESS")
    terminal = sys.stderr.isatty()
    if total is not None and wish == "1" and not terminal:
        return _BarInLines(total, initial)
    hidden = total is None or wish == "0" or not terminal
    return tqdm(total=total, initial=initial, unit="step", desc="train", disable=hidden, dynamic_ncols=True)
