"""The data plan: the endless global sequence of packs that a run consumes, whatever its number of ranks.

Guarantees: pure (no I/O, no torch, no clock): equal streams, options and prices give equal packs on every rank and
machine. Each epoch of a group uses every usable row exactly once; no sample is lost or used twice, also across
restarts, also of versions and under other options; a `state` is a small JSON-ready dict from which exactly the next
packs follow at any world size. Packs come in blocks, which may span epochs. Inside a block they are ordered so that
neighbors cost the same: at any level, aligned runs of 2, 4, 8, ... packs are alike in language-model and vision cost,
while runs of different cost follow each other at random. A drawn sample is used at most 2 * (window + mandatory groups)
+ block packs later.

What is drawn: every pack brings one draw from each mandatory group (the original visits them whenever a pack is
empty); the rest are drawn from all groups in proportion to their weights, evenly spread instead of at random.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
from numpy.typing import NDArray

from bagel_ds.data.plan.cost import CostModel, work_of
from bagel_ds.data.plan.packing import LLM_TOLERANCE, VISION_TOLERANCE, Candidate, Pack, Window
from bagel_ds.data.plan.row_order import RowOrder, permutation, stable_key
from bagel_ds.data.plan.rules import ALGORITHM, UNNAMED_ALGORITHM, PackingRules, rules_of
from bagel_ds.data.samples.sample import Stream
from bagel_ds.errors import UserError, all_faults

PROBED_ROWS = 64  # rows per group whose mean length decides the sizes of window and block


@dataclass(frozen=True)
class PackingOptions:
    """Budgets in tokens. `expected_num_tokens` only says below which length a pack is reported as short."""

    max_num_tokens: int
    expected_num_tokens: int
    lookahead: int = 256  # samples the packer chooses from
    data_seed: int = 42


def imbalance(costs: Sequence[int]) -> float:
    """max / mean - 1; 0 where nothing costs anything."""
    return max(costs) * len(costs) / sum(costs) - 1 if any(costs) else 0.0


class MicroStep(NamedTuple):
    """The packs of all ranks in one global micro-step, and the state after it."""

    packs: tuple[Pack, ...]
    state: dict[str, Any]
    epochs: dict[str, float]  # by group: epochs planned, as a float

    @property
    def imbalance_llm(self) -> float:
        """By how much the costliest pack's language-model work exceeds the mean, as a fraction of it."""
        return imbalance([pack.llm for pack in self.packs])

    @property
    def imbalance_vision(self) -> float:
        """The same for the work of ViT and VAE."""
        return imbalance([pack.vision for pack in self.packs])


class _Block(NamedTuple):
    packs: list[Pack]  # in the order of use
    start: dict[str, Any]  # what plans this block again
    digest: str  # of its samples and their lengths
    end: dict[str, Any]  # cursors behind it
    places: dict[tuple[int, int, int], int]  # of the rows in `Planner._rows_of` it
    epochs_before: list[float]
    epochs_after: list[float]

    def bits(self, start: int, stop: int) -> int:
        """One bit for each row that these of its packs use, at the row's place."""
        return sum(1 << self.places[row] for pack in self.packs[start:stop] for row in pack.rows)


def digest_of(values: list[Any]) -> str:
    """16 hexadecimal digits that differ where `values` do: JSON-ready ones, and dataclasses of them, by field name."""
    return blake2b(json.dumps(values, sort_keys=True, default=asdict).encode(), digest_size=8).hexdigest()


def _samples_digest(packs: Sequence[Pack]) -> str:
    return digest_of([[(plan.group, plan.epoch, plan.row, plan.length) for plan in pack.samples] for pack in packs])


