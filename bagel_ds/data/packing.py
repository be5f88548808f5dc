"""Look-ahead packing: which samples of a window share a sequence.

Guarantees: a pack never exceeds the limit; a sample that enters the window leaves it in exactly one pack, at the
latest 2 * (window size + mandatory groups) packs later (every second pack begins with the oldest sample, the others
with the longest, which is the hardest to place); each pack holds a sample of every mandatory group unless its first
sample leaves no room for one that is there. Choices are made with integers, or with element-wise IEEE arithmetic on
them: equal windows, filled in the same order, give equal packs on every machine.

Why pairs: after the first samples of a pack the last two are chosen together, from all pairs of the window. There are
so many that nearly every remainder can be filled to a few tokens, and among those that fill it the pair is taken that
brings the pack's cost closest to the window's average: packs that cost the same need no luck in the dealing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Sequence

import numpy as np
from numpy.typing import NDArray

from bagel_ds.data.sample import SamplePlan

# Differences in cost that weigh the same in a choice: the goals for the imbalance between ranks.
LLM_TOLERANCE, VISION_TOLERANCE = 0.01, 0.10
SLACK_DIVISOR = 400  # a pack counts as full from 1 - 1/400 of the limit on: that room buys equal cost
GAP_DIVISOR = 1000  # beyond it, 1/1000 of the limit left empty weighs like one tolerance of cost
_CANDIDATES = 512  # pairs weighed per choice, about
_KEY_SHIFT = 40  # sort key: length << 40 | arrival
_EMPTY = -1


class Candidate(NamedTuple):
    """A planned sample with what packing looks at: tokens, and MFLOP in the language model and in vision."""

    group: int
    epoch: int
    row: int  # as the group's stream numbers it
    plan: SamplePlan
    length: int
    llm: int
    vision: int


class Pack(NamedTuple):
    """Samples that fill one sequence, and what it costs."""

    samples: tuple[SamplePlan, ...]
    length: int
    llm: int
    vision: int
    waited: int  # packs that its longest-waiting sample saw leave before it
    missing: int  # mandatory groups without a sample in it


class _Open:
    """A pack being filled."""

    def __init__(self, limit: int, mandatory: Sequence[int]) -> None:
        self.rest = limit
        self.missing = list(mandatory)
        self.members: list[Candidate] = []
        self.llm = self.vision = self.waited = 0

    def add(self, candidate: Candidate, waited: int) -> None:
        self.members.append(candidate)
        self.rest -= candidate.length
        self.llm += candidate.llm
        self.vision += candidate.vision
        self.waited = max(self.waited, waited)
        if candidate.group in self.missing:
            self.missing.remove(candidate.group)

    def close(self, limit: int, missing: int) -> Pack:
        samples = tuple(candidate.plan for candidate in self.members)
        return Pack(samples, limit - self.rest, self.llm, self.vision, self.waited, missing)


class _View(NamedTuple):
    """The window's samples that fit, ascending by length; arrays of one entry per sample."""

    slot: NDArray[np.int64]
    length: NDArray[np.int64]
    group: NDArray[np.int64]
    llm: NDArray[np.int64]
    vision: NDArray[np.int64]


class _Goal(NamedTuple):
    """What the last samples of a pack should add: tokens at most, and MFLOP about."""

    room: int
    llm: int
    vision: int
    llm_tolerance: float
    vision_tolerance: float


