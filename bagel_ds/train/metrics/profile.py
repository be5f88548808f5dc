"""A profile of a few steps on the first rank: a trace of every operation, and a table of where a step goes.

Guarantees: without `--profile` nothing of torch's profiler is imported or runs. The profiled steps follow the first
ones, in which memory is taken and kernels are chosen.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bagel_ds.machine.device import uses_cuda

logger = logging.getLogger("bagel_ds")

SKIPPED = 3  # steps before; the last of them already runs under the profiler, which takes time to start
PHASES = ("data", "images to latents", "forward", "backward", "update")
_ROWS = 40  # of the table of operations
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def phase_of_step(name: str) -> AbstractContextManager[Any]:
    """Around one of `PHASES`, for the table; costs nothing unless a profile is being made."""
    return torch.autograd.profiler.record_function(name) if StepProfile.active else nullcontext()


class StepProfile:
    """Call `step` after each step, and `close` at the end of the run."""

    active = False

    def __init__(self, folder: Path, steps: int):
        """Profile so many steps, and write `trace.json.gz` and `table.txt` into `folder`."""
        from torch.profiler import ProfilerActivity, profile, schedule

        self._folder, self._steps, self._written = folder, steps, False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda() else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()
        StepProfile.active = True

    def step(self, _: object) -> None:
        if not self._written:
            self._profiler.step()

    def close(self) -> None:
        StepProfile.active = False
        if not self._written:
            self._written = True  # what `stop` would write is less than was asked for
            self._profiler.stop()
            logger.warning(
                "--profile %d: nothing was written, because the run ended before %d steps; set --total_steps higher",
                self._steps,
                SKIPPED + self._steps,
            )

    def _write(self, profiler: Any) -> None:
        if self._written:
            return
        self._written = True
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        averages = profiler.key_averages()
        on_gpu = uses_cuda()
        lines = [f"{self._steps} steps of rank 0, milliseconds per step", ""]
        total = 0.0
        for name in PHASES:
            found = [event for event in averages if event.key == name and "CUDA" not in str(event.device_type)]
            milliseconds = sum(event.cpu_time_total for event in found) / 1e3 / self._steps
            total += milliseconds
            lines.append(f"{name:20} {milliseconds:10.1f}")
        lines.append(f"{'together':20} {total:10.1f}")
        if on_gpu:
            launches = sum(event.count for event in averages if event.key in _LAUNCHES)
            lines.append(f"kernel launches per step: {launches / self._steps:.0f}")
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        lines += ["", averages.table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)]
        (self._folder / "table.txt").write_text("\n".join(lines) + "\n")
        logger.info("profile: %s (open it in https://ui.perfetto.dev) and %s", trace, self._folder / "table.txt")
        for line in lines[2 : 3 + len(PHASES)]:
            logger.info("profile: %s", line)
