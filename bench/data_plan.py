"""How full packs are, how equal ranks are, how long planning takes: ours beside the original's greedy rules.

One command: `python bench/data_plan.py [--json]`. The data are synthetic indexes (image sizes and text lengths,
nothing to decode) of a mix like bagel_example: t2i of 512-1344 px, edit pairs and chains, vlm with 1-4 turns; samples
of about 1,000 to 11,000 tokens, t2i and vlm mandatory, equal weights; once 60,000 rows, once 660. Only this file has
the original's rules, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple, Protocol, Sequence

import numpy as np

from bagel_ds.data.plan.cost import CostModel, work_of
from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.plan.planner import PackingOptions, Planner, imbalance
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, Entry, SamplePlan

BUDGETS = ((10240, 11520, 10240), (32768, 36864, 16384))  # expected, max, per sample
SMALL_ROWS = (200, 160, 300)
UNIT_ROWS = 100  # rows per row group, at most
SPEED_TITLES = ("samples", "limit", "seconds", "cpu s", "us/sample", "peak MiB", "index MiB")
LEGEND = """fill: tokens / max_num_tokens
llm, vision: the slowest rank's cost / the mean cost - 1, mean over steps
short: packs below expected_num_tokens
lacking: packs with a sample so long that a mandatory group has no room
lost: samples dropped for good
wait: packs that the longest-waiting sample saw leave before it
"""


def resized(sides: np.ndarray, stride: int, longest: int, shortest: int) -> np.ndarray:
    """Image sides [n, 2] in pixels after the original's resize rule, without its limit on the area."""
    scale = np.minimum(longest / sides.max(1), 1.0)
    scale = np.maximum(scale, shortest / sides.min(1))
    return np.maximum(stride, np.rint(np.rint(sides * scale[:, None]) / stride).astype(np.int64) * stride)


