"""How good the plan is: fill, balance between ranks, waiting, and whether any sample was lost.

Guarantees: numbers are of the plan that training would run, from its beginning; nothing is read or decoded. `dropped`
is audited: all rows that the cursors of the state have passed are listed again and looked for in the packs.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Iterable, NamedTuple

from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.plan.planner import Planner
from bagel_ds.data.plan.row_order import RowOrder

_Key = tuple[int, int, int]  # group, epoch, row


class PlanNumbers(NamedTuple):
    """Of `steps` micro-steps on `world_size` ranks. An imbalance is max / mean - 1 over ranks, meaned over steps."""

    world_size: int
    steps: int
    packs: int
    samples: int
    tokens: int
    packing_efficiency: float  # tokens / (packs * max_num_tokens)
    imbalance_llm: float  # of the language model's work
    imbalance_vision: float  # of ViT and VAE
    short_packs: int  # below expected_num_tokens
    packs_lacking_mandatory: int  # no room for a mandatory group
    max_wait: int  # packs that the longest-waiting sample saw leave before it
    dropped: int  # samples within the limits that the plan lost
    skipped_rows: int  # rows passed that give no sample: unusable, or longer than max_num_tokens_per_sample
    epochs: dict[str, float]  # by group, planned
    samples_by_group: dict[str, int]


def plan_numbers(data: PlannedData, world_size: int, steps: int) -> PlanNumbers:
    """Plan `steps` micro-steps (at least 1) of `world_size` ranks and measure them."""
    planner = data.planner
    limit, expected = planner.options.max_num_tokens, planner.options.expected_num_tokens
    packs: list[Pack] = []
    llm = vision = 0.0
    plan = planner.steps(world_size)
    for _ in range(steps):
        step = next(plan)
        packs += step.packs
        llm += step.imbalance_llm
        vision += step.imbalance_vision
    groups = [plan.group for pack in packs for plan in pack.samples]
    dropped, skipped = _audit(planner, packs, step.state)
    return PlanNumbers(
        world_size=world_size,
        steps=steps,
        packs=len(packs),
        samples=len(groups),
        tokens=sum(pack.length for pack in packs),
        packing_efficiency=sum(pack.length for pack in packs) / (len(packs) * limit),
        imbalance_llm=llm / steps,
        imbalance_vision=vision / steps,
        short_packs=sum(pack.length < expected for pack in packs),
        packs_lacking_mandatory=sum(pack.missing > 0 for pack in packs),
        max_wait=max(pack.waited for pack in packs),
        dropped=dropped,
        skipped_rows=skipped,
        epochs=step.epochs,
        samples_by_group={stream.name: groups.count(i) for i, stream in enumerate(planner.streams)},
    )


def plan_text(numbers: PlanNumbers) -> list[str]:
    """The numbers as lines of text."""
    samples = ", ".join(f"{name} {count:,}" for name, count in numbers.samples_by_group.items())
    epochs = ", ".join(f"{name} {epoch:.2f}" for name, epoch in numbers.epochs.items())
    return [
        f"plan of {numbers.steps:,} micro-steps on {numbers.world_size} rank(s): {numbers.packs:,} packs, "
        f"{numbers.samples:,} samples, {numbers.tokens:,} tokens",
        f"  packing efficiency  {numbers.packing_efficiency:.2%} of max_num_tokens; {numbers.short_packs:,} packs "
        f"below expected_num_tokens; {numbers.packs_lacking_mandatory:,} without room for a mandatory group",
        f"  imbalance of ranks  language model {numbers.imbalance_llm:.2%}, vision {numbers.imbalance_vision:.2%} "
        "(slowest / mean - 1, mean over steps)",
        f"  longest wait        {numbers.max_wait:,} packs",
        f"  dropped             {numbers.dropped:,} samples; {numbers.skipped_rows:,} rows gave none",
        f"  samples by group    {samples}",
        f"  epochs planned      {epochs}",
    ]


def _audit(planner: Planner, packs: list[Pack], state: dict[str, Any]) -> tuple[int, int]:
    """(usable samples that are in no pack, rows without a sample) among the rows passed by the end of the last block.

    At a block's end the state says which samples still wait, so the packs to the end of the block count too.
    """
    tail: list[Pack] = []
    for step in planner.steps(1, state):
        if step.state["block"]["first"] != state["block"]["first"]:
            snapshot = step.state["block"]
            break
        tail += step.packs
    used: set[_Key] = {(p.group, p.epoch, p.row) for pack in chain(packs, tail) for p in pack.samples}
    used.update((group, epoch, row) for group, epoch, row, _ in snapshot["carried"])
    dropped = skipped = 0
    for group, epoch, row in _passed(planner, snapshot["groups"]):
        if (group, epoch, row) not in used:
            is_usable = planner.streams[group].plan_sample(row, epoch) is not None
            dropped, skipped = dropped + is_usable, skipped + (not is_usable)
    return dropped, skipped


def _passed(planner: Planner, cursors: dict[str, list[int]]) -> Iterable[_Key]:
    """Every row that the groups' cursors have passed since the beginning of the run."""
    for group, stream in enumerate(planner.streams):
        if stream.name not in cursors:
            continue
        epoch, position, _ = cursors[stream.name]
        order = RowOrder(stream.units, planner.options.data_seed, stream.name)
        for _ in range(epoch * order.rows_per_epoch + position):
            yield (group, *order.next())
