"""Real launches on the GPUs there are: every preset trains the demo, and offload changes no loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.launch import TRAIN, deepspeed

ON_GPU = {"DS_ACCELERATOR": "cuda"}
PRESETS = ["zero2", "zero2_cpu", "zero3", "zero3_cpu", "zero3_nvme", "zero3_nvme_all", "zero3_cpu_bf16"]


def train(demo: Path, results: Path, preset: str, *more: object) -> list[dict]:
    words = [
        *("--ds_config", preset, "--nvme_path", results / "nvme"),
        *("--dataset_config_file", demo / "example.yaml", "--model_path", demo / "model"),
        *("--results_dir", results, "--checkpoint_dir", results / "checkpoints"),
        *("--finetune_from_hf", True, "--finetune_from_ema", True, "--ema", 0.9),
        *("--total_steps", 4, "--save_every", 100, "--log_every", 1, "--warmup_steps", 1, "--lr", 1e-3),
        *("--max_num_tokens", 1024, "--expected_num_tokens", 1024, "--max_num_tokens_per_sample", 1024),
        *("--num_workers", 1, "--ignore_memory_plan", True, *more),
    ]
    finished = deepspeed(TRAIN, words, ranks=min(2, torch.cuda.device_count()), env=ON_GPU)
    assert finished.code == 0, finished.output[-4000:]
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def plain(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(demo, tmp_path_factory.mktemp("plain"), "zero3")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_its_losses_are_those_of_zero3(
    preset: str, demo: Path, plain: list[dict], tmp_path: Path
) -> None:
    found = train(demo, tmp_path, preset)
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    for ours, theirs in zip(found, plain):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=2e-2)
        assert ours["memory/device_reserved_gib"] >= ours["memory/device_gib"] > 0
    assert (tmp_path / "checkpoints" / "step_final" / "ema.safetensors").exists()


@pytest.mark.parametrize("mode", ["none", "offload"])
def test_activation_checkpointing_changes_no_loss(mode: str, demo: Path, plain: list[dict], tmp_path: Path) -> None:
    for ours, theirs in zip(train(demo, tmp_path, "zero3", "--activation_checkpointing", mode), plain):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=2e-2)