class Window:
    """Samples waiting to be packed. What it does next depends only on them, their order and `packs_taken`."""

    def __init__(self, limit: int, size: int, groups: int, mandatory: Sequence[int], packs_taken: int = 0) -> None:
        self.limit, self.size, self.mandatory = limit, size, tuple(mandatory)
        self.packs_taken = packs_taken
        slots = size + len(self.mandatory)
        self._key = np.full(slots, _EMPTY, np.int64)
        self._length, self._group = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._llm, self._vision = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._places = np.arange(max(slots, _CANDIDATES))
        self._free = list(range(slots))
        self._arrivals = 0
        self._waiting: OrderedDict[int, tuple[Candidate, int]] = OrderedDict()  # slot: sample, packs taken at arrival
        self._group_count, self._group_length = [0] * groups, [0] * groups
        self._total_llm = self._total_vision = 0
        self._shortest = 0  # no waiting sample is shorter

    def __len__(self) -> int:
        return len(self._waiting)

    def holds_group(self, group: int) -> bool:
        return self._group_count[group] > 0

    def waiting(self) -> list[tuple[Candidate, int]]:
        """Samples in order of arrival, each with the number of packs it has seen leave."""
        return [(candidate, self.packs_taken - since) for candidate, since in self._waiting.values()]

    def add(self, candidate: Candidate, waited: int = 0) -> None:
        """Append a sample; `waited` is given for one carried over from a saved state."""
        slot = self._free.pop()
        self._key[slot] = candidate.length << _KEY_SHIFT | self._arrivals
        self._arrivals += 1
        self._shortest = min(self._shortest, candidate.length)
        self._length[slot], self._group[slot] = candidate.length, candidate.group
        self._llm[slot], self._vision[slot] = candidate.llm, candidate.vision
        self._waiting[slot] = (candidate, self.packs_taken - waited)
        self._count(candidate, 1)

    def take(self) -> Pack:
        """Remove and return the next pack; the window must not be empty."""
        pack = _Open(self.limit, self.mandatory)
        target_llm, target_vision = self._targets()
        oldest_first = self.packs_taken % 2 == 0
        self._move(next(iter(self._waiting)) if oldest_first else int(self._key.argmax()), pack)
        missing = 0
        while self._waiting and pack.rest >= self._shortest:
            early = self._early(pack)
            slots = [early] if early is not None else self._last(pack, target_llm, target_vision)
            if not slots and not pack.missing:
                break
            if not slots:  # no room for a mandatory group: its first sample is too long
                missing += len(pack.missing)
                pack.missing.clear()
            for slot in slots:
                self._move(slot, pack)
        missing += len(pack.missing)
        self.packs_taken += 1
        return pack.close(self.limit, missing)

    def _targets(self) -> tuple[int, int]:
        """What a full pack costs if it is like the window's average."""
        length = sum(self._group_length)
        return self._total_llm * self.limit // length, self._total_vision * self.limit // length

    def _move(self, slot: int, pack: _Open) -> None:
        candidate, since = self._waiting.pop(slot)
        self._key[slot] = _EMPTY
        self._free.append(slot)
        self._count(candidate, -1)
        pack.add(candidate, self.packs_taken - since)

    def _count(self, candidate: Candidate, sign: int) -> None:
        self._group_count[candidate.group] += sign
        self._group_length[candidate.group] += sign * candidate.length
        self._total_llm += sign * candidate.llm
        self._total_vision += sign * candidate.vision

    def _early(self, pack: _Open) -> int | None:
        """The longest-waiting sample that fits, while more than about two samples' room is left; else None."""
        mean = sum(self._group_length) // len(self._waiting)
        means = [self._group_length[g] // self._group_count[g] for g in pack.missing if self._group_count[g]]
        last_two = sum((means + [mean, mean])[: max(2, len(means))])
        if pack.rest <= last_two * 5 // 4 and len(means) <= 2:
            return None
        room = pack.rest - sum(means) if means else pack.rest - mean
        for slot, (candidate, _) in self._waiting.items():
            group = candidate.group
            if pack.missing and group not in pack.missing:
                continue
            own = self._group_length[group] // self._group_count[group] if pack.missing else 0
            if candidate.length <= room + own:
                return slot
        return None

    def _last(self, pack: _Open, target_llm: int, target_vision: int) -> list[int]:
        """The one or two samples that fill the pack best, of the missing mandatory groups as far as these fit."""
        order = self._key.argsort()[len(self._key) - len(self._waiting) :]
        length = self._length[order]
        self._shortest = int(length[0])
        fitting = int(length.searchsorted(pack.rest, side="right"))
        if not fitting:
            return []
        order = order[:fitting]
        columns = (self._group, self._llm, self._vision)
        view = _View(order, length[:fitting], *(column.take(order) for column in columns))
        goal = _Goal(
            pack.rest,
            target_llm - pack.llm,
            target_vision - pack.vision,
            target_llm * LLM_TOLERANCE + 1.0,
            target_vision * VISION_TOLERANCE + 1.0,
        )
        wanted = [group for group in pack.missing if self._group_count[group]]
        if len(wanted) > 2:  # shortest first until a pair remains, so that all fit if they can
            return order[view.group == wanted[0]][:1].tolist()
        choices: list[list[int]] = [wanted] + ([[group] for group in wanted] if len(wanted) > 1 else [])
        for required in choices:
            found = self._best(view, required, goal)
            if found:
                return found
        return []

    def _best(self, view: _View, required: list[int], goal: _Goal) -> list[int]:
        """Slots of the best pair or single sample that holds all of `required` (at most two groups)."""
        first, second = (
            (view.group == required[i]).nonzero()[0] if i < len(required) else self._places[: len(view.slot)]
            for i in range(2)
        )
        if not len(first) or not len(second):
            return []
        room = goal.room - view.length.take(first)
        llm, vision = goal.llm - view.llm.take(first), goal.vision - view.vision.take(first)
        steps = self._places[: max(1, _CANDIDATES // len(first)), None]
        partner = view.length[second].searchsorted(room, side="right") - 1 - steps
        other = second.take(np.maximum(partner, 0))
        gap = room - view.length.take(other)
        score = self._score(gap, llm - view.llm.take(other), vision - view.vision.take(other), goal)
        score[(partner < 0) | (other == first)] = np.inf
        best = int(score.argmin())
        column = best % len(first)
        pair = [first[column], other.flat[best]] if score.flat[best] < np.inf else []
        if len(required) < 2 and (not pair or gap.flat[best] > self.limit // SLACK_DIVISOR):
            alone = self._score(room, llm, vision, goal)
            single = int(alone.argmin())
            if not pair or alone[single] < score.flat[best]:
                pair = [first[single]]
        return view.slot[pair].tolist()

    def _score(
        self, gap: NDArray[np.int64], llm: NDArray[np.int64], vision: NDArray[np.int64], goal: _Goal
    ) -> NDArray[np.float64]:
        """Lower is better: room left beyond the slack, and distance from the average cost, all in tolerances."""
        empty = np.maximum(gap - self.limit // SLACK_DIVISOR, 0) * (GAP_DIVISOR / self.limit)
        return empty + np.abs(llm) / goal.llm_tolerance + np.abs(vision) / goal.vision_tolerance
