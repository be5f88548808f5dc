"""What a run shows: log lines, TensorBoard, metrics.jsonl, a progress bar and, when asked, Weights & Biases.

Guarantees: one call per logged step reaches all of them with the same numbers under the names below; metrics.jsonl is
valid JSON line by line and flushed per step, also after a crash; a resumed run continues from its first step (later
lines supersede earlier ones). wandb is imported only when wanted, and never asks on the terminal. Steps count from 0.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlparse

from tqdm import tqdm

from bagel_ds.arguments.parse import duration_text
from bagel_ds.errors import UserError

METRIC_NAMES = (
    "loss/mse",
    "loss/ce",
    "loss/total",
    "optim/lr",
    "optim/grad_norm",
    "perf/tokens_per_sec",
    "perf/mfu",
    "perf/step_seconds",
    "memory/device_gib",
    "memory/device_reserved_gib",
    "memory/host_gib",
    "data/packing_efficiency",
    "data/imbalance",
)
# Followed by the dataset's name, loss/mse_t/ by a band of timesteps.
METRIC_PREFIXES = ("loss/mse/", "loss/ce/", "loss/mse_t/", "data/epoch/", "data/skipped/")

# What a log line shows after the three fields of the original, in this order.
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
)

logger = logging.getLogger("bagel_ds")


class _ConsoleHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr)


class _Formatter(logging.Formatter):
    """`[2026-01-25 10:00:00] message`, with the level named from WARNING up and the rank where there is one."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        text = f"[{self.formatTime(record, self.datefmt)}] {self.prefix}{level}{record.getMessage()}"
        return text if record.exc_info is None else text + "\n" + self.formatException(record.exc_info)


def setup_logging(results_dir: Path | str | None, rank: int) -> logging.Logger:
    """Configure the logger "bagel_ds" of this process and return it; calling it again replaces what it set up before.

    Rank 0 writes INFO and up to the console and appends to `results_dir/log.txt` (None: not yet). Every other rank only
    shows warnings, on the console, with its rank in front. Raises UserError when `results_dir` can't be written.
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

    The last of these is when the run will be done at its speed so far, where `seconds_left` tells.
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


@dataclass(frozen=True)
class WandbOptions:
    """The wandb_* arguments of a run that wants W&B; `config` is shown as the run's configuration."""

    project: str = "bagel"
    name: str = "run"
    run_id: str = "0"
    resume: str = "allow"
    offline: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def _has_wandb_key() -> bool:
    """Whether wandb will find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in files if name):
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def check_wandb(options: WandbOptions) -> None:
    """Raise UserError when W&B is wanted but can't work; cheap, so that it can run before anything is loaded."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError(
            "Weights & Biases is wanted (--enable_wandb, --wandb_project or --wandb_name) but the package wandb is not "
            "installed; run `pip install wandb` or pass --enable_wandb False"
        ) from None
    offline = options.offline or os.environ.get("WANDB_MODE") in ("offline", "disabled")
    if not offline and not _has_wandb_key():
        raise UserError(
            "Weights & Biases is wanted but no API key was found in WANDB_API_KEY or ~/.netrc; set WANDB_API_KEY, "
            "or pass --wandb_offline True or --enable_wandb False"
        )


class _Sink(Protocol):
    """One place that logged numbers go to."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """metrics.jsonl: `{"step": 3, "loss/mse": 0.4, ...}`; a number that is not finite is null there."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab+")
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """A killed run may have left half a line; without this the next one would be glued to it."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            end += len(line) if line.endswith(b"\n") else 0
        self.file.truncate(end)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write((json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Scalars under `results_dir/tensorboard`; points of an earlier attempt from `first_step` on are purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # Takes a second and needs the package: only the rank that logs pays.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A W&B run whose id is that of the original's trainer, so that a resumed run continues it."""

    def __init__(self, results_dir: Path, options: WandbOptions) -> None:
        check_wandb(options)
        import wandb

        mode = "offline" if options.offline else os.environ.get("WANDB_MODE", "online")
        try:
            self.run = wandb.init(
                project=options.project,
                name=options.name,
                id=f"{options.name}-run{options.run_id}",
                resume=options.resume,
                mode=mode,
                dir=str(results_dir),
                config=dict(options.config),
            )
        except wandb.Error as fault:
            raise UserError(
                f"Weights & Biases could not start project {options.project!r}: {fault}; check the key and the "
                "network, or pass --wandb_offline True or --enable_wandb False"
            ) from None
        # wandb's own step counter refuses to go back, which a resumed run does.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class _Bar(Protocol):
    """What of a progress bar the log uses."""

    def update(self, n: float = 1) -> Any: ...

    def close(self) -> None: ...


