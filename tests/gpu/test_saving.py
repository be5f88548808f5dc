"""Saves that overlap training on a GPU: the thread's copies wait for what was computed before, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel_ds.checkpoint.state import Held, StateFiles, fill_rank, open_rank
from bagel_ds.ranges import MASTER, Pieces, Range
from bagel_ds.train.background import Background
from tests.gpu.test_training import train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_thread_reads_what_the_gpu_had_been_asked_to_compute(dtype: torch.dtype, tmp_path: Path) -> None:
    """64 or 32 MiB, several chunks, filled behind work that takes far longer than it takes the thread to begin."""
    device, count = torch.device("cuda"), 2**24
    states = torch.zeros(count, dtype=dtype, device=device)
    factor = torch.eye(8192, device=device)
    torch.cuda.synchronize()
    for _ in range(20):
        factor = factor @ factor
    states.fill_(7)
    background = Background(device)
    held = [Held(MASTER, "w", 0, count, torch.float32)]
    with open_rank(tmp_path / "rank_00000.safetensors", held) as writer:
        background.add(lambda: fill_rank(writer, held, [(MASTER, Pieces("w", [(Range("w", 0, count), states)]))]))
        background.wait()
    assert load_file(tmp_path / "rank_00000.safetensors")["master/w"].eq(7).all()


@pytest.mark.parametrize("preset", ["zero2", "zero2_cpu", "zero3", "zero3_cpu"])
def test_states_weights_and_average_of_a_checkpoint_are_of_one_step(preset: str, demo: Path, tmp_path: Path) -> None:
    """They are written one after the other while the next step computes: an update between them would show."""
    train(demo, tmp_path, preset, "--save_every", 1, "--save_dtype", "fp32")
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        state = StateFiles(folder / "state")
        for kind, file in ((MASTER, "model.safetensors"), ("ema", "ema.safetensors")):
            for name, values in load_file(folder / file).items():
                if state.has(kind, name):
                    assert state.read(kind, name, 0, values.numel()).equal(values.flatten()), (step, kind, name)
