"""Exporting from a training state alone, whole or in shards, equals what the ranks held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.checkpoint.offline import export_checkpoint
from bagel_ds.checkpoint.state import Held, fill_rank, open_rank
from bagel_ds.checkpoint.steps import write_json, write_manifest
from bagel_ds.errors import UserError
from bagel_ds.ranges import Pieces, Range
from bagel_ds.run_commands import _bytes_of

TRAINED = {
    "a": torch.arange(12.0).reshape(3, 4) + 0.123456789,
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)),
}
FROZEN = {"c": torch.ones(2, 2, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two ranks' state: each holds half of every trained tensor, rank 0 the frozen one."""
    folder = tmp_path / "step_7"
    (folder / "state").mkdir(parents=True)
    checksums = {}
    for rank in range(2):
        held, pieces = [], []
        for name, tensor in TRAINED.items():
            middle = tensor.numel() // 2
            low, high = (0, middle) if rank == 0 else (middle, tensor.numel())
            for kind, values in (("master", tensor), ("ema", tensor * 2)):
                held.append(Held(kind, name, low, high - low, torch.float32))
                pieces.append((kind, Pieces(name, [(Range(name, low, high - low), values.flatten()[low:high])])))
        if rank == 0:
            held.append(Held("weight", "c", 0, 4, torch.bfloat16))
            pieces.append(("weight", Pieces("c", [(Range("c", 0, 4), FROZEN["c"].flatten())])))
        path = folder / "state" / f"rank_{rank:05d}.safetensors"
        with open_rank(path, held) as writer:
            fill_rank(writer, held, pieces)
        checksums[f"state/{path.name}"] = writer.checksums
    save_file({name: tensor.bfloat16() for name, tensor in (TRAINED | FROZEN).items()}, folder / "model.safetensors")
    (folder / "llm_config.json").write_text("{}")
    write_json(folder / "trainer.json", {"steps_done": 7, "plan_state": None, "world_size": 2})
    write_manifest(folder, checksums)
    return folder


def test_fp32_weights_come_from_the_masters_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    model, ema = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("model", "ema"))
    for name, tensor in TRAINED.items():
        assert torch.equal(model[name], tensor) and torch.equal(ema[name], tensor * 2)
    assert torch.equal(model["c"], FROZEN["c"].float()) and torch.equal(ema["c"], FROZEN["c"].float())
    assert (tmp_path / "out" / "llm_config.json").exists()


def test_shards_and_their_index_hold_everything_once(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoint, out, torch.bfloat16, shard_bytes=24)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in out.glob("model-*.safetensors")}
    assert sorted(index["weight_map"]) == ["a", "b", "c"] and len(shards) == 2
    for name, tensor in (TRAINED | FROZEN).items():
        assert torch.equal(shards[index["weight_map"][name]][name], tensor.bfloat16())


def test_a_damaged_state_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    state = checkpoint / "state" / "rank_00001.safetensors"
    content = bytearray(state.read_bytes())
    content[-2] ^= 4
    state.write_bytes(content)
    with pytest.raises(UserError, match="rank_00001.safetensors"):
        export_checkpoint(checkpoint, tmp_path / "out", torch.float32)


def test_a_folder_without_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training state"):
        export_checkpoint(tmp_path, tmp_path / "out", torch.float32)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1024", 1024)])
def test_shard_sizes(text: str, size: int) -> None:
    assert _bytes_of(text) == size


def test_a_shard_size_that_is_none_is_a_message() -> None:
    with pytest.raises(UserError, match="--max_shard_size five"):
        _bytes_of("five")
