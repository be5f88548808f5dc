"""A run that can't fit stops before it loads anything and suggests what fits; the end compares plan and peaks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Sequence

import pytest
import torch

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.data.config.dataset_config import DatasetConfig, GroupConfig
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.errors import UserError
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan
from bagel_ds.memory.suggestions import resolved
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.train import memory_plan
from bagel_ds.train.memory_plan import host_memory_gib, outcome, plan_lines, plan_run
from bagel_ds.units import GIB
from bagel_ds.zero.config.settings import ZeroSettings

# The transforms of data/configs/example.yaml in the original's repository.
VAE = ImageTransform(image_stride=16, max_image_size=1024, min_image_size=512)
VIT = ImageTransform(image_stride=14, max_image_size=980, min_image_size=378, max_pixels=2_007_040)


def plan(config: RunConfig, ranks_here: int = 1, groups: Sequence[GroupConfig] = ()) -> MemoryPlan:
    settings = resolved(config.training.ds_config, config, BagelConfig(), 2)
    groups = groups or [GroupConfig("t2i_pretrain", "t2i_pretrain", (), VAE, None)]
    datasets = DatasetConfig(tuple(groups), "here")
    return plan_run(config, datasets, BagelConfig(), VAEConfig(), settings, 2, ranks_here)


def test_the_largest_image_that_is_drawn_counts_and_those_that_are_read_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    seen: list[int] = []
    real = memory_plan.plan_memory

    def record(model: BagelConfig, settings: ZeroSettings, options: MemoryOptions) -> MemoryPlan:
        seen.append(options.image_pixels)
        return real(model, settings, options)

    monkeypatch.setattr(memory_plan, "plan_memory", record)
    config = parse_arguments(["--ds_config", "zero3_cpu"])
    small = GroupConfig("unified_edit", "unified_edit", (), dataclasses.replace(VAE, max_image_size=512), VIT)
    large = GroupConfig("t2i_pretrain", "t2i_pretrain", (), VAE, None)
    read = GroupConfig("vlm_sft", "vlm_sft", (), None, VIT)
    for groups in ([small, large], [small, read], [read]):
        plan(config, groups=groups)
    assert seen == [1024**2, 512**2, 0]


def test_the_7b_on_a_small_host_is_refused_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 24.0)
    with pytest.raises(UserError, match=r"(?s)does not fit: host memory lacks .*--ignore_memory_plan True"):
        plan(parse_arguments(["--ds_config", "zero3_cpu", "--max_num_tokens", "11520"]), ranks_here=2)


def test_ignoring_the_plan_goes_on_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 24.0)
    found = plan(parse_arguments(["--ds_config", "zero3_cpu", "--ignore_memory_plan", "True"]))
    assert not found.fits and "does not fit" in plan_lines(found)[-1]


def test_the_plan_on_the_cpu_of_a_host_with_gpus_is_one_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is queried: a query takes memory on a GPU that may belong to others."""

    def refuse() -> None:
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = plan(parse_arguments(["--ds_config", "zero3_cpu"]))
    assert found.gpu_peak == 0 and found.gpu_memory is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert plan(parse_arguments(["--ds_config", "zero3_cpu"])).gpu_memory == 80


def test_a_large_host_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    found = plan(parse_arguments(["--ds_config", "zero3_cpu"]))
    assert found.fits and plan_lines(found)[-1].strip() == "it fits"


def test_offloaded_layer_inputs_leave_other_page_locked_memory_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(memory_plan, "rounds_pinned_memory", lambda: False)
    rounding = "page-locked memory: rounding and cache"
    sizes = []
    for mode in ("full", "offload"):
        found = plan(parse_arguments(["--ds_config", "zero3_cpu", "--activation_checkpointing", mode]))
        sizes += [item.bytes for item in found.items if item.name == rounding]
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_memory_of_the_host_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = host_memory_gib()
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**30}\n")
    monkeypatch.setattr(memory_plan, "_CGROUP_LIMITS", (tmp_path / "nowhere", limit))
    assert host_memory_gib() == 1.0 < whole
    limit.write_text("max\n")
    assert host_memory_gib() >= whole


def test_the_outcome_names_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    found = dataclasses.replace(plan(parse_arguments(["--ds_config", "zero3_cpu"])), gpu_peak=20 * 2**30)
    line = outcome(found, 19.5, 3.0)
    assert "GPU 19.50 GiB reserved by torch, 20.00 planned" in line and "host 3.00 GiB seen" in line
    assert "GPU" not in outcome(found, None, 3.0)


def test_without_space_for_swap_files_no_option_starts_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive needs what the plan says; --ignore_memory_plan can't help there."""
    monkeypatch.setattr(memory_plan, "host_memory_gib", lambda: 2000.0)
    words = ["--ds_config", "zero3_nvme", "--nvme_path", str(tmp_path), "--checkpoint_dir", str(tmp_path / "saves")]
    config = parse_arguments([*words, "--ignore_memory_plan", "True"])
    (folder,) = resolved("zero3_nvme", config, BagelConfig(), 2).swap_folders
    folder.mkdir()
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    needed = plan(config, ranks_here=2).nvme
    assert 200 * GIB < needed < 10**12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match=f"--nvme_path: {folder} has .* free, this run needs {needed / GIB:.0f} GiB"):
        plan(config, ranks_here=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert not plan(config, ranks_here=2).fits, "the file system keeps some for itself"
