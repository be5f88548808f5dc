"""DS_ACCELERATOR=cpu on a host with GPUs is a CPU run throughout: nothing pins, plans, measures or runs for CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.cases import arguments
from tests.launch import run_ranks

pytestmark = pytest.mark.distributed

ON_GPU_HOST = Path(__file__).with_name("on_gpu_host.py")


def test_a_run_on_the_cpu_of_a_gpu_host_trains_and_saves(demo: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = arguments(
        demo, results, ds_config="zero3_cpu", num_workers=1, activation_checkpointing="offload", precision="fp32"
    )
    finished = run_ranks(ON_GPU_HOST, words, ranks=1, timeout=600)
    assert finished.code == 0, finished.output[-6000:]
    assert (results / "checkpoints" / "step_final").exists()
    assert "memory peaks: host" in finished.output, "no part of it on a GPU"
    assert "autoencoder: encoder\n" in finished.output, "training decodes nothing"
    assert "cuDNN's attention: False; TF32: False, False" in finished.output
    (line,) = (json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines())
    assert not [name for name in line if name.startswith("memory/device")]
