"""Base models: recognized by their weights, whatever files they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_ds.checkpoint.export import write_weights
from bagel_ds.errors import UserError
from bagel_ds.lora.base import base_files, base_fingerprint
from bagel_ds.lora.peft_files import WEIGHTS, AdapterFolder
from bagel_ds.model.shape.parts import POSITION_TABLES
from bagel_ds.model_folder.folder import EMA, MODEL
from bagel_ds.model_folder.tensor_files import TensorFiles
from tests.lora.test_peft_files import write_adapter
from tests.lora.test_weights import Held
from tests.model.test_bagel import tiny
from tests.model.test_lora import adapted


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tiny().named_parameters()}


def written(folder: Path, tensors: dict[str, Tensor], stem: str = "ema", shard_bytes: int | None = None) -> TensorFiles:
    folder.mkdir(exist_ok=True)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    paths = write_weights(folder, stem, Held(tensors), shapes, torch.float32, shard_bytes)
    return TensorFiles([path for path in paths if path.suffix == ".safetensors"])


def test_the_same_weights_have_one_fingerprint(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    whole = base_fingerprint(written(tmp_path / "whole", tensors))
    cut = written(tmp_path / "cut", tensors, shard_bytes=50_000)
    assert len(cut.paths) > 2 and base_fingerprint(cut) == whole
    tables = {name: value for name, value in tensors.items() if name not in POSITION_TABLES}
    assert base_fingerprint(written(tmp_path / "tables", tables)) == whole


def _nudge(tensors: dict[str, Tensor]) -> None:
    tensors["llm2vae.bias"][3] += 1e-6


def _bf16(tensors: dict[str, Tensor]) -> None:
    tensors["llm2vae.bias"] = tensors["llm2vae.bias"].bfloat16().float()


def _shape(tensors: dict[str, Tensor]) -> None:
    tensors["llm2vae.weight"] = tensors["llm2vae.weight"].T.contiguous()


def _lacks(tensors: dict[str, Tensor]) -> None:
    del tensors["llm2vae.bias"]


@pytest.mark.parametrize("change", [_nudge, _bf16, _shape, _lacks])
def test_other_weights_have_another(tmp_path: Path, tensors: dict[str, Tensor], change: Any) -> None:
    before = base_fingerprint(written(tmp_path / "before", tensors))
    change(tensors)
    assert base_fingerprint(written(tmp_path / "after", tensors)) != before


def _adapter_of(folder: Path, fingerprint: str) -> AdapterFolder:
    write_adapter(folder, adapted())
    held = load_file(folder / WEIGHTS)
    save_file(held, folder / WEIGHTS, {"format": "pt", "base_fingerprint": fingerprint})
    return AdapterFolder(folder)


def test_the_file_that_an_adapter_was_trained_on_is_found(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    base = tmp_path / "base"
    average = written(base, tensors, "ema")
    weights = written(base, {name: value + 1 for name, value in tensors.items()}, "model")
    for files in average, weights:
        adapter = _adapter_of(tmp_path / files.paths[0].stem, base_fingerprint(files))
        assert base_files(base, [adapter]).paths == files.paths
    other = _adapter_of(tmp_path / "other", "0" * 16)
    with pytest.raises(UserError) as error:
        base_files(base, [other])
    assert f"{EMA} and {MODEL}" in str(error.value) and str(other.folder) in str(error.value)
    with pytest.raises(UserError, match="different base models"):
        base_files(base, [adapter, other])


def test_an_adapter_of_peft_takes_the_folders_own_choice(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    base = tmp_path / "base"
    average = written(base, tensors, "ema")
    written(base, tensors, "model")
    adapter = write_adapter(tmp_path / "adapter", adapted())
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS)
    assert base_files(base, [AdapterFolder(adapter)]).paths == average.paths
