"""Look-ahead packing: which samples of a window share a sequence.

Guarantees: a pack never exceeds the limit; a sample that enters the window leaves it in exactly one pack, at the
latest 2 * (window size + mandatory groups) packs later (every second pack begins with the oldest sample, the others
with the longest, which is the hardest to place); each pack holds a sample of every mandatory group unless its first
sample leaves no room for one that is there. Choices are made with Python's integers and floats alone: equal windows,
filled in the same order, give equal packs on every machine.

Why pairs: after the first samples of a pack the last two are chosen together. A window of 256 samples has so many
pairs that nearly every remainder can be filled to a few tokens, and among those that fill it the pair is taken that
brings the pack's cost closest to the window's average: packs that cost the same need no luck in the dealing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import NamedTuple, Sequence

from bagel_ds.data.plan.rules import PackingRules
from bagel_ds.data.samples.sample import SamplePlan

# Differences in cost that weigh the same in a choice: the goals for the imbalance between ranks.
LLM_TOLERANCE, VISION_TOLERANCE = 0.01, 0.10
GAP_DIVISOR = 1000  # beyond the slack, 1/1000 of the limit left empty weighs like one tolerance of cost
_SECONDS = 3  # partners tried for each of the rules' `firsts`


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
    rows: tuple[tuple[int, int, int], ...] = ()  # (group, epoch, row) of each sample


class _Waiting(NamedTuple):
    """A sample of the window; the order of these tuples is by length, then arrival (which is unique)."""

    length: int
    arrival: int
    llm: int
    vision: int
    since: int  # packs taken when it arrived
    candidate: Candidate


class _ByLength:
    """Waiting samples in ascending order, their lengths beside them for fast search."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.samples: list[_Waiting] = []
        self.total = 0

    def add(self, sample: _Waiting) -> None:
        place = bisect_right(self.lengths, sample.length)  # it arrived last: behind all of its length
        self.lengths.insert(place, sample.length)
        self.samples.insert(place, sample)
        self.total += sample.length

    def remove(self, sample: _Waiting) -> None:
        place = bisect_left(self.samples, sample)
        del self.lengths[place], self.samples[place]
        self.total -= sample.length

    @property
    def mean(self) -> int:
        return self.total // len(self.samples)


class _Open:
    """A pack being filled."""

    def __init__(self, limit: int, mandatory: Sequence[int]) -> None:
        self.rest = limit
        self.missing = list(mandatory)
        self.members: list[Candidate] = []
        self.llm = self.vision = self.waited = 0

    def add(self, sample: _Waiting, waited: int) -> None:
        candidate = sample.candidate
        self.members.append(candidate)
        self.rest -= sample.length
        self.llm += sample.llm
        self.vision += sample.vision
        self.waited = max(self.waited, waited)
        if candidate.group in self.missing:
            self.missing.remove(candidate.group)

    def close(self, limit: int, missing: int) -> Pack:
        samples = tuple(candidate.plan for candidate in self.members)
        rows = tuple((candidate.group, candidate.epoch, candidate.row) for candidate in self.members)
        return Pack(samples, limit - self.rest, self.llm, self.vision, self.waited, missing, rows)


class _Goal(NamedTuple):
    """What the last samples of a pack should add: tokens at most, and MFLOP about."""

    room: int
    llm: int
    vision: int
    slack: int  # tokens that may stay empty
    per_token: float  # weight of each empty token beyond the slack
    per_llm: float  # weight of a MFLOP off the goal
    per_vision: float

    def score(self, gap: int, llm: int, vision: int) -> float:
        """Lower is better: tokens left empty, and distance of the added MFLOP from the goal, in tolerances."""
        return (
            max(gap - self.slack, 0) * self.per_token
            + abs(self.llm - llm) * self.per_llm
            + abs(self.vision - vision) * self.per_vision
        )


