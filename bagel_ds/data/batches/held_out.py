"""A held-out split for evaluation: every row once, in packs that never change.

Guarantees: packs, choices, noise and timesteps depend on the files, the token budgets and the tokenizer only, so that
losses are comparable between steps, runs and numbers of ranks. No condition is dropped. Every rank gets the same number
of batches; the last ones may be empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice, repeat

from bagel_ds.data.batches.batch_workers import worker_batches
from bagel_ds.data.batches.materialize import BatchMaker, LayoutOptions, PackTask, dataset_labels
from bagel_ds.data.plan.planner import digest_of
from bagel_ds.data.samples.sample import SamplePlan
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import Tokenizer

SEED = 20260101  # of all draws; changing it makes new losses incomparable with old ones

Plans = tuple[SamplePlan, ...]


def held_out_options(options: SampleOptions) -> SampleOptions:
    """The options with which the streams of a `HeldOut` are opened: no dropout, and draws of `SEED`."""
    return dataclasses.replace(
        options, seed=SEED, text_cond_dropout_prob=0.0, vit_cond_dropout_prob=0.0, vae_cond_dropout_prob=0.0
    )


class HeldOut:
    """The packs of a split. `max_packs` above 0 takes only so many of them, evenly spread."""

    def __init__(
        self,
        streams: Sequence[GroupStream],
        tokenizer: Tokenizer,
        layout: LayoutOptions,
        max_num_tokens: int,
        max_packs: int = 0,
    ) -> None:
        self.streams = tuple(streams)
        self._maker = BatchMaker.of(streams, tokenizer, layout, SEED)
        self.packs = _spread(list(_filled(_samples(streams), max_num_tokens)), max_packs)
        self.datasets = list(dataset_labels(streams).values())
        rows = [[(plan.group, plan.row) for plan in pack] for pack in self.packs]
        self.rows = sum(map(len, rows))
        self.fingerprint = digest_of([SEED, layout, [stream.fingerprint for stream in streams], rows])

    def count(self, world_size: int) -> int:
        """Batches of each rank."""
        return -(-len(self.packs) // world_size)

    def batches(
        self, rank: int = 0, world_size: int = 1, workers: int = 0, prefetch: int = 2, pin_memory: bool = False
    ) -> Generator[PackedBatch, None, None]:
        """This rank's batches, on the CPU, made by `workers` processes or by this one. Close it to end the workers."""
        tasks = chain(map(self._task, self.packs[rank::world_size]), repeat(PackTask((), ())))
        count = self.count(world_size)
        if not workers:
            yield from (batch.pin_memory() if pin_memory else batch for batch in map(self._maker, islice(tasks, count)))
            return
        with closing(worker_batches(self._maker, tasks, workers, prefetch, pin_memory)) as batches:
            yield from islice(batches, count)

    def _task(self, plans: Plans) -> PackTask:
        return PackTask(plans, tuple(self.streams[plan.group].address(plan.row) for plan in plans))


def _samples(streams: Iterable[GroupStream]) -> Iterator[SamplePlan]:
    """The sample of every usable row, in the order of the files."""
    for stream in streams:
        for row in chain.from_iterable(stream.distinct_rows):
            plan = stream.plan_sample(row, 0)
            if plan is not None:
                yield plan


def _filled(samples: Iterable[SamplePlan], max_num_tokens: int) -> Iterator[Plans]:
    """Neighbors together, as many as fit: reading stays sequential."""
    pack: list[SamplePlan] = []
    length = 0
    for sample in samples:
        if pack and length + sample.length > max_num_tokens:
            yield tuple(pack)
            pack, length = [], 0
        pack.append(sample)
        length += sample.length
    if pack:
        yield tuple(pack)


def _spread(packs: list[Plans], most: int) -> tuple[Plans, ...]:
    """All packs, or `most` of them from all over the split."""
    if not 0 < most < len(packs):
        return tuple(packs)
    return tuple(packs[number * len(packs) // most] for number in range(most))
