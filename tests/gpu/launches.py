"""Launches on the GPUs of this host, or their rehearsal on its CPU: what the tests of this folder share.

BAGEL_GPU_REHEARSAL=N runs the same tests with DS_ACCELERATOR=cpu on a host that has no GPU, N ranks standing for N
GPUs. They then skip what only CUDA has: its memory, its kernels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Sequence

import pytest
import torch

from tests.distributed import cases
from tests.distributed.cases import Case, Outcome
from tests.distributed.started import StartedRun

REHEARSED = int(os.environ.get("BAGEL_GPU_REHEARSAL") or 0)
DEVICE = "cpu" if REHEARSED else "cuda"
GPUS = REHEARSED or (torch.cuda.device_count() if torch.cuda.is_available() else 0)
RANKS = max(1, min(2, GPUS))  # NCCL refuses several ranks on one GPU
ON_GPU, ON_CPU = {"DS_ACCELERATOR": DEVICE}, {"DS_ACCELERATOR": "cpu"}

# Many of a GPU's kernels add in no fixed order, and Adam makes steps of equal size out of the smallest differences.
FP32, BF16 = 1e-3, 2e-2

only_on_a_gpu = pytest.mark.skipif(REHEARSED > 0, reason="rehearsed on a CPU: this is about CUDA's memory or kernels")


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(GPUS < count, reason=f"needs {count} GPUs: NCCL refuses several ranks on one")


def words_of(demo: Path, results: Path, **changed: object) -> list[str]:
    """Every step is of two packs, on one rank or two."""
    short = {"precision": "fp32", "max_num_tokens": 448, "gradient_accumulation_steps": 2 // RANKS, "save_every": 100}
    return cases.arguments(demo, results, **{**short, **changed})


def run_cases(folder: Path, several: Sequence[Case], ranks: int = RANKS) -> dict[str, list[Outcome]]:
    return cases.run_cases(folder, several, ranks, timeout=900, env=ON_GPU)


def started(words: Sequence[str], results: Path, faults: Sequence[dict[str, Any]] = ()) -> StartedRun:
    return StartedRun(words, results, RANKS, faults, env=ON_GPU)


def assert_done(outcome: Sequence[Outcome]) -> None:
    assert outcome[0].code == 0, outcome[0].output[-6000:]


def metrics(results: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