class Window:
    """Samples waiting to be packed. What it does next depends only on them, their order and `packs_taken`."""

    def __init__(
        self, limit: int, rules: PackingRules, groups: int, mandatory: Sequence[int], packs_taken: int = 0
    ) -> None:
        self.limit, self.rules, self.mandatory = limit, rules, tuple(mandatory)
        self.packs_taken = packs_taken
        self._arrivals = 0
        self._in_order: OrderedDict[int, _Waiting] = OrderedDict()  # by arrival
        self._all = _ByLength()
        self._groups = [_ByLength() for _ in range(groups)]
        self._total_llm = self._total_vision = 0

    def __len__(self) -> int:
        return len(self._in_order)

    def count(self, group: int) -> int:
        """Waiting samples of a group."""
        return len(self._groups[group].samples)

    def waiting(self) -> list[tuple[Candidate, int]]:
        """Samples in order of arrival, each with the number of packs it has seen leave."""
        return [(sample.candidate, self.packs_taken - sample.since) for sample in self._in_order.values()]

    def add(self, candidate: Candidate, waited: int = 0) -> None:
        """Append a sample; `waited` is given for one carried over from a saved state."""
        since = self.packs_taken - waited
        sample = _Waiting(candidate.length, self._arrivals, candidate.llm, candidate.vision, since, candidate)
        self._in_order[self._arrivals] = sample
        self._arrivals += 1
        self._all.add(sample)
        self._groups[candidate.group].add(sample)
        self._total_llm += sample.llm
        self._total_vision += sample.vision

    def take(self) -> Pack:
        """Remove and return the next pack; the window must not be empty."""
        pack = _Open(self.limit, self.mandatory)
        target_llm = self._total_llm * self.limit // self._all.total  # of a full pack like the window's average
        target_vision = self._total_vision * self.limit // self._all.total
        oldest_first = self.packs_taken % 2 == 0
        self._move(next(iter(self._in_order.values())) if oldest_first else self._all.samples[-1], pack)
        missing = 0
        while self._all.lengths and pack.rest >= self._all.lengths[0]:
            early = self._early(pack)
            chosen = [early] if early else self._last(pack, target_llm, target_vision)
            if not chosen:  # no room for a mandatory group: its first sample is too long
                missing += len(pack.missing)
                pack.missing.clear()
            for sample in chosen:
                self._move(sample, pack)
        missing += len(pack.missing)
        self.packs_taken += 1
        return pack.close(self.limit, missing)

    def _move(self, sample: _Waiting, pack: _Open) -> None:
        del self._in_order[sample.arrival]
        self._all.remove(sample)
        self._groups[sample.candidate.group].remove(sample)
        self._total_llm -= sample.llm
        self._total_vision -= sample.vision
        pack.add(sample, self.packs_taken - sample.since)

    def _early(self, pack: _Open) -> _Waiting | None:
        """The longest-waiting sample that fits, while more than about two samples' room is left; else None."""
        mean = self._all.mean
        means = [self._groups[group].mean for group in pack.missing if self._groups[group].samples]
        last_two = sum((means + [mean, mean])[: max(2, len(means))])
        if pack.rest <= last_two * 5 // 4 and len(means) <= 2:
            return None
        room = pack.rest - (sum(means) or mean)
        for sample in self._in_order.values():
            group = sample.candidate.group
            if not pack.missing:
                if sample.length <= room:
                    return sample
            elif group in pack.missing and sample.length <= room + self._groups[group].mean:
                return sample
        return None

    def _last(self, pack: _Open, target_llm: int, target_vision: int) -> list[_Waiting]:
        """The one or two samples that fill the pack best, of the missing mandatory groups as far as these fit."""
        goal = _Goal(
            pack.rest,
            target_llm - pack.llm,
            target_vision - pack.vision,
            self.limit // self.rules.slack_divisor,
            GAP_DIVISOR / self.limit,
            1 / (target_llm * LLM_TOLERANCE + 1),
            1 / (target_vision * VISION_TOLERANCE + 1),
        )
        wanted = [self._groups[group] for group in pack.missing if self._groups[group].samples]
        if len(wanted) > 2:  # shortest first until a pair remains, so that all fit if they can
            return [sample for sample in wanted[0].samples[:1] if sample.length <= goal.room]
        if len(wanted) == 2:
            pair = self._pair(wanted[0], wanted[1], goal)[1]
            return pair or self._pair_or_one(wanted[0], goal) or self._pair_or_one(wanted[1], goal)
        return self._pair_or_one(wanted[0] if wanted else self._all, goal)

    def _pair_or_one(self, required: _ByLength, goal: _Goal) -> list[_Waiting]:
        """One of `required`, alone or with any other."""
        score, best = self._pair(required, self._all, goal)
        if best and sum(sample.length for sample in best) >= goal.room - goal.slack:
            return best
        fitting = bisect_right(required.lengths, goal.room)
        for sample in required.samples[max(0, fitting - self.rules.firsts) : fitting]:
            alone = goal.score(goal.room - sample.length, sample.llm, sample.vision)
            if alone < score:
                score, best = alone, [sample]
        return best

    def _pair(self, firsts: _ByLength, seconds: _ByLength, goal: _Goal) -> tuple[float, list[_Waiting]]:
        """The best of many pairs that fit, with its score; nothing (and infinity) where none fits."""
        score, best = float("inf"), []
        fitting = bisect_right(firsts.lengths, goal.room - seconds.lengths[0])
        for first in firsts.samples[: fitting : fitting // self.rules.firsts + 1]:
            room = goal.room - first.length
            place = bisect_right(seconds.lengths, room)
            for second in reversed(seconds.samples[max(0, place - _SECONDS) : place]):
                gap = room - second.length
                if (gap - goal.slack) * goal.per_token >= score:
                    break  # the shorter ones leave even more room
                found = goal.score(gap, first.llm + second.llm, first.vision + second.vision)
                if found < score and second is not first:
                    score, best = found, [first, second]
        return score, best
