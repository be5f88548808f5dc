"""A small model folder, and the options of saves of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_ds.train.saves.save import SaveOptions


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("llm_config.json", "vit_config.json", "tokenizer.json", "ae.safetensors"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def options(tmp_path: Path, model_folder: Path) -> SaveOptions:
    (tmp_path / "checkpoints").mkdir()
    return SaveOptions(tmp_path / "checkpoints", model_folder, torch.float32, delete_previous_state=False)
