"""From the plan to this rank's batches.

Guarantees: global micro-step m runs packs [m*W, (m+1)*W), rank r the r-th, whatever the number of workers and the
prefetch; each batch comes with the state after its step, from which any number of ranks continues with exactly the
next packs. Planning happens in the main process, reading and decoding in workers, which hold no state and no index: a
worker is a function from a pack's plan, and where its rows lie, to its tensors. It gets the rows of its next packs in
advance, so that it reads a row group once for all of them (files/row_cache.py). Closing the iterator ends its workers.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from contextlib import closing
from itertools import count
from typing import Any, Generator, Iterator, NamedTuple, Sequence

from bagel_ds.data.batches.batch_workers import worker_batches
from bagel_ds.data.batches.materialize import BatchMaker, LayoutOptions, PackTask, dataset_labels
from bagel_ds.data.index.data_file import DataFile
from bagel_ds.data.plan.cost import CostModel
from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.plan.planner import MicroStep, PackingOptions, Planner, digest_of
from bagel_ds.data.plan.row_order import ROW_ORDER
from bagel_ds.data.plan.rules import ALGORITHM, UNNAMED_ALGORITHM
from bagel_ds.data.samples.sample import SamplePlan
from bagel_ds.data.streams.opening import files_ahead
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.errors import UserError
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import Tokenizer

logger = logging.getLogger("bagel_ds")

__all__ = ["MicroBatch", "PackingOptions", "PlannedData"]


class MicroBatch(NamedTuple):
    """One rank's share of a global micro-step, with numbers over all ranks (equal on all of them)."""

    batch: PackedBatch
    state: dict[str, Any]  # after this step: resuming from it gives exactly the next packs
    efficiency: float  # mean fill of the step's packs, 0..1 of max_num_tokens
    imbalance: float  # max / mean - 1 of the packs' language-model cost
    epochs: dict[str, float]  # by dataset, that of its group: 0.37 = 37 % of the first epoch planned


# Packs of all ranks that are planned ahead so that workers know their next rows: about one window of the shuffle
# (1024 rows of each of several groups). The distance grows from the start, by so many packs with each, so that the
# first batch doesn't wait for it.
HORIZON, HORIZON_GROWTH = 1024, 32


class _Task(NamedTuple):
    """A pack, and (group, row) of what the same worker will read later, in that order."""

    plans: tuple[SamplePlan, ...]
    coming: tuple[tuple[int, int], ...]


