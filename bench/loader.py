"""How fast one worker makes packs: ours, ours as it was, the original's way (bench/original_loader.py).

One command: `python bench/loader.py [--json]`. All make the same samples of the same files (t2i, edit pairs,
conversations; JPEG pictures of 512-1344 px) in one worker process each, and take turns, so that a busy machine slows
all. Times are of this machine; the ratios are what counts. The table of parts shows what bounds a worker: Pillow's
decoder, to which the pixels are bound. Pixels of the resize kernel are compared with Pillow's, all of them. "As it was"
is Pillow's resize with a malloc that returns every block of 1 MiB or more; beside it Pillow's resize alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from original_loader import OriginalPacks
from photo_sets import GROUPS, words, write_photo_sets
from torch.utils.data import DataLoader

from bagel_ds.data.batches.loader import PlannedData, planned_tasks
from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.config.dataset_config import load_dataset_config
from bagel_ds.data.files import rows as raw_rows
from bagel_ds.data.files.row_cache import LIMIT, GroupKey, ReadsRows, Row, RowCache
from bagel_ds.data.plan.planner import PackingOptions, Planner
from bagel_ds.data.samples import resize
from bagel_ds.data.samples.draws import normals
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import decode_rgb, resize_to_uint8
from bagel_ds.data.samples.sample import TEXT, VAE, Entry, SamplePlan
from bagel_ds.data.streams.opening import open_streams
from bagel_ds.data.streams.stream import GroupStream, SampleOptions
from bagel_ds.demo.tokenizer import train_tokenizer
from bagel_ds.model_folder.tokenizer import Tokenizer, load_tokenizer
from bagel_ds.processes import worker

BUDGETS = {"expected_num_tokens": 32768, "max_num_tokens": 36864}
PILLOW = {"BAGEL_DS_RESIZE": "pillow"}
OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "pillow_resize": PILLOW,
    "before": {**PILLOW, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22)},
}


def write_data(folder: Path, rows: int) -> None:
    """`rows` rows in each of three data sets, and a tokenizer."""
    rng = np.random.default_rng(0)
    write_photo_sets(folder, rows, rng)
    (folder / "tokenizer").mkdir()
    train_tokenizer([words(rng, 2000)], 600).save(str(folder / "tokenizer" / "tokenizer.json"))


def open_data(folder: Path) -> tuple[list[GroupStream], Tokenizer, PlannedData]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    no_dropout = {f"{kind}_cond_dropout_prob": 0.0 for kind in ("text", "vit", "vae")}
    config = load_dataset_config(str(folder / "data.yaml"))
    streams = open_streams(config, tokenizer, SampleOptions(**no_dropout), str(folder / "index"))
    data = PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(**BUDGETS), 0)
    return streams, tokenizer, data


class Cost(NamedTuple):
    """Seconds per sample: on the clock, and of the worker's processor (which other programs don't change)."""

    clock: float
    cpu: float


def cost_per_sample(packs: Iterable[Any], samples: Callable[[Any], int], warm: int = 2) -> Cost:
    """The clock runs from the pack after the first `warm`, which fill the queues. `packs` starts its own worker."""
    counts = []
    start = cpu = 0.0
    for number, pack in enumerate(packs):
        counts.append(samples(pack))
        if number == warm:
            start = time.perf_counter()
        cpu = worker_seconds()  # the last time when all is made, and the worker still there
    clock = time.perf_counter() - start
    return Cost(clock / sum(counts[warm + 1 :]), cpu / sum(counts))


def worker_seconds() -> float:
    """Processor time of this process's workers, without that of the server that ours are forked from."""
    found = psutil.Process().children(recursive=True)
    servers = {process.ppid() for process in found} - {psutil.Process().pid}
    return sum(sum(process.cpu_times()[:2]) for process in found if process.pid not in servers)


def ours(data: PlannedData, packs: int, way: str) -> Iterator[Any]:
    """In one of `OURS`: the variables of the server that forks the worker, which is started anew."""
    worker._close()
    os.environ.update(OURS[way])
    batches = data.micro_batches(0, 1, num_workers=1)
    for _ in range(packs):
        yield next(batches).batch
    batches.close()
    for name in OURS[way]:
        del os.environ[name]


def original(folder: Path, plans: list[tuple[SamplePlan, ...]], tokenizer: Tokenizer, masks: bool) -> DataLoader[Any]:
    numbers: dict[str, set[int]] = {name: set() for name in GROUPS}
    for plan in (plan for pack in plans for plan in pack):
        numbers[list(GROUPS)[plan.group]].add(plan.row)
    packs = OriginalPacks(folder, numbers, tokenizer, BUDGETS["expected_num_tokens"], BUDGETS["max_num_tokens"], masks)
    return DataLoader(packs, batch_size=None, num_workers=1, collate_fn=_as_is, prefetch_factor=2)


