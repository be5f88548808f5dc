"""The memory plan of this run on this machine: logged at the start, enforced, and compared at the end.

Guarantees: a run that doesn't fit this host, its GPUs or its NVMe drive stops before anything is loaded, with
suggestions that fit; --ignore_memory_plan True runs it anyway, but never without space for the swap files. The
comparison at the end is of the planned peaks with the highest values seen at logged steps.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.data.config.dataset_config import DatasetConfig
from bagel_ds.errors import UserError
from bagel_ds.machine.device import device_type, uses_cuda
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.memory.report import report_lines, suggestion_lines, verdict
from bagel_ds.memory.suggestions import suggestions
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.train.process.allocators import rounds_pinned_memory
from bagel_ds.units import GIB
from bagel_ds.zero.config.settings import ZeroSettings
from bagel_ds.zero.nvme_check import check_space, free_bytes

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def plan_run(
    config: RunConfig,
    datasets: DatasetConfig,
    model: BagelConfig,
    vae: VAEConfig,
    settings: ZeroSettings,
    world_size: int,
    ranks_here: int,
) -> MemoryPlan:
    """The plan of this run, with this host's memory and its `ranks_here` ranks as the budget.

    Raises `UserError` if the run can't fit.
    """
    drawn = [group.vae_transform.max_image_size for group in datasets.groups if group.vae_transform is not None]
    options = MemoryOptions.of(
        config,
        world_size,
        ranks_per_host=ranks_here,
        device=device_type(),
        vae=vae,
        image_pixels=max(drawn, default=0) ** 2,
        gpu_memory=torch.cuda.mem_get_info()[1] / GIB if uses_cuda() else None,
        host_memory=host_memory_gib(),
        nvme=min(map(free_bytes, settings.swap_folders)) / GIB if settings.swap_folders else None,
        rounds_pinned_memory=uses_cuda() and rounds_pinned_memory(),
    )
    plan = plan_memory(model, settings, options)
    check_space(settings.swap_folders, plan.nvme)
    if not plan.fits and not config.training.ignore_memory_plan:
        better = "\n".join(suggestion_lines(suggestions(model, config, options)))
        raise UserError(
            f"this run's memory plan: {verdict(plan)} (`bagel-ds memory` shows the items). {better}\n"
            "To start anyway, pass --ignore_memory_plan True."
        )
    return plan


def plan_lines(plan: MemoryPlan) -> list[str]:
    """The plan for the log."""
    return ["memory plan:", *(f"  {line}" for line in report_lines(plan))]


def outcome(plan: MemoryPlan, reserved_gib: float | None, host_gib: float) -> str:
    """One line for the end of a run: peaks at logged steps next to the planned ones."""
    device = ""
    if reserved_gib is not None:
        planned = f"{plan.gpu_peak / GIB:.2f} planned, CUDA's context and NCCL included"
        device = f"GPU {reserved_gib:.2f} GiB reserved by torch, {planned}; "
    return f"memory peaks: {device}host {host_gib:.2f} GiB seen (ranks only), {plan.host_peak / GIB:.2f} planned"


def host_memory_gib() -> float:
    """RAM of the machine, or of the container if that has a lower limit, in GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            continue  # not there, or "max"
    return round(total / GIB, 1)