def planned_tasks(
    steps: Iterator[MicroStep], rank: int, world_size: int, workers: int, under_way: deque[MicroStep]
) -> Iterator[_Task]:
    """The tasks of `rank`, which its workers take in turns; a step joins `under_way` as its task is taken.

    Each pack's rows are announced once, to the worker that will run it, at most HORIZON packs of all ranks before.
    """
    horizon, growth = max(HORIZON // world_size, 1), max(HORIZON_GROWTH // world_size, 4)
    ahead: deque[MicroStep] = deque()
    announced: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
    for turn in count():
        while len(ahead) < min(horizon, growth * turn + workers) or not ahead:
            step = next(steps)
            announced[(turn + len(ahead)) % workers] += [(plan.group, plan.row) for plan in step.packs[rank].samples]
            ahead.append(step)
        coming, announced[turn % workers] = announced[turn % workers], []
        under_way.append(ahead.popleft())
        yield _Task(under_way[-1].packs[rank].samples, tuple(coming))


class PlannedData:
    """The data of a run: the plan, and this rank's batches of it."""

    def __init__(
        self,
        streams: Sequence[GroupStream],
        tokenizer: Tokenizer,
        layout_options: LayoutOptions,
        packing: PackingOptions,
        noise_seed: int,
        cost: CostModel | None = None,
    ) -> None:
        cost = cost or CostModel.of()
        self.planner = Planner(streams, packing, cost)
        self.streams = tuple(streams)
        self.tokenizer = tokenizer
        self._maker = BatchMaker.of(streams, tokenizer, layout_options, noise_seed)
        self._labels = dataset_labels(streams)
        groups = [(s.name, s.weight, s.is_mandatory, s.fingerprint) for s in streams]
        budgets = (packing.max_num_tokens, packing.lookahead, packing.data_seed)
        self._rows = digest_of([ROW_ORDER, packing.data_seed, [s.rows_fingerprint for s in streams]])
        self.fingerprint = digest_of(
            [ALGORITHM, groups, budgets, cost, self.planner.mean_lengths, noise_seed, layout_options]
        )

    @property
    def datasets(self) -> list[str]:
        """The datasets as metrics name them, in an order that is the same on every rank."""
        return list(self._labels.values())

    def describe(self) -> list[str]:
        """Lines for the run's plan: each group's rows, length and share, then how they are packed."""
        total = sum(stream.weight for stream in self.streams)
        lines = []
        for stream, tokens in zip(self.streams, self.planner.mean_lengths, strict=True):
            share = f"{stream.weight / total:.0%} of the draws by weight {stream.weight:g}" if total else "weight 0"
            lines.append(
                f"data {stream.name} ({', '.join(stream.datasets)}): {sum(map(len, stream.units)):,} rows, "
                f"{len(stream.unusable):,} unusable, about {tokens:,.0f} tokens per sample, {share}"
                + (", and one draw per pack (mandatory)" if stream.is_mandatory else "")
            )
        planner, options = self.planner, self.planner.options
        lines.append(
            f"packs of at most {options.max_num_tokens:,} tokens chosen among {planner.rules.window} samples, blocks "
            f"of {planner.rules.block}, data_seed {options.data_seed}, plan {self.fingerprint}"
        )
        return lines

    def packs(self, start: dict[str, Any] | None = None) -> Iterator[tuple[Pack, PackedBatch]]:
        """The global sequence of packs, without end, built in this process one by one: for inspection only."""
        for step in self.planner.steps(1, start):
            yield step.packs[0], self._maker(self._located(_Task(step.packs[0].samples, ())))

    def files_ahead(self, start: dict[str, Any] | None = None) -> list[DataFile]:
        """Files that are not indexed yet, in the order in which a run from `start` on will need them."""
        cursors = start["block"]["groups"] if start else None
        return files_ahead(self.streams, self.planner.options.data_seed, cursors)

    def unusable_rows(self) -> dict[str, int]:
        """Unusable rows by dataset: of the files indexed so far, and those that planning found."""
        found: Counter[tuple[int, str]] = Counter()
        for number, stream in enumerate(self.streams):
            found.update({(number, dataset): count for dataset, count in stream.unusable.counts().items()})
        return {label: found[key] for key, label in self._labels.items()}

    def micro_batches(
        self,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        start: dict[str, Any] | None = None,
    ) -> Generator[MicroBatch, None, None]:
        """Batches of `rank`, without end, from the beginning or from the `state` of an earlier `MicroBatch`.

        Under other options than the state's (budgets, weights, dropout, what trains) it continues at the same place in
        the data, see `Planner.moved`. Raises `UserError` at once where `start` belongs to other data.
        """
        place = self.place(start)
        if start and rank == 0:
            _log_changes(start, place is start)
        under_way: deque[MicroStep] = deque()
        steps = self.planner.steps(world_size, place)
        tasks = planned_tasks(steps, rank, world_size, max(num_workers, 1), under_way)
        return self._iterate(tasks, under_way, num_workers, prefetch_factor, pin_memory)

    def place(self, start: dict[str, Any] | None) -> dict[str, Any] | None:
        """`start` where this plan continues it exactly, else the same place in the data. Raises `UserError`."""
        if not start:
            return start
        if start.get("rows") != self._rows:
            raise UserError(
                f"The training state was saved over other data ({start.get('rows')}) than this run's ({self._rows}): "
                "the data files or data_seed changed, so its place in the data has no meaning here. Restore them, or "
                "start from its weights only (--resume_from ... --resume_model_only True with a new checkpoint_dir)."
            )
        return start if self.planner.plans_again(start) else self.planner.moved(start)

    def _iterate(
        self,
        tasks: Iterator[_Task],
        under_way: deque[MicroStep],
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool,
    ) -> Generator[MicroBatch, None, None]:
        located = map(self._located, tasks)
        if num_workers:
            batches = worker_batches(self._maker, located, num_workers, prefetch_factor, pin_memory)
        else:
            made = map(self._maker, located)
            batches = (batch.pin_memory() if pin_memory else batch for batch in made)
        with closing(batches):
            for batch in batches:
                yield self._micro_batch(batch, under_way.popleft())

    def _located(self, task: _Task) -> PackTask:
        """The task with all that only the index knows."""
        addresses = tuple(self.streams[plan.group].address(plan.row) for plan in task.plans)
        coming = tuple((group, self.streams[group].address(row)) for group, row in task.coming)
        return PackTask(task.plans, addresses, coming)

    def _micro_batch(self, batch: PackedBatch, step: MicroStep) -> MicroBatch:
        tokens = sum(pack.length for pack in step.packs)
        return MicroBatch(
            batch,
            {"rows": self._rows, **step.state},
            efficiency=tokens / (len(step.packs) * self.planner.options.max_num_tokens),
            imbalance=step.imbalance_llm,
            epochs={label: step.epochs[self.streams[number].name] for (number, _), label in self._labels.items()},
        )


def _log_changes(start: dict[str, Any], is_exact: bool) -> None:
    """One line where a resumed run's plan differs from that of the run that saved `start`."""
    algorithm = start["block"].get("algorithm", UNNAMED_ALGORITHM)
    if not is_exact:
        repeated = start["packs"] - start["block"]["first"] if "used" not in start else 0
        logger.warning(
            "The data plan changed since the checkpoint: the run continues at the same place in the data; %s",
            f"the samples of {repeated} packs are used a second time" if repeated else "no sample is lost or repeated",
        )
    elif algorithm != ALGORITHM:
        logger.info(
            "The checkpoint's data plan is of version %d: its block of packs is finished as it was planned, no sample "
            "is lost or repeated, and version %d plans the following ones",
            *(algorithm, ALGORITHM),
        )


def primed(batches: Generator[MicroBatch, None, None]) -> Generator[MicroBatch, None, None]:
    """The same batches, with the first one fetched (and the workers started) now; closing this closes `batches`."""
    first = next(batches)

    def all_of_them() -> Generator[MicroBatch, None, None]:
        with closing(batches):
            yield first
            yield from batches

    return all_of_them()
