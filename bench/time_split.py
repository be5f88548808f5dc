"""Where a step's time goes, from the trace that `--profile` writes (`bagel_ds/train/metrics/profile.py`).

Guarantees: the parts of a step add up to its length, because each moment counts once; copies that a kernel hides are
only in `Copies`. Without a GPU in the trace, computing is what torch's operations take in the passes over a pack.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Iterable, NamedTuple

PASSES = ("images to latents", "forward", "backward")
UPDATE, DATA = "update", "data"
_STEP = "ProfilerStep"  # what torch's profiler names a step
_GPU_WORK = ("kernel", "gpu_memset")
_DIRECTIONS = ("HtoD", "DtoH")  # other copies stay on the GPU

Event = dict[str, Any]
Span = tuple[float, float]  # begin and end, in the trace's microseconds


class TimeSplit(NamedTuple):
    """Seconds of a step. A moment belongs to the first part that it fits."""

    compute: float  # the GPU computes
    pcie: float  # it only copies to or from host memory
    update: float  # it does nothing while weights are updated: CPU Adam
    data: float  # ... while the step waits for its pack
    idle: float  # ... and waits for the host


class Copies(NamedTuple):
    """Copies of a step in one direction, whether the GPU computes meanwhile or not."""

    seconds: float
    nbytes: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


class StepTimes(NamedTuple):
    """Means over the steps of a trace."""

    seconds: float  # of a step under the profiler, which slows the host
    split: TimeSplit
    copies: dict[str, Copies]  # by direction, HtoD and DtoH; empty without a GPU


def read_trace(path: Path) -> list[Event]:
    """The events of a `trace.json.gz` that last."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if "dur" in event]


def step_times(events: list[Event]) -> StepTimes:
    """Split the steps of a trace. Raises ValueError if it holds none."""
    steps = [_span(event) for event in _annotations(events) if event["name"].startswith(_STEP)]
    if not steps:
        raise ValueError(f"the trace holds no {_STEP}: it is not one of --profile")
    traced = [(min(begin for begin, _ in steps), max(end for _, end in steps))]
    copies = {way: [event for event in _of(events, "gpu_memcpy") if way in event["name"]] for way in _DIRECTIONS}
    left, parts = traced, []
    for spans in (_computing(events), _spans(sum(copies.values(), [])), _phases(events, UPDATE), _phases(events, DATA)):
        rest = without(left, spans)
        parts.append(length(left) - length(rest))
        left = rest
    per_step = 1e-6 / len(steps)
    return StepTimes(
        seconds=length(traced) * per_step,
        split=TimeSplit(*(part * per_step for part in (*parts, length(left)))),
        copies={
            way: Copies(length(_spans(found)) * per_step, sum(map(_nbytes, found)) / len(steps))
            for way, found in copies.items()
            if found
        },
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans in order that don't touch."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def without(spans: list[Span], removed: list[Span]) -> list[Span]:
    """What is in `spans` and not in `removed`; both are unions."""
    found, after = [], 0
    for begin, end in spans:
        while after < len(removed) and removed[after][1] <= begin:
            after += 1
        at = after
        while at < len(removed) and removed[at][0] < end:
            if begin < removed[at][0]:
                found.append((begin, removed[at][0]))
            begin = removed[at][1]
            at += 1
        if begin < end:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _computing(events: list[Event]) -> list[Span]:
    """When the GPU computes; where there is none, when torch's operations run within the passes over a pack."""
    if work := _of(events, *_GPU_WORK):
        return _spans(work)
    operations, passes = _spans(_of(events, "cpu_op")), _phases(events, *PASSES)
    return without(operations, without(operations, passes))


def _phases(events: list[Event], *names: str) -> list[Span]:
    return _spans(event for event in _annotations(events) if event["name"] in names)


def _annotations(events: list[Event]) -> list[Event]:
    return _of(events, "user_annotation")


def _of(events: list[Event], *categories: str) -> list[Event]:
    return [event for event in events if event.get("cat") in categories]


def _spans(events: Iterable[Event]) -> list[Span]:
    return union(_span(event) for event in events)


def _span(event: Event) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _nbytes(copy: Event) -> int:
    return int(copy["args"]["bytes"])
