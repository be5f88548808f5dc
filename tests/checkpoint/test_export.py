"""Exporting from a training state alone, whole or in shards, equals what the ranks held."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.checkpoint.export import export_checkpoint
from bagel_ds.checkpoint.state import Held, fill_rank, open_rank
from bagel_ds.checkpoint.step_folders import write_json, write_manifest
from bagel_ds.cli import main
from bagel_ds.cli.run import _bytes_of
from bagel_ds.errors import UserError
from bagel_ds.hub.card import run_of
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.ranges import Pieces, Range

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


def test_an_export_leads_to_the_run_that_it_came_from(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out", torch.bfloat16)
    assert run_of(tmp_path / "out").trainer["steps_done"] == 7, "for the model card of an upload"


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


# ---------------------------------------------------------------------------------------------------- whole or not
KILLED_AT_THE_THIRD_TENSOR = """
import os, signal, sys
from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.cli.main import main
write, calls = TensorFileWriter.write, []
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
TensorFileWriter.write = killed
main(sys.argv[1:])
"""


def test_a_killed_export_leaves_no_model_and_the_next_one_makes_it(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["export", str(checkpoint), "--out", str(out)]
    killed = [sys.executable, "-c", KILLED_AT_THE_THIRD_TENSOR, *words]
    assert subprocess.run(killed, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists()
    assert main.main(words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert subprocess.run([*killed, "--save_dtype", "fp32"], timeout=120).returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert main.main([*words, "--save_dtype", "fp32"]) == 0
    assert load_file(out / "model.safetensors")["a"].dtype == torch.float32
    assert sorted(path.name for path in out.iterdir()) == sorted(before)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def _full_for_the_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.posix_fallocate, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)


def _full_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("fill", [_full_for_the_second_file, _full_from_the_start])
@pytest.mark.parametrize("there", ["nothing", "a_folder", "an_export"])
def test_a_full_disk_is_one_message_and_changes_nothing(
    there: str,
    fill: Callable[[pytest.MonkeyPatch], None],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    words = ["export", str(checkpoint), "--out", str(out)]
    if there == "a_folder":
        out.mkdir()
    if there == "an_export":
        assert main.main(words) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    fill(monkeypatch)
    assert main.main([*words, "--save_dtype", "fp32"]) == 2
    said = capsys.readouterr().err
    assert "could not be exported to" in said and "No space left on device" in said and "GiB needed" in said
    assert "pass another --out" in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == (there != "nothing")


def test_an_export_replaces_an_earlier_one_says_so_and_leaves_what_is_not_its_own(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bagel_ds")
    out = tmp_path / "out"
    export_checkpoint(checkpoint, out, torch.float32)
    (out / "README.md").write_text("mine")
    assert "replaces" not in caplog.text
    export_checkpoint(checkpoint, out, torch.bfloat16, shard_bytes=24)
    assert f"{out} holds an export of {checkpoint}, which this one replaces" in caplog.text
    assert not (out / "model.safetensors").exists(), "it would be loaded instead of the shards"
    assert len(ModelFolder(out).weight_files("model")) == 2
    export_checkpoint(checkpoint, out, torch.float32)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "ema.safetensors",
        "export.json",
        "llm_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "ema-00001-of-00002.safetensors", "other.safetensors"])
def test_weights_that_no_export_wrote_are_not_replaced(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(UserError, match=rf"--out .*out holds weights that no export wrote \({name}\)"):
        export_checkpoint(checkpoint, tmp_path / "out", torch.float32)
    assert (tmp_path / "out" / name).read_text() == "precious"
    with pytest.raises(UserError, match="--out .*step_7 is a checkpoint"):
        export_checkpoint(checkpoint, checkpoint, torch.float32)
    with pytest.raises(UserError, match="is a file"):
        export_checkpoint(checkpoint, tmp_path / "out" / name, torch.float32)


@pytest.mark.parametrize("name", ["llm_config.json", "export.json"])
def test_other_files_that_no_export_wrote_are_not_replaced(name: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    with pytest.raises(UserError, match=rf"--out .*out holds files that no export wrote \({name}\)"):
        export_checkpoint(checkpoint, out, torch.float32)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "precious")]
    (out / name).unlink()
    (out / "llm_config.json").write_bytes((checkpoint / "llm_config.json").read_bytes())
    assert export_checkpoint(checkpoint, out, torch.float32), "the same file is no loss"


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1024", 1024)])
def test_shard_sizes(text: str, size: int) -> None:
    assert _bytes_of(text) == size


@pytest.mark.parametrize("text", ["0", "0GB", "0.0GiB", "0.1B"])
def test_a_shard_size_of_nothing_is_refused_before_anything_is_written(
    text: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["export", str(checkpoint), "--out", str(tmp_path / "out"), "--max_shard_size", text]) == 2
    assert f"--max_shard_size {text}: no tensor fits; pass a size such as 5GB" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_size_that_is_none_is_a_message() -> None:
    with pytest.raises(UserError, match="--max_shard_size five"):
        _bytes_of("five")


def test_latest_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_7\n")
    assert main.main(["export", str(tmp_path / "latest"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("given", ["step_37", ".", "latest", "results"])
def test_a_path_that_is_no_checkpoint_names_those_that_are(
    given: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest").write_text("step_8\n")  # gone since
    without_state = tmp_path / "step_9"
    without_state.mkdir()
    write_manifest(without_state, {})
    if given == "results":
        (tmp_path / "results" / "checkpoints").mkdir(parents=True)
        checkpoint.rename(tmp_path / "results" / "checkpoints" / "step_7")
    assert main.main(["export", str(tmp_path / given), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "holds step_7." in message and not (tmp_path / "out").exists()
