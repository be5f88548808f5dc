"""Folders and buffers on NVMe; settings that crash, or silently keep all in memory, are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import parameter_sizes
from bagel_ds.zero.config.files import ds_configs_folder
from bagel_ds.zero.config.nvme import fit_buffers
from bagel_ds.zero.config.resolve import resolve_ds_config, same_on_all_hosts
from bagel_ds.zero.config.settings import ZeroSettings

LARGEST_7B = max(parameter.numel for parameter in parameter_sizes(BagelConfig()))


def resolved(preset: str, path: Path, world: int = 2) -> dict[str, Any]:
    words = ["--nvme_path", str(path), "--checkpoint_dir", str(path / "checkpoints")]
    return resolve_ds_config(preset, parse_arguments(words), world)[0]


def swap_folders(ds: dict[str, Any]) -> list[Path]:
    return ZeroSettings.of(ds).swap_folders


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
    (one,) = swap_folders(resolved("zero3_nvme_all", tmp_path))
    assert [one] == swap_folders(resolved("zero3_nvme", tmp_path))
    other = resolve_ds_config("zero3_nvme", parse_arguments(["--nvme_path", str(tmp_path)]), 2)[0]
    assert swap_folders(other) != [one]


def test_hosts_differ_in_nothing_but_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks compare what they have resolved; a folder's name holds the host's."""
    found = []
    for host in ("host-1", "host-2"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        found.append(resolved("zero3_nvme_all", tmp_path))
    assert found[0] != found[1] and same_on_all_hosts(found[0]) == same_on_all_hosts(found[1])
    found[1]["zero_optimization"]["offload_param"]["buffer_size"] = 1
    assert same_on_all_hosts(found[0]) != same_on_all_hosts(found[1])


FAULTS = [
    ("aio", {"block_size": 2**20 + 1}, "aio.block_size is 1,048,577"),
    ("aio", {"use_gds": True}, "aio.use_gds"),
    ("offload_param", {"max_in_cpu": 1e9}, "max_in_cpu is 1,000,000,000"),
    ("offload_optimizer", {"buffer_count": 2}, "buffer_count is 2"),
    ("offload_optimizer", {"pipeline_read": True}, "pipeline_read"),
]


def written(path: Path, section: str, values: dict[str, Any], device: str) -> str:
    """A file like the preset zero3_nvme_all, offloading to `device`, with other values in one section."""
    content = json.loads((ds_configs_folder() / "zero3_nvme_all.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        content["zero_optimization"][part]["device"] = device
    place = content if section == "aio" else content["zero_optimization"]
    place.setdefault(section, {}).update(values)
    (path / "mine.json").write_text(json.dumps(content))
    return str(path / "mine.json")


@pytest.mark.parametrize("section, values, words", FAULTS)
def test_settings_that_keep_all_in_memory_or_crash_are_refused(
    tmp_path: Path, section: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=f"ds_config mine.json: .*{words}"):
        resolved(written(tmp_path, section, values, "nvme"), tmp_path)
    resolved(written(tmp_path, section, dict.fromkeys(values, "auto"), "nvme"), tmp_path)
    resolved(written(tmp_path, section, values, "cpu"), tmp_path)


def test_the_average_lies_beside_an_optimizer_on_nvme(tmp_path: Path) -> None:
    ds = resolved("zero3_nvme", tmp_path)
    settings = ZeroSettings.of(ds)
    (folder,) = settings.swap_folders
    assert settings.average_folder(1) == folder / "ema" / "rank1"
    in_memory = ZeroSettings.of(resolved("zero3_cpu", tmp_path))
    assert in_memory.average_folder(0) is None and in_memory.swap_folders == []
    assert json.dumps(ds), "DeepSpeed gets plain JSON"
