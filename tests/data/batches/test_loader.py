"""The loader's promises, with stand-ins (stand_in.py): a batch's text ids say which rows it was made of."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import threading
from collections import Counter, deque
from typing import Any, Iterator, Sequence

import psutil
import pytest
import torch

from bagel_ds.data.batches import loader
from bagel_ds.data.batches.loader import MicroBatch, PackingOptions, PlannedData
from bagel_ds.data.plan.cost import CostModel
from bagel_ds.errors import UserError
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.shape.parts import Freezing
from tests.data.plan.accounting import rows_used_before
from tests.data.stand_in import Maker, Rows

WORKERS = (0, 2)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "BatchMaker", Maker)


def data(options: Any = "", cost: CostModel | None = None, **changes: Any) -> PlannedData:
    streams: Any = [
        Rows(fingerprint=changes.pop("fingerprint", "a")),
        Rows(name="more", weight=0.5, is_mandatory=False),
    ]
    packing = PackingOptions(**({"max_num_tokens": 300, "expected_num_tokens": 250, "lookahead": 32} | changes))
    tokenizer: Any = None
    return PlannedData(streams, tokenizer, options, packing, noise_seed=1, cost=cost)


def first(batches: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
    taken = list(itertools.islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def worker_processes() -> list[psutil.Process]:
    """Of this process: the server's children."""
    return [worker for server in psutil.Process().children() for worker in server.children()]


def rows_of(batches: Sequence[MicroBatch]) -> list[list[int]]:
    return [step.batch.text_ids.tolist() for step in batches]


@pytest.mark.parametrize("world", [1, 3])
def test_workers_and_prefetch_change_nothing(world: int) -> None:
    for rank in range(world):
        here, elsewhere, far_ahead = (
            first(data().micro_batches(rank, world, workers, prefetch), 40)
            for workers, prefetch in ((0, 2), (2, 1), (3, 4))
        )
        for other in (elsewhere, far_ahead):
            assert rows_of(here) == rows_of(other)
            assert [step[1:] for step in here] == [step[1:] for step in other]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(("world", "other_world"), [(1, 4), (4, 3), (2, 2)])
def test_resume_on_another_world_size_continues_exactly(workers: int, world: int, other_world: int) -> None:
    whole = rows_of(first(data().micro_batches(0, 1), 90))
    before = [first(data().micro_batches(rank, world, workers), 10) for rank in range(world)]
    assert [rows for step in zip(*map(rows_of, before)) for rows in step] == whole[: 10 * world]
    assert all(rank[-1].state == before[0][-1].state for rank in before)
    state = json.loads(json.dumps(before[-1][-1].state))
    after = [first(data().micro_batches(r, other_world, workers, start=state), 10) for r in range(other_world)]
    assert [rows for step in zip(*map(rows_of, after)) for rows in step] == whole[10 * world :][: 10 * other_world]


def test_numbers_are_over_all_ranks() -> None:
    ranks = [first(data().micro_batches(rank, 4), 5) for rank in range(4)]
    for step in zip(*ranks):
        lengths = [micro.batch.sequence_length for micro in step]
        assert {micro.efficiency for micro in step} == {sum(lengths) / (4 * 300)}
        assert len({micro.imbalance for micro in step}) == 1
        assert 0 <= step[0].imbalance < 1
        assert set(step[0].epochs) == {"texts.one", "texts.two", "more.one", "more.two"}, "both groups have both names"


def test_a_state_of_other_data_is_refused_at_once() -> None:
    state = first(data().micro_batches(0, 1), 3)[-1].state
    for other in (data(fingerprint="b"), data(data_seed=7)):
        with pytest.raises(UserError, match="saved over other data"):
            other.micro_batches(0, 1, start=state)
    data(expected_num_tokens=200).micro_batches(0, 1, start=state)