class _BarInLines:
    """A progress bar where nothing can be redrawn (a file, a pipe): whole lines, at most one per EVERY seconds."""

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
        """Nothing is left on the screen."""


def _progress_bar(total: int | None, initial: int) -> _Bar:
    """A bar belongs on a terminal; BAGEL_DS_PROGRESS=1 shows one elsewhere too, in lines, and 0 shows none."""
    wish = os.environ.get("BAGEL_DS_PROGRESS")
    terminal = sys.stderr.isatty()
    if total is not None and wish == "1" and not terminal:
        return _BarInLines(total, initial)
    hidden = total is None or wish == "0" or not terminal
    return tqdm(total=total, initial=initial, unit="step", desc="train", disable=hidden, dynamic_ncols=True)


class MetricsLog:
    """Rank 0's log of a run; a context manager.

    `first_step` is the number of the first step this process will run (0, or the checkpoint's after a resume).
    With `total_steps` a progress bar over optimizer steps is shown where there is a terminal.
    """

    def __init__(
        self,
        results_dir: Path | str,
        first_step: int,
        wandb: WandbOptions | None = None,
        *,
        total_steps: int | None = None,
    ) -> None:
        folder = Path(results_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_Sink] = [] if wandb is None else [_Wandb(folder, wandb)]
        self._sinks += [_JsonLines(folder / "metrics.jsonl"), _TensorBoard(folder / "tensorboard", first_step)]
        self._failing: set[int] = set()  # sinks that could not be written the last time
        self._bar = _progress_bar(total_steps, first_step)
        self._total_steps = total_steps
        self._first_logged: tuple[int, float] | None = None  # step and time: the first steps are slower than the rest

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one step's numbers everywhere. None means "not measured in this step" and is left out.

        NaN and infinities are real results: null in metrics.jsonl, themselves elsewhere. A disk that is full costs
        numbers, told once, and not the run.
        """
        known = {name: float(value) for name, value in values.items() if value is not None}
        logger.info(log_line(step, known, self._seconds_left(step, known.get("perf/step_seconds"))))
        for number, sink in enumerate(self._sinks):
            try:
                sink.log(step, known)
                self._failing.discard(number)
            except OSError as error:
                if number not in self._failing:
                    logger.warning("metrics of step %d can't be written (%s); training goes on", step, error)
                self._failing.add(number)

    def _seconds_left(self, step: int, step_seconds: float | None) -> float | None:
        """Until the last step, saves and all that comes between steps included; None at the end."""
        if step_seconds is None:
            return None
        now = time.monotonic()
        if self._first_logged is None:
            self._first_logged = (step, now)
        first, then = self._first_logged
        speed = (now - then) / (step - first) if step > first else step_seconds
        left = (self._total_steps or 0) - 1 - step
        return left * speed if left > 0 else None

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar; call it once per optimizer step, logged or not."""
        self._bar.update(steps)

    def note(self, line: str) -> None:
        """A line for people: console and log.txt."""
        logger.info(line)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._bar.close()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                sink.close()
            except OSError as error:
                logger.warning("the last metrics can't be written (%s)", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SilentMetricsLog:
    """The same verbs on the ranks that don't log, so that the training loop needs no branch."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def note(self, line: str) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
