"""A small model folder and a writer of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_ds.train.saves.writer import CheckpointWriter


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("llm_config.json", "vit_config.json", "tokenizer.json", "ae.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def writer(tmp_path: Path, model_folder: Path) -> CheckpointWriter:
    (tmp_path / "checkpoints").mkdir()
    return CheckpointWriter(tmp_path / "checkpoints", model_folder, torch.float32, delete_previous_state=False)
