"""Adapters merged on export: whatever wrote them, for whatever program, and refused where they don't belong.

The numbers of a merged export are compared in tests/distributed/test_lora.py and tests/lora/test_weights.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.checkpoint.export import export_checkpoint
from bagel_ds.checkpoint.step_folders import MANIFEST
from bagel_ds.cli.main import main
from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.lora.base import base_fingerprint
from bagel_ds.lora.peft_files import CONFIG, WEIGHTS, AdapterRecord, peft_name
from bagel_ds.model.shape.lora import LoRA
from bagel_ds.model_folder.tensor_files import TensorFiles

LAYER = "language_model.model.layers.0.self_attn.q_proj_moe_gen"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder / "model"


def written(folder: Path, base: Path, size: float = 0.1) -> Path:
    """An adapter of one layer, as training writes it but without a manifest: as peft writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs, inputs = load_file(base / "ema.safetensors")[f"{LAYER}.weight"].shape
    tensors = {
        peft_name(f"{LAYER}.lora_A"): torch.full((2, inputs), size),
        peft_name(f"{LAYER}.lora_B"): torch.full((outputs, 2), size),
    }
    record = AdapterRecord(
        LoRA(2, 4.0), frozenset([LAYER]), str(base), base_fingerprint(TensorFiles([base / "ema.safetensors"]))
    )
    (folder / CONFIG).write_text(record.config())
    save_file(tensors, folder / WEIGHTS, record.metadata())
    return folder


def test_a_folder_without_a_manifest_is_merged(base: Path, tmp_path: Path) -> None:
    paths = export_checkpoint(written(tmp_path / "a", base), tmp_path / "out", torch.float32, base=base)
    assert [path.name for path in paths] == ["model.safetensors"]
    before, after = load_file(base / "ema.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in after if not torch.equal(after[name], before[name].float())]
    assert changed == [f"{LAYER}.weight"]
    added = after[changed[0]] - before[changed[0]].float()
    torch.testing.assert_close(added, torch.full_like(added, 2 * 2 * 0.01), rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "llm_config.json").is_file() and (tmp_path / "out" / "ae.safetensors").is_file()


@pytest.mark.parametrize("program", ["original", "comfyui", "vllm-omni"])
def test_each_program_gets_its_layout(base: Path, tmp_path: Path, program: str) -> None:
    folder = written(tmp_path / "a", base)
    export_checkpoint(folder, tmp_path / "out", torch.bfloat16, program=program, base=base)
    held = load_file(tmp_path / "out" / "ema.safetensors")
    assert f"{LAYER}.weight" in held and not any("lora" in name for name in held)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bagel"


def test_what_rounding_loses_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path / "a", base, size=0.003)
    with caplog.at_level("INFO", logger="bagel_ds"):
        export_checkpoint(folder, tmp_path / "fp32", torch.float32, base=base)
        assert "rounding" not in caplog.text
        export_checkpoint(folder, tmp_path / "bf16", torch.bfloat16, base=base)
    assert "rounding to bfloat16 changed what the adapter adds by" in caplog.text


def test_a_damaged_adapter_of_a_run_is_refused(base: Path, tmp_path: Path) -> None:
    from bagel_ds.checkpoint.step_folders import write_manifest

    folder = written(tmp_path / "step_1", base)
    files = TensorFiles([folder / WEIGHTS])
    write_manifest(folder, {WEIGHTS: {name: files.checksum(name) for name in files.names}})
    assert (folder / MANIFEST).is_file()
    export_checkpoint(folder, tmp_path / "sound", torch.float32, base=base)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        export_checkpoint(folder, tmp_path / "damaged", torch.float32, base=base)
    assert not (tmp_path / "damaged").exists()


def test_another_base_is_refused_and_an_adapter_needs_one(base: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", base)
    other = shutil.copytree(base, tmp_path / "other")
    save_file(
        {name: value * 2 for name, value in load_file(base / "ema.safetensors").items()}, other / "ema.safetensors"
    )
    with pytest.raises(UserError, match="is not the model that the adapter"):
        export_checkpoint(folder, tmp_path / "out", torch.float32, base=other)
    with pytest.raises(UserError, match="holds an adapter: pass --merge"):
        export_checkpoint(folder, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_what_is_not_an_adapter_has_nothing_to_merge(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), "--merge", "--out", str(tmp_path / "out")]) == 2
    assert "does not hold an adapter, so there is nothing to merge; leave out --merge" in capsys.readouterr().err