@dataclass
class SyntheticGroup:
    """A stream over arrays; what the planner sees of an indexed data set."""

    name: str
    weight: float
    is_mandatory: bool
    limit: int  # tokens per sample
    sizes: np.ndarray  # [rows, 2] image sides in pixels before any resize
    texts: np.ndarray  # [rows, pieces] token counts, 0 where there is none
    frames: np.ndarray  # [rows] images of an edit chain
    group: int  # counts the groups

    def __post_init__(self) -> None:
        rows = len(self.sizes)
        unit = min(UNIT_ROWS, rows // 16)  # the original gives whole row groups to ranks
        self._units = [range(start, min(start + unit, rows)) for start in range(0, rows, unit)]
        self._vae = resized(self.sizes, 16, 1024, 512)
        vit = (14, 980, 378) if self.name == "vlm_sft" else (14, 518, 224)
        self._vit = resized(self._vae if self.name == "unified_edit" else self.sizes, *vit)

    @property
    def units(self) -> Sequence[range]:
        return self._units

    def plan_sample(self, row: int, epoch: int) -> SamplePlan | None:
        height, width = self._vae[row].tolist()
        texts = self.texts[row].tolist()
        noised = Entry(VAE, 1, height * width // 256, loss=True, height=height, width=width)
        if self.name == "t2i_pretrain":
            entries = [Entry(TEXT, 0, texts[0], dropped=stable_draw(row, epoch) < 0.1), noised]
        else:
            rows, columns = self._vit[row].tolist()
            vit = Entry(VIT, 0, rows * columns // 196, height=rows, width=columns)
            if self.name == "vlm_sft":
                entries = [vit] + [Entry(TEXT, i, n, loss=i % 2 == 1) for i, n in enumerate(texts) if n]
            else:
                clean = noised._replace(loss=False)
                entries = [clean, vit]
                for step in range(int(self.frames[row]) - 1):
                    entries += [clean, vit] if step else []
                    entries += [Entry(TEXT, step, texts[step]), noised]
        plan = SamplePlan(self.group, epoch, row, tuple(entries))
        return plan if plan.length <= self.limit else None


def stable_draw(row: int, epoch: int) -> float:
    """A number in [0, 1)."""
    return ((row * 2654435761 + epoch * 40503 + 12345) % 4294967296) / 4294967296


def mix(samples: int, limit: int, seed: int = 0) -> list[SyntheticGroup]:
    """Three groups of equal size, `samples` rows together."""
    return groups_of((samples // 3,) * 3, limit, [2, 2, 2, 3, 4], seed)


def small_mix(limit: int, seed: int = 0) -> list[SyntheticGroup]:
    """660 rows, as in a small fine-tuning set: 200 t2i, 160 edits of 2 to 4 pictures, 300 conversations."""
    return groups_of(SMALL_ROWS, limit, [2, 3, 4], seed)


def groups_of(rows: tuple[int, int, int], limit: int, frames: list[int], seed: int) -> list[SyntheticGroup]:
    """t2i, edits and conversations; `frames` are the numbers of pictures of an edit, all equally likely."""
    draw = np.random.default_rng(seed)
    t2i, edits, talks = rows

    def sizes(count: int, shortest: int = 512) -> np.ndarray:
        return draw.integers(shortest, 1345, (count, 2), np.int32)

    turns = draw.integers(1, 5, talks)
    talk_texts = draw.integers(20, 400, (talks, 8), np.int32) * (np.arange(8) < 2 * turns[:, None])
    pictures = draw.choice(frames, edits)
    captions, instructions = draw.integers(20, 200, (t2i, 1), np.int32), draw.integers(8, 60, (edits, 3), np.int32)
    talk_sizes = sizes(talks, 280)
    return [
        SyntheticGroup("t2i_pretrain", 1.0, True, limit, sizes(t2i), captions, np.zeros(t2i, np.int32), 0),
        SyntheticGroup("unified_edit", 1.0, False, limit, sizes(edits), instructions, pictures, 1),
        SyntheticGroup("vlm_sft", 1.0, True, limit, talk_sizes, talk_texts, np.zeros(talks, np.int32), 2),
    ]


class Sized(Protocol):
    """All that the greedy rules look at."""

    @property
    def length(self) -> int: ...


class Greedy:
    """One rank of the original's online packer: batches of endless `rows`, one iterator per group."""

    def __init__(
        self,
        rows: Sequence[Iterator[Any]],
        weights: Sequence[float],
        mandatory: Sequence[bool],
        budgets: tuple[int, int, int],
        seed: int,
        buffer_size: int = 50,
        prefer_buffer_before: int = 16384,
    ) -> None:
        self.rows, self.mandatory, self.lost = rows, mandatory, 0
        self.shares = [sum(weights[: i + 1]) / sum(weights) for i in range(len(weights))]
        self.expected, self.limit, self.per_sample = budgets
        self.buffer_size, self.prefer_buffer_before = buffer_size, prefer_buffer_before
        self.random = random.Random(seed)

    def packs(self) -> Iterator[list[Any]]:
        """A batch leaves at `expected` tokens, or when a sample neither fits nor finds room to wait (it is lost)."""
        buffer: deque[Sized] = deque()
        pack = self._mandatory()
        while True:
            length = sum(sample.length for sample in pack)
            buffered = bool(buffer) and length < self.prefer_buffer_before
            sample = buffer.popleft() if buffered else self._weighted()
            if sample.length > self.per_sample:
                continue
            if length + sample.length <= self.limit:
                pack.append(sample)
                if length + sample.length < self.expected:
                    continue
            elif len(buffer) < self.buffer_size and not buffered:
                buffer.append(sample)
                continue
            else:
                self.lost += 1
            yield pack
            pack = self._mandatory()

    def _mandatory(self) -> list[Sized]:
        groups = [rows for rows, mandatory in zip(self.rows, self.mandatory) if mandatory]
        return [next(sample for sample in rows if sample.length < self.per_sample) for rows in groups]

    def _weighted(self) -> Sized:
        draw = self.random.random()
        return next(next(rows for rows, share in zip(self.rows, self.shares) if draw < share))


def share_of_rows(group: SyntheticGroup, rank: int, world: int) -> Iterator[SamplePlan]:
    """The rows of one rank, for ever."""
    units = group.units[rank * len(group.units) // world : (rank + 1) * len(group.units) // world]
    for epoch in itertools.count():
        for row in itertools.chain.from_iterable(units):
            plan = group.plan_sample(row, epoch)
            if plan:
                yield plan


class Line(NamedTuple):
    """One row of the result. Costs are over steps of `world` packs: mean of max / mean - 1."""

    rules: str
    limit: int
    world: int
    fill: float
    imbalance_llm: float
    imbalance_vision: float
    short: float  # share of packs below expected_num_tokens
    without_mandatory: float  # share of packs that lack a mandatory group, for want of room
    lost_samples: int
    max_wait: int  # packs


def summary(rules: str, budgets: tuple[int, int, int], world: int, steps: list[Sequence[Pack]], lost: int) -> Line:
    """Numbers over global steps of one pack per rank."""
    expected, limit, _ = budgets
    lengths = np.array([[pack.length for pack in step] for step in steps])
    llm, vision = (
        sum(imbalance([getattr(pack, what) for pack in step]) for step in steps) / len(steps)
        for what in ("llm", "vision")
    )
    packs = [pack for step in steps for pack in step]
    return Line(
        rules,
        limit,
        world,
        float(lengths.mean() / limit),
        llm,
        vision,
        short=float((lengths < expected).mean()),
        without_mandatory=sum(pack.missing > 0 for pack in packs) / len(packs),
        lost_samples=lost,
        max_wait=max(pack.waited for pack in packs),
    )


def priced(plans: list[SamplePlan], cost: CostModel) -> Pack:
    """A greedy pack with its costs."""
    costs = [cost.price(work_of(plan)) for plan in plans]
    length = sum(plan.length for plan in plans)
    return Pack(tuple(plans), length, sum(c.llm for c in costs), sum(c.vision for c in costs), 0, 0)


def compare(make: Callable[[int], list[SyntheticGroup]], packs: int, worlds: Sequence[int]) -> list[Line]:
    """Both rules at both budgets on the same rows; `make` gives the groups for a limit of tokens per sample."""
    lines, cost = [], CostModel.of()
    for budgets in BUDGETS:
        groups = make(budgets[2])
        settings = [group.weight for group in groups], [group.is_mandatory for group in groups]
        for world in worlds:
            ranks = [
                Greedy([share_of_rows(group, rank, world) for group in groups], *settings, budgets, seed=rank)
                for rank in range(world)
            ]
            streams = [rank.packs() for rank in ranks]
            greedy = [[priced(next(stream), cost) for stream in streams] for _ in range(packs // world)]
            lines.append(summary("original", budgets, world, greedy, sum(rank.lost for rank in ranks)))
            planner = Planner(groups, PackingOptions(budgets[1], budgets[0]))
            ours = [step.packs for step in itertools.islice(planner.steps(world), packs // world)]
            lines.append(summary("ours", budgets, world, ours, 0))
    return lines


def speed(samples: int, budgets: tuple[int, int, int]) -> dict[str, float]:
    """Seconds and peak memory to plan one epoch of `samples`; run in a process of its own."""
    groups = mix(samples, budgets[2])
    index_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin, cpu = time.perf_counter(), time.process_time()
    planned = packs = 0
    for step in Planner(groups, PackingOptions(budgets[1], budgets[0])).steps(8):
        packs += len(step.packs)
        planned += sum(len(pack.samples) for pack in step.packs)
        if planned >= samples:
            break
    return {
        "samples": planned,
        "packs": packs,
        "limit": budgets[1],
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "of_it_index_mib": index_mib,
    }


def show(lines: list[Line], small: list[Line], speeds: list[dict[str, float]]) -> None:
    """The results as tables."""
    titles = ("rules", "limit", "ranks", "fill", "llm", "vision", "short", "lacking", "lost", "wait")
    for name, table in (("60,000 rows", lines), (f"{sum(SMALL_ROWS)} rows", small)):
        print(name)
        print("{:9}{:>6}{:>6}{:>9}{:>9}{:>9}{:>8}{:>8}{:>6}{:>6}".format(*titles))
        for line in table:
            print("{:9}{:6}{:6}{:9.2%}{:9.2%}{:9.2%}{:8.2%}{:8.2%}{:6}{:6}".format(*line))
    print(LEGEND)
    print("{:>9}{:>7}{:>9}{:>9}{:>10}{:>10}{:>10}".format(*SPEED_TITLES))
    for run in speeds:
        numbers = (run["seconds"], run["cpu_seconds"], run["seconds"] / run["samples"] * 1e6)
        print("{:9,}{:7}".format(run["samples"], run["limit"]), *(f"{number:8.1f}" for number in numbers), end="")
        print("{:11.0f}{:10.0f}".format(run["peak_mib"], run["of_it_index_mib"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--packs", type=int, default=8192, help="packs per comparison")
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 8], help="numbers of ranks")
    parser.add_argument("--sizes", type=int, nargs="*", default=[60_000, 600_000], help="samples to time, e.g. 6000000")
    arguments = parser.parse_args()
    lines = compare(lambda limit: mix(60_000, limit), arguments.packs, arguments.worlds)
    small = compare(small_mix, arguments.packs // 8, arguments.worlds)
    # A fresh process each, so that peak memory is that run's own.
    context = multiprocessing.get_context("spawn")
    speeds = []
    for size, budgets in itertools.product(arguments.sizes, BUDGETS):
        with context.Pool(1) as pool:
            speeds.append(pool.apply(speed, (size, budgets)))
    if arguments.json:
        found = {"packing": lines, "packing of 660 rows": small}
        print(
            json.dumps({name: [line._asdict() for line in lines] for name, lines in found.items()} | {"speed": speeds})
        )
    else:
        show(lines, small, speeds)


if __name__ == "__main__":
    main()