class _Intake:
    """Draws usable samples of one group, in its row order."""

    def __init__(self, group: int, stream: Stream, options: PackingOptions, cost: CostModel) -> None:
        self.name, self.weight, self.draws = stream.name, stream.weight, 0
        self.order = RowOrder(stream.units, options.data_seed, stream.name)
        self._group, self._stream, self._cost, self._limit = group, stream, cost, options.max_num_tokens

    def candidate(self, epoch: int, row: int) -> Candidate | None:
        """The sample of a row with its length and cost; None where the row is unusable."""
        plan = self._stream.plan_sample(row, epoch)
        if plan is None:
            return None
        work = work_of(plan)
        if not 0 < work.tokens <= self._limit:
            return None
        return Candidate(self._group, epoch, row, plan, work.tokens, *self._cost.price(work))

    def next(self) -> Candidate:
        """The next usable sample."""
        for _ in range(2 * self.order.rows_per_epoch):
            candidate = self.candidate(*self.order.next())
            if candidate:
                return candidate
        raise UserError(
            f"data group {self.name}: none of its {self.order.rows_per_epoch} rows gives a sample of 1 to "
            f"{self._limit} tokens; raise max_num_tokens and max_num_tokens_per_sample, or remove the group"
        )


def order_of_need(
    streams: Sequence[Stream], seed: int, cursors: dict[str, Any] | None = None
) -> Iterator[tuple[float, int, range]]:
    """(rows before it, group, read unit) of all units, each once, about in the order in which a run needs them.

    `cursors` are those of a state's block. Rows are counted at the pace of a group of weight 1, so that groups of other
    weights lie side by side.
    """

    def of(group: int, stream: Stream) -> Iterator[tuple[float, int, range]]:
        order = RowOrder(stream.units, seed, stream.name)
        if cursors and stream.name in cursors:
            order.move_to(*cursors[stream.name][:2])
        before = 0
        for unit in order.units_ahead():
            yield before / (stream.weight or 1.0), group, unit
            before += len(unit)

    ahead = (of(group, stream) for group, stream in enumerate(streams) if any(map(len, stream.units)))
    return heapq.merge(*ahead, key=lambda item: item[0])


