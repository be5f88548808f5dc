"""A profile of a few steps on the first rank: a trace of every operation, and a table of where a step goes.

Guarantees: without `--profile` nothing of torch's profiler is imported or runs. The profiled steps follow the first
ones, in which memory is taken and kernels are chosen. On a GPU a phase has two times: the host's, in which it queues
work, and the GPU's, in which that work runs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bagel_ds.machine.device import uses_cuda

logger = logging.getLogger("bagel_ds")

SKIPPED = 3  # steps before; the last of them already runs under the profiler, which takes time to start
PHASES = ("data", "images to latents", "forward", "backward", "update")
LAYER = "decoder layer"  # also when it is computed again in the backward phase
_ROWS = 40  # of the table of operations
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def phase_of_step(name: str) -> AbstractContextManager[Any]:
    """Around one of `PHASES`, for the table; costs nothing unless a profile is being made."""
    return torch.autograd.profiler.record_function(name) if StepProfile.active else nullcontext()


class StepProfile:
    """Call `step` after each step, and `close` at the end of the run."""

    active = False

    def __init__(self, folder: Path, steps: int, layers: Iterable[nn.Module] = ()):
        """Profile so many steps, and write `trace.json.gz` and `table.txt` into `folder`.

        `layers` are the decoder layers, whose calls get the name `LAYER`.
        """
        from torch.profiler import ProfilerActivity, profile, schedule

        self._folder, self._steps, self._written = folder, steps, False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda() else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._marks: list[RemovableHandle] = [mark for layer in layers for mark in _marked(layer)]
        self._profiler.start()
        StepProfile.active = True

    def step(self, _: object) -> None:
        if not self._written:
            self._profiler.step()

    def close(self) -> None:
        self._stop_marking()
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
        self._stop_marking()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        on_gpu = uses_cuda()
        rows = _rows(profiler.events(), self._steps, on_gpu)
        averages = profiler.key_averages()
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        lines = [f"{self._steps} steps of rank 0, per step; milliseconds", "", *rows, ""]
        lines += [averages.table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)]
        (self._folder / "table.txt").write_text("\n".join(lines) + "\n")
        logger.info("profile: %s (open it in https://ui.perfetto.dev) and %s", trace, self._folder / "table.txt")
        for row in rows:
            logger.info("profile: %s", row)

    def _stop_marking(self) -> None:
        StepProfile.active = False
        for mark in self._marks:
            mark.remove()


def _rows(events: Sequence[Any], steps: int, on_gpu: bool) -> list[str]:
    """The table of phases, and what a decoder layer has the host do."""
    host = [event for event in events if "CUDA" not in str(event.device_type)]
    begun = sorted(event.time_range.start for event in host if _is_counted(event, on_gpu))
    counted = "kernel launches" if on_gpu else "operations"
    rows = [f"{'':20}{'host':>10}{'GPU':>10}{counted:>18}" if on_gpu else f"{'':20}{'host':>10}{counted:>18}"]
    together = (0.0, 0.0, 0.0)
    for name in PHASES:
        calls = [event.time_range for event in host if event.name == name]
        on_device = [event.time_range for event in events if event.name == name and "CUDA" in str(event.device_type)]
        numbers = (_milliseconds(calls) / steps, _milliseconds(on_device) / steps, _within(begun, calls) / steps)
        together = (together[0] + numbers[0], together[1] + numbers[1], together[2] + numbers[2])
        rows.append(_row(name, *numbers, on_gpu))
    rows.append(_row("together", *together, on_gpu))
    layers = [event.time_range for event in host if event.name == LAYER]
    if layers:
        rows.append(f"{counted} of a call of a {LAYER}: {_within(begun, layers) / len(layers):.0f}")
    return rows


def _row(name: str, host: float, device: float, count: float, on_gpu: bool) -> str:
    return f"{name:20}{host:10.1f}{f'{device:10.1f}' if on_gpu else ''}{count:18.0f}"


def _is_counted(event: Any, on_gpu: bool) -> bool:
    """A launch or, without a GPU, an operation that is not part of another."""
    if on_gpu:
        return event.name in _LAUNCHES
    parent = event.cpu_parent
    return event.name.startswith("aten::") and (parent is None or not parent.name.startswith("aten::"))


def _milliseconds(ranges: Iterable[Any]) -> float:
    return sum(each.end - each.start for each in ranges) / 1e3


def _within(sorted_times: Sequence[float], ranges: Iterable[Any]) -> int:
    """How many of the times lie in one of the ranges, which don't overlap."""
    return sum(bisect_right(sorted_times, each.end) - bisect_left(sorted_times, each.start) for each in ranges)


def _marked(layer: nn.Module) -> list[RemovableHandle]:
    """Hooks that name each call of a layer; recomputation may end one with an exception."""
    open_marks: list[Any] = []

    def begin(*_: Any) -> None:
        mark = torch.autograd.profiler.record_function(LAYER)
        mark.__enter__()
        open_marks.append(mark)

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    return [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)]
