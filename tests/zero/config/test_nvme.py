"""NVMe paths that can't work are said before training; settings that silently stay in memory are caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import parameter_sizes
from bagel_ds.zero.config.nvme import (
    average_folder,
    check_nvme,
    file_system,
    fit_buffers,
    nvme_bytes,
    nvme_folders,
)
from bagel_ds.zero.config.resolve import resolve_ds_config

LARGEST_7B = max(parameter.numel for parameter in parameter_sizes(BagelConfig()))


def resolved(preset: str, path: Path, world: int = 2) -> dict[str, Any]:
    words = ["--nvme_path", str(path), "--checkpoint_dir", str(path / "checkpoints")]
    return resolve_ds_config(preset, parse_arguments(words), world)[0]


def changed(preset: str, path: Path, section: str, **values: Any) -> dict[str, Any]:
    ds = resolved(preset, path)
    place = ds if section == "aio" else ds["zero_optimization"]
    place[section].update(values)
    return ds


@pytest.mark.parametrize("preset", ["zero3_nvme", "zero3_nvme_all"])
def test_without_a_path_the_argument_is_named(preset: str) -> None:
    with pytest.raises(UserError, match="--nvme_path"):
        resolve_ds_config(preset, parse_arguments([]), 2)


@pytest.mark.parametrize("world", [1, 2, 5, 8])
def test_buffers_hold_the_7b_embedding_out_of_the_box(tmp_path: Path, world: int) -> None:
    ds = resolved("zero3_nvme_all", tmp_path, world)
    fit_buffers(ds, LARGEST_7B, world)
    assert ds["zero_optimization"]["offload_param"]["buffer_size"] * world >= LARGEST_7B


def test_recomputed_layers_with_frozen_weights_have_a_buffer_for_each(tmp_path: Path) -> None:
    counts = []
    for frozen in (False, True):
        ds = resolved("zero3_nvme_all", tmp_path)
        fit_buffers(ds, LARGEST_7B, 2, recomputes_frozen=frozen)
        counts.append(ds["zero_optimization"]["offload_param"]["buffer_count"])
    assert counts == [8, 16]
    with pytest.raises(UserError, match="buffer_count is 8, this run needs 16"):
        fit_buffers(changed("zero3_nvme_all", tmp_path, "offload_param", buffer_count=8), LARGEST_7B, 2, True)


def test_a_buffer_that_is_too_small_is_refused(tmp_path: Path) -> None:
    ds = changed("zero3_nvme_all", tmp_path, "offload_param", buffer_size=1e8)
    with pytest.raises(UserError, match="272,498,688"):
        fit_buffers(ds, LARGEST_7B, 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parameters_that_persist_and_swap_are_refused(tmp_path: Path, world: int) -> None:
    most = 2**20 // 2 * world - world  # bf16
    for threshold, largest in ((most, 10**9), (10**9, most)):
        ds = changed("zero3_nvme_all", tmp_path, "offload_param", buffer_size=10**9)
        ds["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        fit_buffers(ds, largest, world)
    ds["zero_optimization"]["stage3_param_persistence_threshold"] = most + 1
    with pytest.raises(UserError, match=f"stage3_param_persistence_threshold is {most + 1:,}.*write {most:,} or less"):
        fit_buffers(ds, 10**9, world)


def test_two_runs_use_two_folders_and_a_run_finds_its_own_again(tmp_path: Path) -> None:
    (one,) = nvme_folders(resolved("zero3_nvme_all", tmp_path))
    assert [one] == nvme_folders(resolved("zero3_nvme", tmp_path))
    other = resolve_ds_config("zero3_nvme", parse_arguments(["--nvme_path", str(tmp_path)]), 2)[0]
    assert nvme_folders(other) != [one]


def test_too_little_space_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 931323 GiB"):
        check_nvme(resolved("zero3_nvme", tmp_path), 10**15)


def test_a_disk_that_is_memory_is_refused() -> None:
    if file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no tmpfs at /dev/shm on this machine")
    ds = resolved("zero3_nvme", Path("/dev/shm"))
    with pytest.raises(UserError, match="which is memory"):
        check_nvme(ds, 0)
    nvme_folders(ds)[0].rmdir()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        check_nvme(resolved("zero3_nvme", tmp_path / "file"), 0)


SILENT = [
    ("zero3_nvme_all", "aio", {"block_size": 2**20 + 1}, "block_size"),
    ("zero3_nvme_all", "aio", {"use_gds": True}, "use_gds"),
    ("zero3_nvme_all", "offload_param", {"max_in_cpu": 10**9}, "max_in_cpu"),
    ("zero3_nvme", "offload_optimizer", {"buffer_count": 2}, "buffer_count"),
    ("zero3_nvme", "offload_optimizer", {"pipeline_read": True}, "pipeline_read"),
]


@pytest.mark.parametrize("preset, section, values, word", SILENT)
def test_settings_that_keep_all_in_memory_or_crash_are_caught(
    tmp_path: Path, preset: str, section: str, values: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        check_nvme(changed(preset, tmp_path, section, **values), 0)


def test_bytes_on_nvme(tmp_path: Path) -> None:
    assert nvme_bytes(resolved("zero3_cpu", tmp_path), 100, 90, 4) == 0
    assert nvme_bytes(resolved("zero3_nvme", tmp_path), 100, 90, 0) == 16 * 90
    assert nvme_bytes(resolved("zero3_nvme_all", tmp_path), 100, 90, 4) == 20 * 90 + 2 * 100
    assert average_folder(resolved("zero3_cpu", tmp_path), 0) is None
    assert average_folder(resolved("zero3_nvme", tmp_path), 1) is not None
    assert json.dumps(resolved("zero3_nvme", tmp_path))