def _as_is(pack: Any) -> Any:
    return pack


def floor(streams: list[GroupStream], plans: list[tuple[SamplePlan, ...]], tokenizer: Tokenizer) -> dict[str, float]:
    """Milliseconds per sample of the parts of our work, in this process, and of Pillow's resize.

    Raises AssertionError where the kernel's pixels aren't Pillow's.
    """
    spent = dict.fromkeys(("read", "decode", "resize", "noise", "tokenise", "whole", "by Pillow"), 0.0)

    def timed(part: str, work: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        result = work(*given)
        spent[part] += time.perf_counter() - start
        return result

    for plan in (plan for pack in plans for plan in pack):
        timed("whole", materialize, [plan], streams, tokenizer, LayoutOptions(), 0)
        stream = streams[plan.group]
        row = timed("read", stream.read, plan)
        images = [timed("decode", decode_rgb, source) for source in row.images]
        for entry in plan.entries:
            if entry.kind == TEXT:
                timed("tokenise", tokenizer.encode, row.texts[entry.content])
                continue
            transform = stream.vae_transform if entry.kind == VAE else stream.vit_transform
            pixels = timed("resize", resize_to_uint8, images[entry.content], transform).permute(1, 2, 0)
            expected = timed("by Pillow", resize.by_pillow, images[entry.content], (entry.width, entry.height))
            assert torch.equal(pixels, expected), f"the kernel's pixels aren't Pillow's: {plan}"
            for drawn in range(1 + entry.loss if entry.kind == VAE else 0):
                timed("noise", normals, (entry.tokens, 64), "noise", drawn)
    count = sum(map(len, plans))
    parts = {part: 1000 * value / count for part, value in spent.items()}
    whole, by_pillow = parts.pop("whole"), parts.pop("by Pillow")
    return {**parts, "layout and rest": whole - sum(parts.values()), "whole": whole, "resize by Pillow": by_pillow}


class _Rows:
    """Row groups of equal rows, nothing in them: how often would each be read?"""

    def __init__(self, name: str, number: int, rows: int, group_rows: int) -> None:
        self.name, self.group, self.weight, self.is_mandatory = name, number, 1.0, False
        self.group_rows, self.rows = group_rows, rows
        self.units = [range(start, start + group_rows) for start in range(0, rows, group_rows)]

    def plan_sample(self, row: int, epoch: int) -> SamplePlan:
        return SamplePlan(self.group, epoch, row, (Entry(VAE, 0, 2000 + row % 3000, True, False, -1, 512, 512),))


def row_group_reads(group_rows: int, world_size: int, workers: int) -> dict[str, float]:
    """Reads of a row group per worker that needs rows of it, over an epoch of three data sets with rows of 200 kB.

    Rows are stand-ins of 200 bytes, and memory is counted so much smaller. The first window, while workers
    know little of what comes, is part of it.
    """
    streams: Any = [_Rows(str(i), i, 16 * max(group_rows, 1000), group_rows) for i in range(3)]
    planner = Planner(streams, PackingOptions(**BUDGETS))
    limit = LIMIT * 400 // 200_000  # a stand-in of 200 bytes counts 400

    def reader(worker: int) -> ReadsRows:
        def read(key: GroupKey) -> Iterator[Callable[[], Row]]:
            reads[worker, key] += 1
            return ((lambda: {"x": bytes(200)}) for _ in range(group_rows))

        return read

    reads: Counter[tuple[int, GroupKey]] = Counter()
    caches = [RowCache(reader(worker), limit) for worker in range(workers)]
    under_way: deque[Any] = deque()
    tasks = planned_tasks(planner.steps(world_size), 0, world_size, workers, under_way)
    most = 0

    def key(group: int, row: int) -> tuple[GroupKey, int]:
        return GroupKey(str(group), row // group_rows, ()), row % group_rows

    turn = 0
    while True:
        task, cache = next(tasks), caches[turn % workers]
        step = under_way.popleft()
        for group, row in task.coming:
            cache.expect(*key(group, row))
        for plan in task.plans:
            cache.row(*key(plan.group, plan.row), ("", 0, 0))
        most = max(most, cache.bytes)
        turn += 1
        if min(step.epochs.values()) >= 1:
            break
    return {"reads": reads.total() / len(reads), "most_mb": most / 400 * 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", type=int, default=120, help="rows of each of the three data sets")
    parser.add_argument("--packs", type=int, default=24, help="packs to make")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the original's way")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each of our ways")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if fault := resize.prepare():
        raise SystemExit(f"the resize kernel can't be measured: {fault}")
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), arguments.rows, arguments.packs, arguments.rounds, arguments.pairs)
    report["row_groups"] = [
        {"group_rows": rows, "world_size": world, "workers": workers, **row_group_reads(rows, world, workers)}
        for rows in (100, 1000)
        for world, workers in ((1, 1), (1, 4), (8, 4))
    ]
    print(json.dumps(report) if arguments.json else describe(report))


def measure(folder: Path, rows: int, packs: int, rounds: int, pairs: int) -> dict[str, Any]:
    write_data(folder, rows)
    streams, tokenizer, data = open_data(folder)
    steps = data.planner.steps(1)
    plans = [next(steps).packs[0].samples for _ in range(packs)]
    ways: dict[str, list[Cost]] = {way: [] for way in (*OURS, "original", "original_flex")}
    for turn in range(max(rounds, pairs)):
        for way in OURS if turn < pairs else ():
            ways[way].append(cost_per_sample(ours(data, packs, way), lambda batch: len(batch.sample_lens)))
        for way, masks in (("original", True), ("original_flex", False)) if turn < rounds else ():
            loader = original(folder, plans, tokenizer, masks)
            ways[way].append(cost_per_sample(loader, lambda pack: len(pack["sample_lens"])))
    best = {way: Cost(*map(min, zip(*costs, strict=True))) for way, costs in ways.items()}
    raw_rows.forget_open_files()

    def gain(way: str) -> dict[str, float]:
        """How many times as many samples per second of the processor ours makes, of turns beside each other."""
        found = [slow.cpu / fast.cpu for fast, slow in zip(ways["ours"], ways[way], strict=True)]
        return {"median": median(found), "least": min(found), "most": max(found)}

    return {
        "samples": sum(map(len, plans)),
        "samples_per_second": {way: 1 / cost.clock for way, cost in best.items()},
        "samples_per_cpu_second": {way: 1 / cost.cpu for way, cost in best.items()},
        "cpu_ratio_to_before": gain("before"),
        "cpu_ratio_to_pillow_resize": gain("pillow_resize"),
        "ratio": best["original"].clock / best["ours"].clock,
        "ratio_without_masks": best["original_flex"].clock / best["ours"].clock,
        "cpu_ratio": best["original"].cpu / best["ours"].cpu,
        "cpu_ratio_without_masks": best["original_flex"].cpu / best["ours"].cpu,
        "ms_per_sample": floor(streams, plans, tokenizer),
    }


def describe(report: dict[str, Any]) -> str:
    speed, parts = report["samples_per_second"], report["ms_per_sample"]
    cpu, gains = report["samples_per_cpu_second"], (report["cpu_ratio_to_before"], report["cpu_ratio_to_pillow_resize"])
    before, pillow = (f"{gain['median']:.2f} ({gain['least']:.2f} to {gain['most']:.2f})" for gain in gains)
    lines = [
        f"{report['samples']} samples, one worker, samples per second (per second of the worker's processor):",
        f"  ours                             {speed['ours']:6.1f} ({cpu['ours']:.1f})",
        f"  ours, Pillow's resize            {speed['pillow_resize']:6.1f} ({cpu['pillow_resize']:.1f})",
        f"  ours before                      {speed['before']:6.1f} ({cpu['before']:.1f})",
        f"  original, dense masks            {speed['original']:6.1f} ({cpu['original']:.1f})",
        f"  original, use_flex: no masks     {speed['original_flex']:6.1f} ({cpu['original_flex']:.1f})",
        f"  ratio to the original {report['ratio']:.2f} ({report['cpu_ratio']:.2f}), without masks"
        f" {report['ratio_without_masks']:.2f}"
        f" ({report['cpu_ratio_without_masks']:.2f})",
        f"  per second of the processor, median of turns beside each other: {before} times as many as before,",
        f"  {pillow} times as many as with Pillow's resize; equal pixels",
        "milliseconds per sample in our worker, without the way to the main process:",
        *(f"  {part:16s} {value:6.2f}" for part, value in parts.items()),
        f"  decode and resize are {(parts['decode'] + parts['resize']) / parts['whole']:.0%} of it",
        "reads of a row group per worker that uses it, rows of 200 kB, three data sets,",
        f"  {LIMIT // 10**6} MB per worker:",
    ]
    for case in report["row_groups"]:
        shape = f"row groups of {case['group_rows']}, {case['world_size']} ranks x {case['workers']} workers"
        lines.append(f"  {shape:42s} {case['reads']:.2f} reads, at most {case['most_mb']:.0f} MB kept")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
