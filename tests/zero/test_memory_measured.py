"""The planner's host memory against real launches on CPU, two ranks, of scaled-up models in the real layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bagel_ds.config import make_config
from bagel_ds.demo import write_demo
from bagel_ds.model.config import VAEConfig
from bagel_ds.zero.memory import MemoryOptions, plan_memory
from bagel_ds.zero.memory_suggest import resolved
from bench.host_memory import available_gib
from bench.measured_run import measured_run
from bench.random_model import scaled_config, write_random_model

pytestmark = [pytest.mark.measured, pytest.mark.distributed]

RANKS, TOKENS = 2, 1024
DEMO_VAE, LARGEST_IMAGE = VAEConfig(channels=32), 192**2
SMALL, LARGE = (512, 4, 16384), (768, 8, 16384)  # 64 and 213 million parameters


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "demo")
    return folder / "demo"


@pytest.mark.parametrize(
    ("size", "preset", "options"),
    [
        (SMALL, "zero3.json", {}),
        (SMALL, "zero3.json", {"precision": "fp32"}),
        (SMALL, "zero2_cpu.json", {}),
        (SMALL, "zero3_cpu.json", {}),
        (SMALL, "zero3_nvme.json", {}),
        (SMALL, "zero3_nvme_all.json", {}),
        (LARGE, "zero3.json", {}),
        (LARGE, "zero3_cpu.json", {}),
    ],
)
def test_planned_host_memory_is_within_ten_percent(
    size: tuple[int, int, int], preset: str, options: dict[str, Any], demo: Path, tmp_path: Path
) -> None:
    config = scaled_config(*size)
    budget = {"max_num_tokens": TOKENS, "expected_num_tokens": 896, "max_num_tokens_per_sample": 896}
    chosen = {"ds_config": preset, "num_workers": 0, "ema": 0.95, **budget, **options}
    run = make_config(chosen)
    memory = MemoryOptions.of(run, RANKS, device="cpu", image_pixels=LARGEST_IMAGE, vae=DEMO_VAE)
    planned = plan_memory(config, resolved(preset, run, config, RANKS), memory).host_peak
    if planned / 2**30 > 0.8 * available_gib():
        pytest.skip(f"needs {planned / 2**30:.0f} GiB of host memory, {available_gib():.0f} are available")
    write_random_model(tmp_path / "model", demo / "model", config)
    paths = {
        "model_path": tmp_path / "model",
        "dataset_config_file": demo / "example.yaml",
        "results_dir": tmp_path / "results",
        "checkpoint_dir": tmp_path / "checkpoints",
        "nvme_path": tmp_path / "nvme",
    }
    length = {"finetune_from_hf": True, "total_steps": 3, "log_every": 1, "warmup_steps": 1, "lr": 1e-5}
    words = [word for name, value in {**chosen, **paths, **length}.items() for word in (f"--{name}", value)]
    found = measured_run(words, RANKS)
    assert found.code == 0, found.output[-3000:]
    measured = max(peak.host for peak in found.peaks.values())
    assert planned == pytest.approx(measured, rel=0.10), f"planned {planned / 2**20:.0f} MiB, {measured / 2**20:.0f}"
