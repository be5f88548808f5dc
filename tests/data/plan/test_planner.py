"""The plan's promises, over budgets, mixes of groups, world sizes and restarts.

Streams here are synthetic: a row's sample depends on (row, epoch) only, as the real ones' do.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.plan.planner import PackingOptions, Planner, like_cost_order
from bagel_ds.data.plan.row_order import RowOrder, permutation
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, Entry, SamplePlan, Stream
from bagel_ds.errors import UserError
from bench.data_plan import BUDGETS, Line, SyntheticGroup, groups_of, mix, small_mix, summary

LIMIT = 1000


@dataclass
class Rows:
    """A stream of texts and images of `shortest` to `longest` tokens; every `bad_every`-th row is unusable."""

    name: str = "group"
    weight: float = 1.0
    is_mandatory: bool = False
    rows: int = 100
    unit: int = 7
    shortest: int = 20
    longest: int = 300
    bad_every: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def units(self) -> Sequence[range]:
        return [range(start, min(start + self.unit, self.rows)) for start in range(0, self.rows, self.unit)]

    def usable(self, row: int) -> bool:
        return not self.bad_every or row % self.bad_every > 0

    def plan_sample(self, row: int, epoch: int) -> SamplePlan | None:
        self.asked.append((epoch, row))
        if not self.usable(row):
            return None
        tokens = self.shortest + (row * 7919 + epoch * 104729) % (self.longest - self.shortest + 1) - 2
        kind = (TEXT, VIT, VAE)[row % 3]
        entry = Entry(kind, 0, tokens, loss=True, height=16 * tokens, width=16)
        return SamplePlan(sum(self.name.encode()), epoch, row, (entry,))


def options(**changes: Any) -> PackingOptions:
    return PackingOptions(**({"max_num_tokens": LIMIT, "expected_num_tokens": 900, "lookahead": 48} | changes))


def packs_of(planner: Planner, count: int, world_size: int = 1, start: dict[str, Any] | None = None) -> list[Pack]:
    steps = itertools.islice(planner.steps(world_size, start), -(-count // world_size))
    return [pack for step in steps for pack in step.packs][:count]


def samples_of(packs: Sequence[Pack]) -> list[tuple[int, int, int]]:
    return [(sample.group, sample.epoch, sample.row) for pack in packs for sample in pack.samples]


groups = st.lists(
    st.builds(
        Rows,
        weight=st.sampled_from([0.2, 1.0, 3.5]),
        is_mandatory=st.booleans(),
        rows=st.integers(1, 150),
        unit=st.integers(1, 40),
        shortest=st.integers(3, 60),
        longest=st.integers(60, LIMIT),
        bad_every=st.sampled_from([0, 2, 5]),
    ).filter(lambda stream: stream.rows > 1),
    min_size=1,
    max_size=4,
)


def planner_of(streams: list[Rows], **changes: Any) -> Planner:
    for number, stream in enumerate(streams):
        stream.name = f"group{number}"
    return Planner(streams, options(**changes))


@settings(max_examples=40, deadline=None)
@given(groups, st.integers(1, 8), st.integers(0, 40), st.integers(1, 8), st.integers(1, 80))
def test_restart_at_any_step_on_any_world_size_continues_with_exactly_the_next_packs(
    streams: list[Rows], world: int, steps: int, other_world: int, lookahead: int
) -> None:
    planner = planner_of(streams, lookahead=lookahead)
    whole = packs_of(planner, (steps + 1) * world + 40)
    before = list(itertools.islice(planner.steps(world), steps + 1))
    taken = [pack for step in before for pack in step.packs]
    assert taken == whole[: len(taken)]
    state = json.loads(json.dumps(before[-1].state))
    again = planner_of(streams, lookahead=lookahead)
    assert packs_of(again, 40, other_world, state) == whole[len(taken) : len(taken) + 40]


@settings(max_examples=40, deadline=None)
@given(groups, st.integers(1, 80), st.integers(100, LIMIT))
def test_no_sample_is_lost_or_used_twice_and_budgets_and_waiting_bound_hold(
    streams: list[Rows], lookahead: int, limit: int
) -> None:
    for stream in streams:
        stream.longest = min(stream.longest, limit)
    planner = planner_of(streams, lookahead=lookahead, max_num_tokens=limit)
    packs = packs_of(planner, 3 * planner.rules.block)
    assert all(0 < pack.length <= limit and pack.length == sum(s.length for s in pack.samples) for pack in packs)
    assert all(pack.waited <= 2 * (planner.rules.window + len(planner.mandatory)) for pack in packs)
    counts = Counter(samples_of(packs))
    assert set(counts.values()) == {1}
    # Every usable row of an epoch that lies wholly behind is used: what is missing still waits in the window.
    for number, stream in enumerate(streams):
        used = Counter(epoch for group, epoch, _ in counts if group == sum(stream.name.encode()))
        usable = sum(stream.usable(row) for row in range(stream.rows))
        missing = sum(usable - used[epoch] for epoch in range(max(used, default=0)))
        assert missing <= planner.rules.window + len(planner.mandatory), f"group {number}"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 64))
def test_every_pack_holds_every_mandatory_group_where_all_can_fit(mandatory: int, others: int, lookahead: int) -> None:
    limit = 5 * 300
    streams = [
        Rows(is_mandatory=i < mandatory, weight=0.0 if i == 0 and others else 1.0) for i in range(mandatory + others)
    ]
    planner = planner_of(streams, max_num_tokens=limit, lookahead=lookahead)
    wanted = {sum(f"group{i}".encode()) for i in range(mandatory)}
    for pack in packs_of(planner, 200):
        assert wanted <= {sample.group for sample in pack.samples}
        assert pack.missing == 0


def test_groups_are_drawn_in_proportion_to_their_weights() -> None:
    planner = planner_of([Rows(weight=1.0), Rows(weight=3.0), Rows(weight=0.5)])
    counts = Counter(group for group, _, _ in samples_of(packs_of(planner, 2000)))
    total = sum(counts.values())
    for number, share in enumerate((1 / 4.5, 3 / 4.5, 0.5 / 4.5)):
        assert counts[sum(f"group{number}".encode())] / total == pytest.approx(share, abs=0.01)


def test_a_mandatory_group_gets_one_draw_per_pack_beside_the_weighted_ones() -> None:
    """As the original: mandatory groups are visited whenever a pack is empty, all groups by weight after that."""
    planner = planner_of([Rows(weight=1.0, is_mandatory=True), Rows(weight=1.0)])
    packs = packs_of(planner, 2000)
    counts = Counter(group for group, _, _ in samples_of(packs))
    weighted = sum(counts.values()) - len(packs)
    assert counts[sum(b"group0")] == pytest.approx(len(packs) + weighted / 2, rel=0.02)


def test_packs_are_full_and_equal_ranks_are_dealt_equal_work() -> None:
    streams = [Rows(rows=5000, longest=700, is_mandatory=True), Rows(rows=5000, shortest=100, longest=400)]
    planner = planner_of(streams, max_num_tokens=10_000, lookahead=512)
    steps = list(itertools.islice(planner.steps(8), 40))
    packs = [pack for step in steps for pack in step.packs]
    assert sum(pack.length for pack in packs) / len(packs) > 0.99 * 10_000
    assert sum(step.imbalance_llm for step in steps) / len(steps) < 0.01


def test_groups_that_are_only_mandatory_still_fill_the_packs() -> None:
    planner = planner_of([Rows(weight=0.0, is_mandatory=True, longest=100), Rows(weight=0.0, is_mandatory=True)])
    packs = packs_of(planner, 200)
    assert sum(pack.length for pack in packs) > 0.98 * LIMIT * len(packs)


def measured(
    groups: Sequence[Stream], budgets: tuple[int, int, int], world: int, packs: int = 512
) -> tuple[Planner, Line]:
    planner = Planner(groups, PackingOptions(budgets[1], budgets[0]))
    steps = [step.packs for step in itertools.islice(planner.steps(world), packs // world)]
    return planner, summary("ours", budgets, world, steps, lost=0)


@pytest.mark.parametrize(("budgets", "fill"), list(zip(BUDGETS, (0.9975, 0.999))), ids=str)
@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("make", [functools.partial(mix, 30_000), small_mix], ids=["large", "small"])
def test_the_bench_mixes_meet_their_goals(
    make: Callable[[int], list[SyntheticGroup]], budgets: tuple[int, int, int], fill: float, world: int
) -> None:
    planner, line = measured(make(budgets[2]), budgets, world)
    assert line.fill >= fill - (make is small_mix) * 0.001
    assert line.imbalance_llm <= 0.005
    assert line.imbalance_vision <= 0.07
    assert line.max_wait <= 2 * (planner.rules.window + len(planner.mandatory))


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "rows", [(200, 160, 300), (60, 20, 16), (16, 16, 400), (400, 16, 16), (1200, 900, 1800)], ids=str
)
def test_small_data_sets_of_any_mix_balance_ranks(rows: tuple[int, int, int], seed: int, world: int) -> None:
    _, line = measured(groups_of(rows, 10240, [2, 3, 4], seed), BUDGETS[0], world, 256)
    assert line.fill >= 0.97  # most packs of the worst mix begin with an edit that hardly anything fits beside
    assert line.imbalance_llm <= 0.01
    assert line.imbalance_vision <= 0.10


@given(st.integers(2, 200), st.integers(0, 10**9))
def test_like_cost_order_is_a_permutation(count: int, key: int) -> None:
    costs = np.arange(count) * 17 % 11
    assert sorted(like_cost_order(costs, costs * 3 % 7, key)) == list(range(count))


def test_aligned_runs_of_any_power_of_two_cost_alike() -> None:
    llm = permutation(256, 5) + 10_000
    order = llm[like_cost_order(llm, np.ones(256, np.int64), 3)]
    for run in (2, 4, 8, 16, 32, 64, 128):
        spread = np.ptp(order.reshape(-1, run), axis=1)
        assert spread.max() == run - 1


@given(st.lists(st.integers(0, 900), min_size=1, max_size=30).filter(any), st.integers(0, 5), st.integers(0, 9))
def test_each_epoch_holds_every_row_once_and_any_position_can_be_reached(
    lengths: list[int], seed: int, epoch: int
) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    units = [range(start, start + length) for start, length in zip(starts, lengths)]
    order = RowOrder(units, seed, "name")
    order.move_to(epoch, 0)
    rows = [order.next() for _ in range(sum(lengths))]
    assert sorted(rows) == [(epoch, row) for row in range(sum(lengths))]
    assert order.next()[0] == epoch + 1
    for position in {0, len(rows) // 3, len(rows) - 1}:
        order.move_to(epoch, position)
        assert order.next() == rows[position]


def test_rows_of_a_unit_stay_within_one_window() -> None:
    order = RowOrder([range(i * 100, i * 100 + 100) for i in range(100)], 1, "name")
    where: dict[int, list[int]] = {}
    for position in range(10_000):
        where.setdefault(order.next()[1] // 100, []).append(position)
    assert all(max(positions) - min(positions) < 1200 for positions in where.values())
    assert list(where) != sorted(where)


def test_the_permutation_is_splitmix64_and_never_changes() -> None:
    """A saved state names positions in it: another order would resume elsewhere."""

    def splitmix64(state: int) -> int:
        mask = 2**64 - 1
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
        return state ^ state >> 31

    outputs = [splitmix64((1234567 + i * 0x9E3779B97F4A7C15) & (2**64 - 1)) for i in range(1, 101)]
    assert outputs[:2] == [6457827717110365317, 3203168211198807973]  # published test vector
    assert permutation(100, 1234567).tolist() == sorted(range(100), key=outputs.__getitem__)
    order = RowOrder([range(3), range(3, 8)], 1, "name")
    assert [order.next()[1] for _ in range(8)] == [3, 1, 4, 5, 7, 0, 6, 2]


_PRINT_PLAN = """
import hashlib
from tests.data.plan.test_planner import Rows, packs_of, planner_of
planner = planner_of([Rows(rows=70, is_mandatory=True), Rows(rows=333, weight=2.0)])
print(hashlib.sha256(repr(packs_of(planner, 300)).encode()).hexdigest())
"""


def test_processes_with_other_hash_seeds_plan_the_same() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_PLAN],
            cwd=Path(__file__).parents[3],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(digests) == 1


def test_the_state_is_small_and_printable() -> None:
    planner = planner_of([Rows(rows=5000), Rows(rows=5000)], lookahead=512)
    state = list(itertools.islice(planner.steps(4), 600))[-1].state
    assert state["packs"] == 2400
    assert len(json.dumps(state)) < 16_000
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("weights", [(1.0, 1.0), (50.0, 1.0)])
def test_packs_are_full_however_short_the_samples_are(weights: tuple[float, float]) -> None:
    """Hundreds of samples per pack, far more than the look-ahead and than a quarter of the rows."""
    short = Rows(rows=300, shortest=5, longest=40, weight=weights[0])
    long = Rows(rows=300, shortest=200, longest=900, weight=weights[1])
    packs = packs_of(planner_of([short, long], max_num_tokens=10_000), 64)
    assert sum(pack.length for pack in packs) / (len(packs) * 10_000) > 0.99


def test_epochs_grow_evenly_and_count_what_was_planned() -> None:
    planner = planner_of([Rows(rows=600), Rows(rows=300)])
    steps = list(itertools.islice(planner.steps(2), 500))
    shown = [step.epochs["group1"] for step in steps]
    assert shown == sorted(shown)
    used = Counter(group for step in steps for group, _, _ in samples_of(step.packs))[sum(b"group1")]
    assert shown[-1] == pytest.approx(used / 300, abs=24 / 300)


def test_one_tiny_group_feeds_any_number_of_ranks() -> None:
    planner = planner_of([Rows(rows=2, shortest=300, longest=400)])
    step = next(planner.steps(64))
    assert len(step.packs) == 64
    assert all(pack.length >= 600 for pack in step.packs)


def test_rows_beyond_the_limit_are_never_packed_and_a_group_of_nothing_else_is_an_error() -> None:
    planner = planner_of([Rows(longest=2 * LIMIT, rows=500)])
    assert max(pack.length for pack in packs_of(planner, 200)) <= LIMIT
    with pytest.raises(UserError, match="group0: none of its 100 rows gives a sample of 1 to 1000 tokens"):
        planner_of([Rows(shortest=LIMIT + 1, longest=2 * LIMIT)])


def test_faults_are_listed_together() -> None:
    with pytest.raises(UserError) as raised:
        planner_of([Rows(rows=0), Rows(weight=-1.0)], max_num_tokens=0)
    message = str(raised.value)
    assert "group0: its files hold no rows" in message
    assert "group1: weight is -1.0" in message
    assert "max_num_tokens is 0" in message


def test_a_group_of_weight_zero_is_never_read() -> None:
    idle = Rows(weight=0.0)
    planner = planner_of([Rows(), idle])
    packs_of(planner, 100)
    assert not idle.asked
