"""Which parameters ZeRO-3 holds whole in each phase of a step: a replay of DeepSpeed's fetch, prefetch and release.

Guarantees: plain integers; follows partitioned_param_coordinator.py of DeepSpeed 0.19.8 from the second step on, when
its trace is complete. A parameter is kept after use if it is used again within `stage3_max_reuse_distance` elements,
or if the prefetcher is already past that next use. Parameters gathered together exist twice while they are copied out
of the flat buffer in which they arrived.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache

from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import Call, ParameterSize, parameter_sizes, step_calls
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.zero.config.settings import Gathering

PHASES = ("vit", "embedding", "layer", "head")


@dataclass(frozen=True)
class Gathered:
    """Bytes of one micro-batch."""

    peak: dict[str, int]  # by phase: most that is held whole at once
    with_copies: dict[str, int]  # by phase: the same, including the flat buffers from which they are copied
    reductions: dict[str, frozenset[tuple[int, int]]]  # by phase: (held whole, elements reduced) of each reduction
    persistent: int  # always held whole
    total: int  # gathered over the whole micro-batch; counted each time

    @property
    def largest(self) -> int:
        return max(self.with_copies.values())


@lru_cache(maxsize=64)
def gathered(
    config: BagelConfig, freezing: Freezing, recompute: bool, options: Gathering, weight_bytes: int
) -> Gathered:
    """Replay one micro-batch of this network under ZeRO-3, with `weight_bytes` per element of its weights."""
    parameters = parameter_sizes(config, freezing)
    persistent = sum(
        p.element_bytes(weight_bytes) * p.numel for p in parameters if p.numel <= options.param_persistence_threshold
    )
    replay = _Replay(parameters, step_calls(config, freezing, recompute), options, weight_bytes)
    replay.run()
    reductions = {phase: frozenset(found) for phase, found in replay.reductions.items()}
    return Gathered(replay.peak, replay.with_copies, reductions, persistent, replay.total)


class _Replay:
    """DeepSpeed's limits count elements, memory counts bytes: both are kept."""

    def __init__(
        self, parameters: tuple[ParameterSize, ...], calls: tuple[Call, ...], options: Gathering, weight_bytes: int
    ):
        self._sizes = sizes = [parameter.numel for parameter in parameters]
        self._bytes = [parameter.element_bytes(weight_bytes) * parameter.numel for parameter in parameters]
        self._trains = [parameter.trains for parameter in parameters]
        self._calls, self._options = calls, options
        self._persists = [size <= options.param_persistence_threshold for size in sizes]
        self._numel_before = [0]  # elements used by all calls before this one
        for call in calls:
            self._numel_before.append(self._numel_before[-1] + sum(sizes[index] for index in call.parameters))
        self._next_use = self._find_next_uses()
        self._queue = deque((index, step) for step, call in enumerate(calls) for index in call.parameters)
        self._fetched_for: dict[int, int] = defaultdict(lambda: -1)
        self._live: dict[int, int] = {}  # parameter -> the gather that brought it
        self._waiting: dict[int, int] = {}  # gather -> its bytes, until its flat buffer has been copied out
        self._now = 0  # elements held whole
        self._held = self.total = 0  # bytes
        self.peak: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.with_copies = dict(self.peak)
        self._bucket = 0  # elements of gradients waiting to be reduced
        self.reductions: dict[str, set[tuple[int, int]]] = {phase: set() for phase in PHASES}

    def run(self) -> None:
        for step, call in enumerate(self._calls):
            self._fetch([index for index in call.parameters if index not in self._live], 2 * step)
            self._wait(call, 2 * step)
            self._prefetch(call, step)
            self._note(call.phase)
            if call.backward:
                self._reduce(call)
            self._release(call, step)
        self.reductions[self._calls[-1].phase].add((self._held, self._bucket))

    def _find_next_uses(self) -> list[dict[int, int]]:
        """For each call and each of its parameters: the next call that uses it."""
        following: dict[int, int] = {}
        found: list[dict[int, int]] = []
        for step in range(len(self._calls) - 1, -1, -1):
            found.append({index: following[index] for index in self._calls[step].parameters if index in following})
            for index in self._calls[step].parameters:
                following[index] = step
        return found[::-1]

    def _fetch(self, wanted: list[int], gather: int) -> None:
        fetched = [index for index in wanted if not self._persists[index]]
        for index in fetched:
            self._live[index] = gather
            self._now += self._sizes[index]
        if size := sum(self._bytes[index] for index in fetched):
            self._held += size
            self.total += size
            self._waiting[gather] = size if len(wanted) > 1 else 0

    def _wait(self, call: Call, gather: int) -> None:
        """Copy the gathers that bring this call's parameters out of their flat buffers."""
        for index in call.parameters:
            came_with = self._live.get(index)
            copied = self._waiting.pop(came_with, 0) if came_with is not None else 0
            if copied:
                self._note(call.phase, copied)

    def _prefetch(self, call: Call, step: int) -> None:
        fresh = {index for index in call.parameters if self._fetched_for[index] < step}
        while self._queue and fresh:
            index, at = self._queue.popleft()
            self._fetched_for[index] = max(self._fetched_for[index], at)
            fresh.discard(index)
        limit = min(self._options.max_live_parameters - self._now, self._options.prefetch_bucket_size)
        wanted: list[int] = []
        numel = 0
        while self._queue and numel < limit:
            index, at = self._queue.popleft()
            self._fetched_for[index] = max(self._fetched_for[index], at)
            if index not in self._live and index not in wanted and not self._persists[index]:
                wanted.append(index)
                numel += self._sizes[index]
        self._fetch(wanted, 2 * step + 1)

    def _reduce(self, call: Call) -> None:
        """Add the call's gradients to the bucket; reduce the bucket when the next gradient does not fit."""
        for index in call.parameters:
            if not self._trains[index]:
                continue
            if self._bucket and self._bucket + self._sizes[index] > self._options.reduce_bucket_size:
                self.reductions[call.phase].add((self._held, self._bucket))
                self._bucket = 0
            self._bucket += self._sizes[index]

    def _release(self, call: Call, step: int) -> None:
        for index in call.parameters:
            if index not in self._live or self._fetched_for[index] > step:
                continue
            following = self._next_use[step].get(index)
            traversed = None if following is None else self._numel_before[following] - self._numel_before[step + 1]
            if traversed is None or traversed >= self._options.max_reuse_distance:
                del self._live[index]
                self._now -= self._sizes[index]
                self._held -= self._bytes[index]

    def _note(self, phase: str, copies: int = 0) -> None:
        self.peak[phase] = max(self.peak[phase], self._held)
        self.with_copies[phase] = max(self.with_copies[phase], self._held + copies)