@pytest.mark.parametrize("used", [40, 256])
@pytest.mark.parametrize("changed", [{"max_num_tokens": 250}, {"max_num_tokens": 350}, {"lookahead": 9}], ids=str)
def test_other_options_go_on_at_the_same_place_and_neither_lose_nor_repeat_a_row(
    used: int, changed: dict[str, int]
) -> None:
    """The remedy for full memory: lower max_num_tokens and start again with auto_resume."""
    old, new = data().planner, data(**changed).planner
    steps = list(itertools.islice(old.steps(1), used))
    state = json.loads(json.dumps(steps[-1].state))
    after = list(itertools.islice(new.steps(1, new.moved(state)), 700))
    assert after[0].state["packs"] == used + 1, "packs are counted on"
    assert max(pack.length for step in after for pack in step.packs) <= new.options.max_num_tokens
    found = Counter(row for step in [*steps, *after] for row in step.packs[0].rows)
    assert set(found.values()) == {1}, "nothing is repeated"
    assert set(found) == rows_used_before(new, new.moved(after[-1].state)["block"]), "nothing is lost"


def test_what_is_left_of_a_changed_block_waits_with_its_groups_in_step() -> None:
    """One group after the other would leave packs of one kind."""
    old, new = data().planner, data(max_num_tokens=250).planner
    state = list(itertools.islice(old.steps(1), 100))[-1].state
    groups = [group for group, *_ in new.moved(state)["block"]["carried"]]
    share = sum(groups) / len(groups)
    halves = [groups[: len(groups) // 2], groups[len(groups) // 2 :]]
    assert all(abs(sum(half) / len(half) - share) < 0.05 for half in halves)


def test_a_loader_under_other_budgets_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    state = first(data().micro_batches(0, 1), 3)[-1].state
    logging.getLogger("bagel_ds").propagate = True
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        moved = first(data(max_num_tokens=250).micro_batches(0, 1, start=state), 2)
    assert "continues at the same place in the data; no sample is lost or repeated" in caplog.text
    assert moved[-1].state["packs"] == 5


def test_what_trains_changes_costs_and_is_not_blamed_on_the_data(caplog: pytest.LogCaptureFixture) -> None:
    """Packs are chosen by costs, which depend on what is frozen."""
    state = first(data().micro_batches(0, 1), 3)[-1].state
    frozen = data(cost=CostModel.of(freezing=Freezing(freeze_llm=True)))
    logging.getLogger("bagel_ds").propagate = True
    with caplog.at_level(logging.INFO, "bagel_ds"):
        assert frozen.place(state) != state, "the plan is another"
        frozen.micro_batches(1, 2, start=state).close()
        assert caplog.messages == [], "rank 0 reports it"
        frozen.micro_batches(0, 2, start=state).close()
    (line,) = caplog.messages
    assert "The data plan changed since the checkpoint: the run continues" in line
    assert not any(word in line for word in ("budgets", "weights", "dropout", "tokenizer", "pictures"))


def test_the_fingerprint_tells_data_options_and_layout_apart() -> None:
    assert data().fingerprint == data().fingerprint
    others = [
        data(),
        data(fingerprint="b"),
        data("layout"),
        data(max_num_tokens=400),
        data(data_seed=7),
        data(lookahead=9),
    ]
    assert len({one.fingerprint for one in others}) == len(others)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_bug_while_materializing_is_not_hidden(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a bug in the worker"):
        next(data("broken").micro_batches(0, 1, workers))
    assert not worker_processes()


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("what", "error", "expected"),
    [
        (
            "killed",
            UserError,
            r"data worker 0 \(process \d+\) was ended by SIGKILL .*while it made a pack of one: /data/",
        ),
        (
            "exits",
            UserError,
            r"ended with code 3 while it made a pack of one: /\S+ row group 0 row \d+; .* more\.$",
        ),
        ("unsendable", RuntimeError, "(?s)data worker 0 .* failed while it made a pack of .*pickle"),
        ("limited", RuntimeError, "(?s)data worker 0 .* failed while it made a pack of .*File too large"),
        ("refused", UserError, "^this data can't be used$"),
        ("broken", RuntimeError, "(?s)stand_in.py.*RuntimeError: a bug in the worker"),
    ],
)
def test_a_worker_that_cannot_deliver_is_an_error_with_its_own_words(
    what: str, error: type[Exception], expected: str, at: int
) -> None:
    """At the first batch as at a later one."""
    batches = data((what, at)).micro_batches(0, 1, 2, prefetch_factor=1)
    assert len(list(itertools.islice(batches, 2 * (at - 1)))) == 2 * (at - 1)
    with pytest.raises(error, match=expected):
        next(batches)
    assert not worker_processes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of such a callback
@pytest.mark.parametrize("what", ["hangs", "stopped"])
def test_waiting_for_a_worker_that_hangs_can_be_interrupted(what: str) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptedError

    batches = data((what, 1)).micro_batches(0, 1, 2)
    before = signal.signal(signal.SIGALRM, interrupt)
    # Again after 20 s, because an exception that comes in a weakref's callback is lost.
    signal.setitimer(signal.ITIMER_REAL, 0.5, 20)
    try:
        with pytest.raises(InterruptedError):
            next(batches)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    batches.close()
    assert not worker_processes()


def test_closing_ends_the_workers_and_the_next_iteration_starts_anew() -> None:
    batches = data().micro_batches(0, 1, 2)
    next(batches)
    assert len(worker_processes()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not worker_processes()
    assert len(first(data().micro_batches(0, 1, 2), 3)) == 3


def test_workers_outlive_a_signal_to_the_process_group() -> None:
    """Stopping is the trainer's: it finishes its step, and needs its batches for that."""
    assert len(first(data("signals").micro_batches(0, 1, 2), 8)) == 8


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_are_pinned_for_the_gpu_of_this_rank(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the main thread where there are workers; a thread of its own begins with GPU 0."""
    gpus = {threading.get_ident(): 3}
    pinned_by: list[tuple[int, int | None]] = []

    def pin_memory(batch: PackedBatch) -> PackedBatch:
        thread = threading.get_ident()
        pinned_by.append((thread, gpus.get(thread)))
        return batch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: gpus.update({threading.get_ident(): device}))
    monkeypatch.setattr(PackedBatch, "pin_memory", pin_memory)
    taken = first(data().micro_batches(0, 1, workers, pin_memory=True), 4)
    assert rows_of(taken) == rows_of(first(data().micro_batches(0, 1), 4))
    assert len(pinned_by) >= 4 and {gpu for _, gpu in pinned_by} == {3}
    assert len({thread for thread, _ in pinned_by} - {threading.get_ident()}) == workers


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first(data().micro_batches(0, 1, 1), 2)
    assert torch.equal(torch.rand(1), expected)


def test_describe_says_rows_lengths_shares_and_budgets() -> None:
    lines = data().describe()
    assert len(lines) == 3
    for words in ("texts", "one, two", "200 rows", "1 unusable", "tokens per sample", "67%", "weight 1", "mandatory"):
        assert words in lines[0]
    assert "33%" in lines[1] and "mandatory" not in lines[1]
    assert "at most 300 tokens" in lines[2]


@pytest.mark.parametrize(("workers", "horizon"), [(1, 2), (1, 128), (3, 128), (2, 2)])
def test_a_worker_learns_each_of_its_rows_once_before_it_needs_it(
    workers: int, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "HORIZON", horizon)
    under_way: deque[Any] = deque()
    tasks = loader.planned_tasks(data().planner.steps(2), 1, 2, workers, under_way)
    coming: list[deque[tuple[int, int]]] = [deque() for _ in range(workers)]
    most_ahead = 0
    for turn in range(200):
        task = next(tasks)
        assert task.plans == under_way.popleft().packs[1].samples
        mine = coming[turn % workers]
        mine.extend(task.coming)
        assert [(plan.group, plan.row) for plan in task.plans] == [mine.popleft() for _ in task.plans]
        most_ahead = max(most_ahead, len(mine))
    assert most_ahead > 0 if horizon > 2 else most_ahead == 0
