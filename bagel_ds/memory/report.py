"""A memory plan as text: what goes where, whether it fits, and which settings would fit.

Guarantees: every number comes from the plan. Items are sorted by size, and small ones are added up.
"""

from __future__ import annotations

from typing import Iterator, Sequence

from bagel_ds.memory.between_steps import EVALUATION, SAMPLES
from bagel_ds.memory.planner import MemoryItem, MemoryPlan
from bagel_ds.memory.states import DEVICE, HOST, NVME
from bagel_ds.memory.suggestions import Suggestion
from bagel_ds.units import GIB

_TITLES = {DEVICE: "GPU memory, per rank", HOST: "host memory, per host", NVME: "NVMe, per host"}
_OPTIONS = {DEVICE: "--gpu_memory", HOST: "--host_memory", NVME: "--nvme"}
_SMALL = 0.02  # of the place's total: items below it are added up


def report_lines(plan: MemoryPlan) -> list[str]:
    """The plan in a few dozen lines."""
    peaks = {DEVICE: plan.gpu_peak, HOST: plan.host_peak, NVME: plan.nvme}
    budgets = {DEVICE: plan.gpu_memory, HOST: plan.host_memory, NVME: plan.nvme_space}
    lines: list[str] = []
    for place, title in _TITLES.items():
        if peaks[place]:
            budget = f" of {budgets[place]:g}" if budgets[place] is not None else ""
            lines.append(f"{title}: {peaks[place] / GIB:.1f}{budget} GiB")
            lines += _item_lines([item for item in plan.items if item.place == place], peaks[place])
    lines += _between_steps(plan)
    if plan.selective_layers is not None:
        lines.append(f"decoder layers that keep products for the backward pass (selective): {plan.selective_layers}")
    moved = [f"{name} {size / GIB:.0f} GiB" for name, size in plan.traffic._asdict().items() if size]
    lines.append("moved per host and step: " + (", ".join(moved) or "nothing"))
    return lines + [verdict(plan)]


def _between_steps(plan: MemoryPlan) -> list[str]:
    """What evaluations and samples take; rarely the peak, so their items are not among those above."""
    lines = []
    for name in (EVALUATION, SAMPLES):
        by_place = {"GPU": dict(plan.gpu_phases), "host": dict(plan.host_phases)}
        found = [f"{place} {sizes[name] / GIB:.1f} GiB" for place, sizes in by_place.items() if name in sizes]
        if found:
            lines.append(f"during {name}: {', '.join(found)}")
    return lines


def verdict(plan: MemoryPlan) -> str:
    """One line: whether it fits, what is missing where, and which places had no size to compare with."""
    if plan.gpu_memory is plan.host_memory is plan.nvme_space is None:
        return "pass --gpu_memory, --host_memory and --nvme (in GiB) to see whether it fits"
    unknown = [
        f"{_name(place)} not compared: {size:.0f} GiB needed (pass {_OPTIONS[place]})"
        for place, size in not_compared(plan).items()
    ]
    lacking = "; ".join(f"{_name(place)} lacks {size:.1f} GiB" for place, size in plan.shortfalls.items())
    found = f"it does not fit: {lacking}" if lacking else "it fits the sizes you gave" if unknown else "it fits"
    return "; ".join([found, *unknown])


def not_compared(plan: MemoryPlan) -> dict[str, float]:
    """GiB needed in each place whose size was not given."""
    needs = {
        DEVICE: (plan.gpu_peak, plan.gpu_memory),
        HOST: (plan.host_peak, plan.host_memory),
        NVME: (plan.nvme, plan.nvme_space),
    }
    return {place: need / GIB for place, (need, budget) in needs.items() if need and budget is None}


def size_options(plan: MemoryPlan) -> list[str]:
    """The options that would give the missing sizes."""
    return [_OPTIONS[place] for place in not_compared(plan)]


def _name(place: str) -> str:
    return _TITLES[place].split(",")[0]


def suggestion_lines(found: Sequence[Suggestion]) -> list[str]:
    """The suggestions as lines, best first."""
    if not found:
        return ["no other setting makes it fit: it needs more memory, more GPUs or more hosts"]
    lines = ["settings that fit, best first:"]
    for suggestion in found:
        plan = suggestion.plan
        nvme = f", NVMe {plan.nvme / GIB:.0f}" if plan.nvme else ""
        nvme += ", not compared" if NVME in not_compared(plan) else ""
        lines.append(
            f"  {' '.join(suggestion.settings)}  (GiB: GPU {plan.gpu_peak / GIB:.1f}, host {plan.host_peak / GIB:.0f}"
            f"{nvme}; {plan.traffic.total / GIB:.0f} moved per step)"
        )
        if suggestion.trains:
            lines.append(f"      trains only {suggestion.trains}")
    return lines


def _item_lines(items: Sequence[MemoryItem], total: int) -> Iterator[str]:
    small = 0
    for item in items:
        if item.bytes < _SMALL * total:
            small += item.bytes
            continue
        when = f"  (only during {item.phase})" if item.phase else ""
        yield f"  {item.bytes / GIB:8.2f}  {item.name}{when}"
    if small:
        yield f"  {small / GIB:8.2f}  the rest"