def like_cost_order(llm: NDArray[np.int64], vision: NDArray[np.int64], key: int) -> list[int]:
    """Order packs so that every aligned run of 2**k costs about the same, for every k at once.

    The packs are halved again and again, each time across the cost whose spread, in units of its tolerance, is larger;
    which half comes first is a coin drawn from `key`.
    """
    scaled = [  # sums of integers: exact on every machine, as numpy's mean is not
        cost / (int(cost.sum()) / len(cost) * tolerance + 1.0)
        for cost, tolerance in ((llm, LLM_TOLERANCE), (vision, VISION_TOLERANCE))
    ]
    coins = iter((permutation(2 * len(llm), key) & 1).tolist())

    def arrange(ids: NDArray[np.int64]) -> list[int]:
        if len(ids) <= 2:
            return ids.tolist()[:: -1 if next(coins) else 1]
        values = max((axis[ids] for axis in scaled), key=lambda value: float(value.max() - value.min()))
        ids = ids[np.argsort(values, kind="stable")]
        low, high = arrange(ids[: len(ids) // 2]), arrange(ids[len(ids) // 2 :])
        return high + low if next(coins) else low + high

    return arrange(np.arange(len(llm)))


class Planner:
    """Plans packs over groups of data; holds no position of its own, see `steps`."""

    def __init__(self, streams: Sequence[Stream], options: PackingOptions, cost: CostModel | None = None) -> None:
        self.streams, self.options, self.cost = list(streams), options, cost or CostModel.of()
        self._check()
        self.mandatory = [i for i, stream in enumerate(self.streams) if stream.is_mandatory]
        self.mean_lengths = self._mean_lengths()
        self.rules = self._rules(ALGORITHM)

    def steps(self, world_size: int, start: dict[str, Any] | None = None) -> Iterator[MicroStep]:
        """The packs of micro-step after micro-step, without end; rank r's is the r-th.

        `start` is the `state` of an earlier step, of a run with the same streams and options and any world size.
        """
        names = [stream.name for stream in self.streams]
        blocks = self._blocks(start["block"] if start else None)
        block = next(blocks)
        offset = start["packs"] - block.start["first"] if start else 0
        used = block.bits(0, offset)
        while True:
            taken: list[Pack] = []
            while len(taken) < world_size:
                if offset == len(block.packs):
                    block, offset, used = next(blocks), 0, 0
                following = block.packs[offset : offset + world_size - len(taken)]
                taken += following
                used |= block.bits(offset, offset + len(following))
                offset += len(following)
            share = offset / len(block.packs)
            epochs = [a + (b - a) * share for a, b in zip(block.epochs_before, block.epochs_after, strict=True)]
            state = {"packs": block.start["first"] + offset, "block": block.start, "samples": block.digest}
            state |= {"end": block.end, "used": f"{used:x}"}
            yield MicroStep(tuple(taken), state, dict(zip(names, epochs, strict=True)))

    def plans_again(self, start: dict[str, Any]) -> bool:
        """Whether the block under way at a state comes out as it did when the state was saved."""
        return next(self._blocks(start["block"])).digest == start["samples"]

    def moved(self, start: dict[str, Any]) -> dict[str, Any]:
        """The place of a state that was saved under other options over the same rows.

        All rows of the block under way that no pack has used wait in the window of a new block; those that no longer
        give a sample are left out. So nothing is lost or repeated. A state that doesn't say which rows are used (of
        algorithm 2) begins the block again, which repeats the packs that were used of it.
        """
        block = start["block"]
        end, used = start.get("end", block["groups"]), int(start.get("used", "0"), 16)
        left = [row for place, row in enumerate(self._rows_of(block, end)) if not used >> place & 1]
        cursors = {name: [epoch, position, 0] for name, (epoch, position, _) in end.items()}
        carried = [[*row, 0] for row in left]
        moved = {"first": start["packs"], "groups": cursors, "carried": carried, "algorithm": ALGORITHM}
        return {"packs": start["packs"], "block": moved}

    def _rows_of(self, block: dict[str, Any], end: dict[str, Any]) -> list[tuple[int, int, int]]:
        """(group, epoch, row) that wait at a block's beginning, then those passed by its end, all groups in step."""
        passed = []
        for group, stream in enumerate(self.streams):
            if stream.name in end:
                order = RowOrder(stream.units, self.options.data_seed, stream.name)
                order.move_to(*block["groups"][stream.name][:2])
                epoch, position, _ = end[stream.name]
                count = (epoch - order.epoch) * order.rows_per_epoch + position - order.position
                passed += [(i / count, group, *order.next()) for i in range(count)]
        return [(group, epoch, row) for group, epoch, row, _ in block["carried"]] + [key[1:] for key in sorted(passed)]

    def _check(self) -> None:
        faults = []
        if self.options.max_num_tokens <= 0:
            faults.append(f"max_num_tokens is {self.options.max_num_tokens}; it must be positive")
        if self.options.lookahead < 1:
            faults.append(f"the look-ahead is {self.options.lookahead} samples; it must be at least 1")
        for stream in self.streams:
            if not stream.weight >= 0:
                faults.append(f"data group {stream.name}: weight is {stream.weight}; it must not be negative")
            if (stream.weight > 0 or stream.is_mandatory) and not any(len(unit) for unit in stream.units):
                faults.append(f"data group {stream.name}: its files hold no rows; remove it or correct its paths")
        if not any(stream.weight > 0 or stream.is_mandatory for stream in self.streams):
            faults.append("no data group has a positive weight or is mandatory; give at least one group a weight")
        all_faults(faults, "The data can't be planned:")

    def _mean_lengths(self) -> list[float]:
        """Tokens per sample of each group (0 where it is never drawn), over the first usable rows in its order."""
        means = dict.fromkeys(range(len(self.streams)), 0.0)
        for group, intake in self._intakes().items():
            means[group] = sum(intake.next().length for _ in range(PROBED_ROWS)) / PROBED_ROWS
        return list(means.values())

    def _rules(self, algorithm: int) -> PackingRules:
        weights = [stream.weight for stream in self.streams]
        if not any(weights):  # mandatory groups only
            weights = [1.0] * len(weights)
        mean = sum(w * length for w, length in zip(weights, self.mean_lengths, strict=True)) / sum(weights)
        rows = sum(len(unit) for i, mean in enumerate(self.mean_lengths) if mean for unit in self.streams[i].units)
        return rules_of(algorithm, self.options.lookahead, self.options.max_num_tokens / mean, rows)

    def _intakes(self) -> dict[int, _Intake]:
        """By group number, of the groups that are drawn from."""
        drawn = [i for i, stream in enumerate(self.streams) if stream.weight > 0 or stream.is_mandatory]
        return {i: _Intake(i, self.streams[i], self.options, self.cost) for i in drawn}

    def _blocks(self, start: dict[str, Any] | None) -> Iterator[_Block]:
        packer = _Packer(self, start)
        algorithm = start.get("algorithm", UNNAMED_ALGORITHM) if start else ALGORITHM
        while True:
            rules = packer.window.rules = self._rules(algorithm)
            before, snapshot = packer.epochs(), {**packer.snapshot(), "algorithm": algorithm}
            packs = [packer.next() for _ in range(rules.block)]
            key = stable_key(self.options.data_seed, "block", snapshot["first"])
            llm, vision = np.array([pack.llm for pack in packs]), np.array([pack.vision for pack in packs])
            ordered = [packs[i] for i in like_cost_order(llm, vision, key)]
            end = packer.snapshot()["groups"]
            places = {row: place for place, row in enumerate(self._rows_of(snapshot, end))}
            yield _Block(ordered, snapshot, _samples_digest(ordered), end, places, before, packer.epochs())
            algorithm = ALGORITHM


class _Packer:
    """The running state behind the blocks: a cursor per group and the window."""

    def __init__(self, planner: Planner, start: dict[str, Any] | None) -> None:
        self._planner = planner
        self._intakes = planner._intakes()
        weights = {i: intake.weight for i, intake in self._intakes.items() if intake.weight > 0}
        if not weights:  # mandatory groups only: they share the rest too
            weights = dict.fromkeys(self._intakes, 1.0)
        self._shares = {i: weight / sum(weights.values()) for i, weight in weights.items()}
        first = start["first"] if start else 0
        limit, groups = planner.options.max_num_tokens, len(planner.streams)
        self.window = Window(limit, planner.rules, groups, planner.mandatory, first)
        if start:
            self._restore(start)

    def _restore(self, start: dict[str, Any]) -> None:
        """Take up the cursors and the waiting samples; one that its row no longer gives is left out."""
        for intake in self._intakes.values():
            if intake.name in start["groups"]:
                epoch, position, intake.draws = start["groups"][intake.name]
                intake.order.move_to(epoch, position)
        for group, epoch, row, waited in start["carried"]:
            candidate = self._intakes[group].candidate(epoch, row) if group in self._intakes else None
            if candidate is not None:
                self.window.add(candidate, waited)

    def snapshot(self) -> dict[str, Any]:
        """JSON-ready. Cursors: [epoch, position, weighted draws]; carried: [group, epoch, row, packs waited]."""
        cursors = {i.name: [i.order.epoch, i.order.position, i.draws] for i in self._intakes.values()}
        carried = [[c.group, c.epoch, c.row, waited] for c, waited in self.window.waiting()]
        return {"first": self.window.packs_taken, "groups": cursors, "carried": carried}

    def epochs(self) -> list[float]:
        """By group: epochs of rows that are packed, so without those that wait."""
        epochs = [0.0] * len(self._planner.streams)
        for group, intake in self._intakes.items():
            order = intake.order
            epochs[group] = order.epoch + (order.position - self.window.count(group)) / order.rows_per_epoch
        return epochs

    def next(self) -> Pack:
        """Fill the window up and take a pack from it."""
        window = self.window
        for group in self._planner.mandatory:
            if len(window) < window.rules.window or not window.count(group):
                window.add(self._intakes[group].next())
        while len(window) < window.rules.window:
            intake = self._intakes[self._weighted_group()]
            intake.draws += 1
            window.add(intake.next())
        return window.take()

    def _weighted_group(self) -> int:
        """The group that lags most behind its share of the weighted draws."""
        draws = 1 + sum(self._intakes[i].draws for i in self._shares)
        return max(self._shares, key=lambda i: self._shares[i] * draws - self._intakes[i].draws)
